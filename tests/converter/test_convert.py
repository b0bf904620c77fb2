"""From checkpoint to files: every layout gives the same tensors, the right values, and what llama.cpp needs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from granite4v.converter import Options, Plan, convert, describe, plan_conversion
from granite4v.ggml.gguf_file import GgufFile
from tests.helpers.gguf_edit import tensor_bytes
from tests.helpers.pictures import noise_picture
from tests.peers.llama import LlamaPeer, encode_image
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import MAPPING_CASES, PRESETS, CheckpointSpec, write_checkpoint

if TYPE_CHECKING:
    from tests.peers.reference import Reference

TINY = PRESETS["tiny"]
F32 = Options("F32", "F32")
SAMPLES = (
    "Invoice 2024-00317: 1234567890 items at 1,284.50 EUR, 12345 12 1 123 1234.",
    "L'été, größer, naïve café: DON'T we'LL I'M; 東京 Привет 😀 don't",
    "a  b   c\n\n\n d\t\te \r\n x\n",
    "<|start_of_role|>user<|end_of_role|><image> 7<|end_of_text|>\n<fcel>x<nl>",
)

LAYOUTS = {
    "transformers 4 names": replace(TINY, naming="v4"),
    "older names": replace(TINY, naming="old"),
    "fused MLP": replace(TINY, text_type="granitemoehybrid"),
    "fused MLP, older names": replace(TINY, text_type="granitemoehybrid", naming="old"),
    "shards": replace(TINY, max_shard_bytes=2_000_000),
    "no pooling head": replace(TINY, vision_head=False),
}


@pytest.fixture(scope="module")
def tiny(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as F32 files."""
    out = tmp_path_factory.mktemp("convert") / "tiny"
    convert(make_checkpoint(TINY), out, F32)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(
    layout: str, tiny: Path, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    convert(make_checkpoint(LAYOUTS[layout]), tmp_path / "out", F32)
    for name in ("text-F32.gguf", "mmproj-F32.gguf"):
        assert tensor_bytes(tmp_path / "out" / name) == tensor_bytes(tiny / name)


def test_shards_without_an_index_are_found_by_their_numbers(
    tiny: Path, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    source = shutil.copytree(make_checkpoint(LAYOUTS["shards"]), tmp_path / "source")
    (source / "model.safetensors.index.json").unlink()
    convert(source, tmp_path / "out", F32)
    assert tensor_bytes(tmp_path / "out" / "text-F32.gguf") == tensor_bytes(tiny / "text-F32.gguf")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_are_widened_exactly(
    dtype: str, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    from safetensors import safe_open

    source = make_checkpoint(replace(TINY, dtype=dtype))
    convert(source, tmp_path / "out", F32)
    found = tensor_bytes(tmp_path / "out" / "text-F32.gguf")["blk.2.attn_v.weight"][1]
    with safe_open(source / "model.safetensors", "pt") as file:
        tensor = file.get_tensor("model.language_model.layers.2.self_attn.v_proj.weight")
    assert np.array_equal(np.frombuffer(found, np.float32), tensor.float().numpy().ravel())


def test_query_and_key_rows_are_paired_for_llama_cpps_rotary_embedding(
    tiny: Path, make_checkpoint: Callable[[CheckpointSpec], Path]
) -> None:
    """Checks row by row: new row 2j is old row j of the head's first half, and 2j+1 is row j of its second half."""
    from safetensors.numpy import load_file

    theirs = load_file(make_checkpoint(TINY) / "model.safetensors")
    found = tensor_bytes(tiny / "text-F32.gguf")
    for part, n_heads in (("q", TINY.text_heads), ("k", TINY.text_kv_heads)):
        matrix = theirs[f"model.language_model.layers.1.self_attn.{part}_proj.weight"]
        ours = np.frombuffer(found[f"blk.1.attn_{part}.weight"][1], np.float32).reshape(matrix.shape)
        half = TINY.head_dim // 2
        for head in range(n_heads):
            first = head * TINY.head_dim
            for j in range(half):
                assert np.array_equal(ours[first + 2 * j], matrix[first + j])
                assert np.array_equal(ours[first + 2 * j + 1], matrix[first + half + j])


@pytest.mark.parametrize(
    "spec",
    [TINY, replace(TINY, tied=False), replace(TINY, text_type="granitemoehybrid"), PRESETS["tiny-wide"]],
    ids=["tied", "untied", "fused MLP", "wide"],
)
def test_stock_llama_cpp_computes_the_references_logits_on_text(
    spec: CheckpointSpec,
    make_checkpoint: Callable[[CheckpointSpec], Path],
    load_reference: Callable[..., Reference],
    tmp_path: Path,
) -> None:
    convert(make_checkpoint(spec), tmp_path / "out", F32)
    # transformers reads the dense counterpart of the fused checkpoint: the same seed gives the same model
    reference = load_reference(replace(spec, text_type="granite"))
    expected = reference.all_logits("Total amount due: 1,284.50 EUR in 12345 days.")
    ids = reference.prompt_ids("Total amount due: 1,284.50 EUR in 12345 days.")
    with LlamaPeer(tmp_path / "out" / "text-F32.gguf") as peer:
        found = peer.logits(ids)
    assert np.abs(found - expected).max() < 1e-4
    assert np.array_equal(found.argmax(1), expected.argmax(1))


def test_stock_libmtmd_computes_the_references_streams(tiny: Path, load_reference: Callable[..., Reference]) -> None:
    """As close as libmtmd gets: it rounds patches to F16 and computes gelu from an F16 table."""
    picture = noise_picture((150, 100))
    found = encode_image(tiny / "text-F32.gguf", tiny / "mmproj-F32.gguf", np.asarray(picture))
    streams = load_reference(TINY).streams(picture)
    assert relative_l2(found, np.concatenate([streams[layer] for layer in sorted(streams)], axis=1)) < 4e-4


@pytest.mark.parametrize(("kind", "nearness"), [("Q8_0", 0.11), ("Q4_K_M", 0.7), ("Q4_0", 0.9), ("IQ4_NL", 0.8)])
def test_quantized_text_runs_in_stock_llama_cpp(
    kind: str, nearness: float, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    """Relative L2 to the F32 file, 1.4 times the observed values; random weights are the worst case."""
    source, ids = make_checkpoint(PRESETS["tiny-wide"]), list(range(40, 90))
    logits = {}
    for name in ("F32", kind):
        convert(source, tmp_path / name, Options(name, "F16"))
        with LlamaPeer(tmp_path / name / f"text-{name}.gguf") as peer:
            logits[name] = peer.logits(ids)
    assert relative_l2(logits[kind], logits["F32"]) < nearness


@pytest.mark.parametrize(("kind", "nearness"), [("F16", 1e-3), ("Q8_0", 2.5e-2), ("Q4_0", 0.33), ("IQ4_NL", 0.28)])
def test_quantized_towers_run_in_stock_libmtmd(
    kind: str, nearness: float, tiny: Path, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    """The feed-forward widths, 200 and 72, are padded to whole blocks in tower and projectors."""
    source, pixels = make_checkpoint(replace(TINY, qformer_ffn=72)), np.asarray(noise_picture((150, 100)))
    found = {}
    for name in ("F32", kind):
        convert(source, tmp_path / name, Options("F32", name))
        found[name] = encode_image(tiny / "text-F32.gguf", tmp_path / name / f"mmproj-{name}.gguf", pixels)
    assert relative_l2(found[kind], found["F32"]) < nearness


def test_llama_cpp_tokenizes_as_the_checkpoints_tokenizer_does(
    tiny: Path, make_checkpoint: Callable[[CheckpointSpec], Path]
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(make_checkpoint(TINY) / "tokenizer.json"))
    with LlamaPeer(tiny / "text-F32.gguf") as peer:
        assert not peer.adds_bos()
        for sample in SAMPLES:
            assert peer.tokenize(sample) == tokenizer.encode(sample, add_special_tokens=False).ids, sample


def test_the_text_file_says_what_llama_cpp_and_we_need(
    tiny: Path, make_checkpoint: Callable[[CheckpointSpec], Path]
) -> None:
    source = make_checkpoint(TINY)
    config = json.loads((source / "config.json").read_text())
    with GgufFile.open(tiny / "text-F32.gguf") as file:
        found = dict(file.metadata)
    expected = {
        "general.architecture": "granite",
        "granite.block_count": 8,
        "granite.embedding_length": 64,
        "granite.feed_forward_length": 176,
        "granite.attention.head_count": 4,
        "granite.attention.head_count_kv": 2,
        "granite.rope.dimension_count": 16,
        "granite.rope.freq_base": 1e7,
        "granite.embedding_scale": 1.5,
        "granite.residual_scale": pytest.approx(0.6),
        "granite.attention.scale": pytest.approx(0.3),
        "granite.logit_scale": 2.0,
        "granite.deepstack_mapping": [-1, -1, 1, 2, 3, 4, -1, 5],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "dbrx",
        "tokenizer.ggml.eos_token_id": config["text_config"]["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["text_config"]["pad_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.huggingface.json": (source / "tokenizer.json").read_text(),
        "tokenizer.chat_template": (source / "chat_template.jinja").read_text(),
        "granite4v.source": str(source),
        "granite4v.quantization_policy": "F32",
        "granite4v.adapter": "none",
        "granite4v.image_token_id": config["image_token_index"],
    }
    assert {key: found[key] for key in expected} == expected
    types = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert (types["a"], types["<image>"], types["<fcel>"]) == (1, 3, 4)  # normal, control, user-defined


def test_files_of_one_checkpoint_share_a_pair_id_and_others_have_another(
    tiny: Path, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    def pair_id(path: Path) -> str:
        with GgufFile.open(path) as file:
            return str(file.metadata["granite4v.pair_id"])

    convert(make_checkpoint(TINY), tmp_path / "again", Options("Q8_0", "F16"))
    convert(make_checkpoint(replace(TINY, seed=5)), tmp_path / "other", F32)
    same = {pair_id(tiny / "text-F32.gguf"), pair_id(tiny / "mmproj-F32.gguf")}
    same |= {pair_id(tmp_path / "again" / "text-Q8_0.gguf"), pair_id(tmp_path / "again" / "mmproj-F16.gguf")}
    assert len(same) == 1
    assert pair_id(tmp_path / "other" / "text-F32.gguf") not in same


def test_a_chat_template_inside_tokenizer_config_is_found(
    tiny: Path, make_checkpoint: Callable[[CheckpointSpec], Path]
) -> None:
    inside, beside = (
        plan_conversion(make_checkpoint(spec)).files[0].metadata["tokenizer.chat_template"]
        for spec in (replace(TINY, template_in_config=True), TINY)
    )
    assert inside == beside


@pytest.mark.parametrize("case", MAPPING_CASES)
def test_projectors_are_numbered_by_decoder_layer_and_unused_ones_left_out(
    case: str, make_checkpoint: Callable[[CheckpointSpec], Path]
) -> None:
    spec = MAPPING_CASES[case]
    plan = plan_conversion(make_checkpoint(spec))
    by_layer = {layer: f"layerwise_projectors.{i}" for i, (_, layer) in enumerate(spec.deepstack_layer_map)}
    by_layer |= {layer: f"spatial_projectors.{i}" for i, layer in enumerate(spec.spatial_target_layers)}
    sources = {t.name: t.source.name for t in plan.files[1].tensors if t.name.endswith(".query")}
    assert sources == {
        f"v.proj_blk.{p}.query": f"model.{by_layer[layer]}.query" for p, layer in enumerate(sorted(by_layer))
    }
    n_projectors = len(spec.deepstack_layer_map) + 4
    unused = {name.split(".query")[0] for name, _ in plan.dropped if name.endswith(".query")}
    assert len(unused) == n_projectors - len(by_layer)


def test_a_tensor_is_used_or_dropped_by_name_and_the_plan_tells(
    make_checkpoint: Callable[[CheckpointSpec], Path],
) -> None:
    from safetensors import safe_open

    source = make_checkpoint(TINY)
    plan = plan_conversion(source)
    with safe_open(source / "model.safetensors", "np") as file:
        held = set(file.keys())
    used = {tensor.source.name for file in plan.files for tensor in file.tensors}
    dropped = {name for name, _ in plan.dropped}
    assert used | dropped == held
    assert not used & dropped
    assert all(name.startswith("model.vision_tower.head.") for name in dropped)
    text = describe(plan)
    assert "blk.0.attn_q.weight" in text
    assert "[reorder 4 heads]" in text
    assert "model.vision_tower.head.probe: the pooling head" in text


def test_a_plan_reads_no_weights(tmp_path: Path) -> None:
    """All values of the only file are replaced by NaN: a plan reads only headers, apart from the data for the
    fingerprint."""
    source = write_checkpoint(tmp_path / "source", TINY)
    with (source / "model.safetensors").open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        size = file.seek(0, 2)
        file.seek(start)
        file.write(b"\xff" * (size - start))  # every value is NaN now
    assert isinstance(plan_conversion(source), Plan)


def test_force_replaces_the_model_and_leaves_other_files(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    source, out = make_checkpoint(TINY), tmp_path / "out"
    out.mkdir()
    convert(source, out, Options("Q8_0", "F16"))
    (out / "notes.txt").write_text("mine")
    convert(source, out, Options("F16", "F16", force=True))
    assert sorted(path.name for path in out.iterdir()) == ["mmproj-F16.gguf", "notes.txt", "text-F16.gguf"]


def test_conversions_are_reproducible(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> None:
    source = make_checkpoint(PRESETS["tiny-wide"])
    for name, threads in (("a", 1), ("b", 3)):
        convert(source, tmp_path / name, Options("Q4_K_M", "Q4_0", n_threads=threads))
    for name in ("text-Q4_K_M.gguf", "mmproj-Q4_0.gguf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


MEMORY_PROGRAM = """
import sys
import gguf, llama_cpp, ml_dtypes
from granite4v.cli.bench import peak_rss_gb
from granite4v.converter import Options, convert
from granite4v.ggml.library import lib
lib()
before = peak_rss_gb()
convert(sys.argv[1], sys.argv[2], Options("Q4_K_M", "F16"))
print(peak_rss_gb() - before)
"""


@pytest.mark.slow
def test_memory_stays_below_the_largest_tensor(tmp_path: Path) -> None:
    """A checkpoint of 150 MB, of which the token embedding is two thirds."""
    spec = replace(TINY, text_hidden=512, text_ffn=1024, text_heads=8, n_bpe=100_000, dtype="bfloat16")
    source = write_checkpoint(tmp_path / "source", spec)
    largest = 100_000 * 512 * 2
    out = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < float(out.stdout) * 1e9 < largest
