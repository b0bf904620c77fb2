"""LLaVA-OneVision's checkpoints: published sizes and fields, adapters, and all weight types in every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import granite4v
from granite4v import gguf_keys as keys
from granite4v.cli.main import app
from granite4v.clip_projector import load_video
from granite4v.converter import Options, convert, plan_conversion, policy
from tests.helpers.pictures import noise_picture
from tests.peers.onevision import OnevisionReference
from tests.peers.reference import relative_l2, user_turn
from tests.toy.checkpoint import PRESETS, AdapterSpec, write_adapter, write_checkpoint

TINY = PRESETS["tiny-onevision"]
WIDE = replace(TINY, text_hidden=256, text_ffn=512, vision_hidden=256, vision_ffn=512)  # so that K-quants apply
LOGITS = 1e-4
# Billions of weights of the decoder with its embeddings, and of the tower with the projector, as published.
SIZES = {
    "full-onevision-0.5b": (0.494, 0.400),
    "full-onevision-7b": (7.617, 0.415),
    "full-onevision-72b": (72.71, 0.475),
}


# --- published sizes ---


@pytest.mark.parametrize("preset", SIZES)
def test_published_sizes(preset: str, tmp_path: Path) -> None:
    """Checkpoints of holes: every tensor is found, and all have the shapes that follow from the configuration."""
    full = PRESETS[preset]
    n_vocab = full.n_bpe + full.unused_rows
    spec = replace(full, holes=True, n_bpe=TINY.n_bpe, unused_rows=n_vocab - TINY.n_bpe, max_shard_bytes=5_000_000_000)
    plan = plan_conversion(write_checkpoint(tmp_path / "source", spec), Options("Q4_K_M", "Q8_0"))
    assert plan.warnings == () and all("post_layernorm" in name for name, _ in plan.dropped)
    text, vision = plan.files
    assert text.metadata["qwen2.embedding_length"] == spec.text_hidden
    assert text.metadata["qwen2.attention.head_count_kv"] == spec.text_kv_heads
    for file, billions in zip(plan.files, SIZES[preset], strict=True):
        n_weights = sum(int(np.prod(tensor.shape)) for tensor in file.tensors)
        assert n_weights / 1e9 == pytest.approx(billions, rel=0.01)
    assert ("output.weight" in {tensor.name for tensor in text.tensors}) == (not spec.tied)
    assert vision.data_bytes < text.data_bytes * 1.5


# --- published fields ---

# The files on the hub: roles end in a space, texts begin with a line break, and the assistant's words are marked for
# training. The template is in chat_template.json; config.json omits what transformers 4.45 had defaults for.
PUBLISHED_TEMPLATE = """\
{%- for message in messages %}{{ '<|start_of_role|>' + message['role'] + ' ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{%- if message['role'] == 'assistant' %}{% generation %}{{ '\\n' + part['text'] }}{% endgeneration %}
{%- else %}{{ '\\n' + part['text'] }}{% endif %}{% endfor %}{{ '<|end_of_role|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant\\n' }}{% endif %}"""
LEFT_OUT = ("vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act")


@pytest.mark.parametrize("tied", [True, False], ids=["tied as 0.5b", "untied as 7b"])
def test_the_fields_of_published_checkpoints(tied: bool, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", replace(TINY, naming="old", tied=tied))
    for name in ("chat_template.jinja", "chat_template.json"):
        (source / name).unlink(missing_ok=True)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": PUBLISHED_TEMPLATE}))
    config = json.loads((source / "config.json").read_text())
    for key in LEFT_OUT:
        config.pop(key, None)
    config |= {"ignore_index": -100, "use_image_newline_parameter": True, "transformers_version": "4.45.0.dev0"}
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "out", Options("F32", "F32")).plan.warnings == ()
    reference = OnevisionReference(source)
    reference.processor.tokenizer.chat_template = PUBLISHED_TEMPLATE
    picture, frames = noise_picture((100, 60)), [noise_picture((70, 50), seed) for seed in range(2)]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        user_turn("Why?"),
    ]
    with granite4v.load(tmp_path / "out", device="cpu") as model:
        prompt = model.prepare(messages, [load_video(frames), picture])
        assert prompt.text == reference.prompt_text(messages)
        logits, tokens = reference.answer(messages, [picture], [frames])
        assert relative_l2(model.logits(prompt), logits) <= LOGITS
        answer = model.generate(prompt, max_tokens=32)
    assert answer.tokens == [token for token in tokens if token not in model.prompts.stop_tokens]


# --- adapters ---


def test_adapters_merged_and_separate(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """With an image, and with a video. A separate adapter is applied by default, unless it is turned off."""
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec())
    picture, frames = noise_picture((100, 60)), [noise_picture((70, 50), seed) for seed in range(2)]
    image_turn = user_turn("What is it?", 1)
    video_turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}
    reference = OnevisionReference(make_checkpoint(TINY), adapter)
    expected = [
        reference.answer([image_turn], [picture], n=1)[0],
        reference.answer([video_turn], videos=[frames], n=1)[0],
    ]
    for mode in ("merge", "separate", "ignore"):
        convert(make_checkpoint(TINY), tmp_path / mode, Options("F32", "F32", lora=mode, adapter=str(adapter)))
        with granite4v.load(tmp_path / mode, device="cpu") as model:
            found = [model.logits([image_turn], [picture]), model.logits([video_turn], [load_video(frames)])]
            errors = [relative_l2(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
            assert all((error <= LOGITS) == (mode != "ignore") for error in errors), (mode, errors)
            if mode == "separate":
                off = model.logits([image_turn], [picture], lora=False)
                assert relative_l2(off, expected[0]) > 100 * LOGITS


# --- types of weights ---


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "source", WIDE)


@pytest.mark.parametrize(("text_type", "vision_type"), list(zip(policy.TEXT_TYPES, policy.VISION_TYPES, strict=True)))
def test_every_type_in_every_command(text_type: str, vision_type: str, wide: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    done = run("convert", wide, model, "--text-type", text_type, "--vision-type", vision_type)
    assert done.exit_code == 0, done.stderr
    for i in range(2):
        noise_picture((70, 50), i).save(tmp_path / f"{i}.png")
    (tmp_path / "frames").mkdir()
    for i in range(2):
        shutil.copy(tmp_path / f"{i}.png", tmp_path / "frames")
    asked = ("ask", "--model", model, "--max-tokens", 2, "--json", "--no-page-store")
    pages = json.loads(run(*asked, tmp_path / "0.png", tmp_path / "1.png", "What?").stdout)
    film = json.loads(run(*asked, "--video", tmp_path / "frames", "What?").stdout)
    assert (pages["timings"]["n_image"], film["timings"]["n_image"]) == (2 * 10, 2 * 4 + 1)
    described = json.loads(run("inspect", model, "--json").stdout)
    assert vision_type in json.dumps(described) and "llava_onevision" in json.dumps(described)
    benched = run("bench", "--model", model, "--image", tmp_path / "0.png", "--max-tokens", 2, "--json")
    assert json.loads(benched.stdout.splitlines()[-1])["decode_tok_s"] > 0
    out = tmp_path / "out"
    read = run(
        "extract",
        tmp_path / "0.png",
        tmp_path / "1.png",
        "--model",
        model,
        "--prompt",
        "What?",
        "--max-tokens",
        3,
        "--out",
        out,
    )
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(record["text"] for record in records), read.stderr
    compared = run("verify", model, "--reference", wide, "--image", tmp_path / "0.png", "--json")
    assert compared.exit_code == 0, compared.stderr
    comparison = next(one for one in json.loads(compared.stdout)["comparisons"] if one["n_image_tokens"])
    limit = 1e-4 if (text_type, vision_type) == ("F32", "F32") else 0.5
    assert comparison["same_prompt_tokens"] and comparison["logits_relative_l2"] < limit
    assert all(stream["relative_l2"] < limit for stream in comparison["streams"])


def test_a_file_says_that_it_takes_videos(make_model: Callable[..., Path]) -> None:
    with granite4v.load(make_model(TINY), device="cpu") as model:
        config = model.files.vision_config
        assert config is not None and config.takes_video
        assert keys.VIDEO_TOKEN_ID in model.files.text
