"""Llama 4's files: the vision file has the values of config.json, and impossible configurations are refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from granite4v import gguf_keys as keys
from granite4v.converter import Options, convert
from granite4v.converter.plan import PlannedTensor
from granite4v.converter.policy import Choice
from granite4v.converter.safetensors_file import SourceTensor
from granite4v.converter.stream import stream
from granite4v.converter.tensors.rules import TensorRule
from granite4v.errors import CheckpointError
from granite4v.families.base import CanvasConfig, PixelShuffleMlpConfig, VisionConfig
from granite4v.families.hf_fields import Fields
from granite4v.families.llama4 import Llama4, canvases
from granite4v.families.registry import read_vision
from granite4v.ggml.gguf_file import GgufFile
from tests.helpers.damaged import edit, refusal
from tests.helpers.gguf_edit import tensor_bytes
from tests.peers.llama import LlamaPeer
from tests.toy.checkpoint import PRESETS, CheckpointSpec, model_tensors

SPEC, SCOUT = PRESETS["tiny-llama4"], PRESETS["tiny-llama4-scout"]


def configuration(folder: Path, section: str = "", **changes: Any) -> VisionConfig:
    config, preprocessor = (
        json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")
    )
    {"": config, "preprocessor": preprocessor}.get(section, config.get(section)).update(changes)
    return Llama4().config_from_hf(config, Fields(preprocessor, "preprocessor_config.json"))


@pytest.mark.parametrize("spec", [SPEC, SCOUT], ids=["today's names", "published names"])
def test_the_tiny_checkpoint_is_what_transformers_loads(
    spec: CheckpointSpec, make_checkpoint: Callable[..., Path]
) -> None:
    from transformers import Llama4ForConditionalGeneration

    folder = make_checkpoint(spec)
    model, loading = Llama4ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    n_vocab = model.config.text_config.vocab_size
    assert {tensor.name: tensor.shape for tensor in model_tensors(spec, n_vocab)} == expected


@pytest.mark.parametrize("spec", [SPEC, SCOUT], ids=["today's names", "published names"])
def test_facts_of_config_json(spec: CheckpointSpec, make_checkpoint: Callable[..., Path]) -> None:
    config = configuration(make_checkpoint(spec))
    tower, canvas = config.tower, config.tiling
    assert (tower.hidden_size, tower.num_hidden_layers, tower.head_dim, tower.rope_theta) == (64, 3, 16, 10000.0)
    assert (tower.class_token, tower.class_token_last, tower.n_positions) == (True, True, 17)
    assert (tower.pre_norm, tower.post_norm, tower.patch_bias, tower.hidden_act) == (True, True, False, "gelu")
    assert isinstance(canvas, CanvasConfig) and canvas.overview and canvas.low_precision
    assert (canvas.tile_px, canvas.resample, canvas.image_mean) == (56, 2, (0.5, 0.5, 0.5))
    assert config.projector == PixelShuffleMlpConfig(block_side=2, width=96)
    assert (config.tokens_per_tile, config.text_hidden_size) == (4, 64)
    assert config.streams[0].hidden_states == (3,) and config.streams[0].text_layer == 0
    assert config.frame is not None and config.frame.patch == "<|patch|>"


def test_the_published_facts(make_checkpoint: Callable[..., Path]) -> None:
    """Scout's and Maverick's vision_config: 144 tokens per tile."""
    folder = make_checkpoint(SPEC)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {
        "hidden_size": 1408,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_hidden_layers": 34,
        "image_size": 336,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "vision_output_dim": 4096,
    }
    found = Llama4().config_from_hf(config, Fields({}))
    assert (found.tokens_per_tile, found.tower.head_dim, found.tower.n_positions) == (144, 88, 577)
    assert len(found.tiling.supported_aspect_ratios) == sum(16 // h for h in range(1, 17))


def test_canvases_are_in_the_order_of_the_reference() -> None:
    """Matches `find_supported_resolutions`: its docstring's example, and every canvas once."""
    assert canvases(4) == ((1, 4), (2, 2), (1, 1), (4, 1), (1, 3), (3, 1), (1, 2), (2, 1))
    assert sorted(canvases(16)) == sorted((h, w) for h in range(1, 17) for w in range(1, 17) if h * w <= 16)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision_config", {"intermediate_size": 128}, "expected 256, the width of 2x2 joined patches"),
        ("vision_config", {"num_attention_heads": 3}, "a head must be a multiple of 4"),
        ("vision_config", {"num_attention_heads": 32}, "a head must be a multiple of 4"),
        ("vision_config", {"pixel_shuffle_ratio": 0.4}, "expected 1 divided by an integer"),
        ("vision_config", {"projector_output_dim": 64}, "expected 96, as 'projector_input_dim'"),
        ("vision_config", {"vision_output_dim": 7680}, "expected 96, as 'projector_input_dim'"),
        ("vision_config", {"multi_modal_projector_bias": True}, "expected false; the projector has no biases"),
        ("vision_config", {"rope_parameters": {"rope_type": "linear"}}, "expected 'default', which the tower computes"),
        ("vision_config", {"num_channels": 1}, "the channels of an RGB image"),
        ("preprocessor", {"size": {"height": 336, "width": 336}}, "height and width 56, which the tower takes"),
        ("preprocessor", {"do_normalize": False}, "'do_normalize' is false; expected true"),
        ("preprocessor", {"resize_to_max_canvas": True}, "'resize_to_max_canvas' is true; expected false"),
        ("preprocessor", {"resample": 3}, "'resample' is 3; expected 2 (bilinear)"),
        ("preprocessor", {"max_patches": 0}, "an integer from 1 to 256"),
    ],
)
def test_what_no_such_model_can_be(
    section: str, change: dict[str, Any], message: str, make_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        configuration(make_checkpoint(SPEC), section, **change)
    assert message in str(caught.value)


def test_blocks_of_patches_must_fill_a_tile(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(replace(SPEC, tile_px=42))
    with pytest.raises(CheckpointError, match="must hold whole blocks of 2x2 patches"):
        configuration(folder)


def test_the_rescale_factor_is_exact(make_checkpoint: Callable[..., Path]) -> None:
    config = configuration(make_checkpoint(SPEC))
    written = Llama4().vision_metadata(config)
    assert math.isclose(float(written["granite4v.vision.rescale_factor"]), 1 / 255, rel_tol=0)


def test_facts_are_read_back(make_checkpoint: Callable[..., Path], make_model: Callable[..., Path]) -> None:
    with GgufFile.open(make_model(SPEC) / "mmproj-F32.gguf") as file:
        family, found = read_vision(file)
    assert family.name == "llama4"
    assert found == configuration(make_checkpoint(SPEC))


def test_every_tensor_of_the_decoder_is_the_checkpoints(
    make_checkpoint: Callable[..., Path], make_model: Callable[..., Path]
) -> None:
    source = load_file(make_checkpoint(SPEC) / "model.safetensors")
    found = {
        name: np.frombuffer(data, np.float32)
        for name, (_, data) in tensor_bytes(make_model(SPEC) / "text-F32.gguf").items()
    }
    found.pop("rope_freqs.weight")
    head = found.pop("output.weight")
    assert np.array_equal(head, source["language_model.lm_head.weight"].ravel())
    for theirs, ours in (("embed_tokens", "token_embd"), ("norm", "output_norm")):
        assert np.array_equal(found.pop(f"{ours}.weight"), source[f"language_model.model.{theirs}.weight"].ravel())
    for i in range(SPEC.text_layers):
        layer, block = f"language_model.model.layers.{i}.", f"blk.{i}."
        plain = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
            "self_attn.o_proj": "attn_output",
        }
        feed_forward = "feed_forward."
        suffix = ""
        if i % 2:
            plain["feed_forward.router"] = "ffn_gate_inp"
            feed_forward, suffix = "feed_forward.shared_expert.", "_shexp"
            both = source[f"{layer}feed_forward.experts.gate_up_proj"]  # (experts, n_in, gate and up)
            parts = {"gate": both[:, :, :48], "up": both[:, :, 48:]}
            parts["down"] = source[f"{layer}feed_forward.experts.down_proj"]
            for part, values in parts.items():
                assert np.array_equal(found.pop(f"{block}ffn_{part}_exps.weight"), values.swapaxes(1, 2).ravel())
        plain |= {f"{feed_forward}{part}_proj": f"ffn_{part}{suffix}" for part in ("gate", "up", "down")}
        for theirs, ours in plain.items():
            assert np.array_equal(found.pop(f"{block}{ours}.weight"), source[f"{layer}{theirs}.weight"].ravel())
    assert not found


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_matrices_are_transposed_in_pieces_of_every_size(dtype: str, tmp_path: Path) -> None:
    """Uses more rows than are read at once, and more values than are computed at once."""
    kind = np.float32 if dtype == "F32" else ml_dtypes.bfloat16
    values = np.random.default_rng(0).normal(size=(5, 1031, 1200)).astype(kind)
    path = tmp_path / "values"
    path.write_bytes(b"header" + values.tobytes())
    source = SourceTensor("values", path, dtype, values.shape, 6)
    columns = {"all": (0, 1200), "first": (0, 40), "last": (100, 1150)}
    rules = {name: TensorRule("values", name, values.shape, transposed=span) for name, span in columns.items()}
    planned = [PlannedTensor(name, rule.target_shape, Choice("F32", ""), source, rule) for name, rule in rules.items()]
    for n_threads in (1, 3):
        found = {tensor.name: np.empty(tensor.n_bytes, np.uint8) for tensor in planned}
        order = []
        for chunk, data in stream(planned, n_threads):
            found[chunk.tensor.name][chunk.offset_bytes :][: data.nbytes] = data
            order.append(chunk.tensor.name)
        assert order == [*columns] * 5  # tensors of the same matrix alternate
        for name, (first, last) in columns.items():
            expected = values[:, :, first:last].astype(np.float32).swapaxes(1, 2)
            assert np.array_equal(found[name].view(np.float32).reshape(expected.shape), expected)


def test_a_checkpoint_cut_short_while_experts_are_read_leaves_nothing(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(make_checkpoint(SPEC), tmp_path / "source")
    weights = source / "model.safetensors"

    def cut(_: Any) -> None:
        with weights.open("r+b") as file:
            file.truncate(1_000)

    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        convert(source, tmp_path / "out", Options("F32", "F32"), progress=cut)
    assert not (tmp_path / "out").exists()


TEXTS = (
    "It's 12345 O'Clock, WE'LL see",
    "HelloWorld camelCase ÀÉÎ éà",
    "a/b//\n\n  tabs\t x",
    "'S 's 'LLama 東京 Привет",
)


def test_llama_cpp_splits_texts_alike(make_model: Callable[..., Path]) -> None:
    path = make_model(SPEC) / "text-F32.gguf"
    with GgufFile.open(path) as file:
        assert file.text(keys.TOKENIZER_PRE) == "gpt-4o"
        tokenizer = Tokenizer.from_str(file.text(keys.TOKENIZER_HF_JSON))
    with LlamaPeer(path) as peer:
        for text in TEXTS:
            assert peer.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_chunk_size": 4096}, "'text_config.attention_chunk_size' is 4096; expected 8192, which llama.cpp"),
        ({"floor_scale": 16}, "'text_config.floor_scale' is 16; expected 8192, which llama.cpp has built in"),
        ({"attn_scale": 0.2}, "expected 0.1, which llama.cpp has built in"),
        ({"attn_temperature_tuning": False}, "'text_config.attn_temperature_tuning' is false; expected true"),
        ({"no_rope_layer_interval": 3}, "'text_config.no_rope_layer_interval' is 3; expected 4"),
        ({"no_rope_layers": [1] * 8}, "expected 0 for every 4th layer and 1 for the others"),
        ({"layer_types": ["full_attention"] * 8}, "expected 'full_attention' for every 4th layer"),
        ({"moe_layers": [0, 1, 5]}, "expected every layer, or every second, third, ..."),
        ({"moe_layers": []}, "expected every layer, or every second, third, ..."),
        ({"use_qk_norm": False}, "has 4 experts ('text_config.num_local_experts') without a norm"),
        ({"num_local_experts": 128}, "has 128 experts ('text_config.num_local_experts') with a norm"),
        ({"num_local_experts": 8}, "feed_forward.router.weight"),
        ({"num_experts_per_tok": 5}, "an integer from 1 to 4"),
        ({"num_local_experts": 1000}, "an integer from 1 to 512"),
        ({"attention_bias": True}, "expected false; llama.cpp's 'llama4' has no such biases"),
        ({"hidden_act": "gelu"}, "expected 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    change: dict[str, Any], message: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(make_checkpoint(SPEC), tmp_path / "source")
    edit(source / "config.json", lambda config: config["text_config"].update(change))
    assert message in refusal(source)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_temperature_tuning": 4},
        {"no_rope_layers": []},
        {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0]},
        {"moe_layers": [1, 3, 5, 7], "interleave_moe_layer_step": 1},
        {"layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 2},
    ],
)
def test_other_spellings_of_the_same_model(
    change: dict[str, Any], make_checkpoint: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(make_checkpoint(SPEC), tmp_path / "source")
    edit(source / "config.json", lambda config: config["text_config"].update(change))
    convert(source, tmp_path / "out", Options("F32", "F32"))
    assert tensor_bytes(tmp_path / "out" / "text-F32.gguf") == tensor_bytes(make_model(SPEC) / "text-F32.gguf")
