"""Types and bytes of quantized files, compared with llama.cpp's own quantizer on the same F32 file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from granite4v.converter import Options, convert, plan_conversion, policy
from granite4v.converter.policy import TextShape, check_policies, text_type, vision_type
from granite4v.errors import Granite4vError
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.quantize import block_size, quantize_rows
from tests.helpers.gguf_edit import tensor_bytes
from tests.peers.llama import quantize
from tests.toy.checkpoint import PRESETS, CheckpointSpec

WIDE = replace(PRESETS["tiny-wide"], qformer_ffn=64, vision_layers=2, deepstack_layer_map=((-2, 2), (-1, 0)))
MODELS = {
    "rows of 256": WIDE,
    "rows of 64 and 176": PRESETS["tiny"],  # fall back to types with blocks of 32, and to F16
    "untied": replace(WIDE, tied=False),
    "untied, rows of 64": replace(PRESETS["tiny"], tied=False, text_ffn=192),
    "4 queries a value head": replace(WIDE, text_heads=8, text_kv_heads=2),
    "18 layers": replace(WIDE, text_layers=18, text_ffn=256),
    "experts": PRESETS["tiny-llama4-wide"],
    "experts, rows of 48": PRESETS["tiny-llama4-scout"],
}


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[] if name in ("untied", "experts") else pytest.mark.slow) for name in MODELS]
)
def test_text_files_have_the_types_and_bytes_of_llama_cpps_quantizer(
    model: str, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    source = make_checkpoint(MODELS[model])
    convert(source, tmp_path / "F32", Options("F32", "F32"))
    for name in policy.TEXT_TYPES:
        target = tmp_path / name
        if name != "F32":
            convert(source, target, Options(name, "F32"))
        quantize(tmp_path / "F32" / "text-F32.gguf", tmp_path / "theirs.gguf", name)
        ours, theirs = tensor_bytes(target / f"text-{name}.gguf"), tensor_bytes(tmp_path / "theirs.gguf")
        assert {k: v[0] for k, v in ours.items()} == {k: v[0] for k, v in theirs.items()}, name
        assert [k for k in ours if ours[k] != theirs[k]] == [], name
        with GgufFile.open(target / f"text-{name}.gguf") as a, GgufFile.open(tmp_path / "theirs.gguf") as b:
            assert a.metadata["general.file_type"] == b.metadata["general.file_type"]


def test_bfloat16_checkpoints_give_the_same_bytes_as_through_float32(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    source = make_checkpoint(replace(WIDE, dtype="bfloat16"))
    for name in ("F32", "BF16", "Q4_K_M"):
        convert(source, tmp_path / name, Options(name, "F16"))
    quantize(tmp_path / "F32" / "text-F32.gguf", tmp_path / "theirs.gguf", "Q4_K_M")
    assert tensor_bytes(tmp_path / "Q4_K_M" / "text-Q4_K_M.gguf") == tensor_bytes(tmp_path / "theirs.gguf")
    quantize(tmp_path / "F32" / "text-F32.gguf", tmp_path / "theirs.gguf", "BF16")
    assert tensor_bytes(tmp_path / "BF16" / "text-BF16.gguf") == tensor_bytes(tmp_path / "theirs.gguf")


@pytest.mark.parametrize("name", policy.VISION_TYPES)
def test_vision_matrices_all_get_the_type_asked_for(
    name: str, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    """Widths of 200 are padded to 224, and in K-quants rows of 192 to 256, so nothing falls back to F16."""
    convert(make_checkpoint(PRESETS["tiny"]), tmp_path / "out", Options("F32", name))
    for tensor, (kind, _) in tensor_bytes(tmp_path / "out" / f"mmproj-{name}.gguf").items():
        if tensor == "v.patch_embd.weight":
            assert kind == ("F16" if name == "F16" else "F32")
        elif tensor.endswith(".weight") and not any(part in tensor for part in ("norm", ".ln", "_ln", "position")):
            assert kind == name, tensor
        else:
            assert kind == "F32", tensor


def test_a_padded_vision_matrix_is_the_checkpoints_with_zeros_around_it(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    source = make_checkpoint(PRESETS["tiny"])
    convert(source, tmp_path / "out", Options("F32", "Q8_0"))
    found = tensor_bytes(tmp_path / "out" / "mmproj-Q8_0.gguf")
    theirs = load_file(source / "model.safetensors")
    for part, name, padding in (
        ("ffn_up", "fc1", ((0, 24), (0, 0))),
        ("ffn_down", "fc2", ((0, 0), (0, 24))),
    ):
        matrix = np.pad(theirs[f"model.vision_tower.encoder.layers.1.mlp.{name}.weight"], padding)
        assert found[f"v.blk.1.{part}.weight"][1] == quantize_rows(matrix, "Q8_0", 1).tobytes()
    bias = np.pad(theirs["model.vision_tower.encoder.layers.1.mlp.fc1.bias"], (0, 24))
    assert found["v.blk.1.ffn_up.bias"][1] == bias.tobytes()
    with GgufFile.open(tmp_path / "out" / "mmproj-Q8_0.gguf") as file:
        assert file.metadata["clip.vision.feed_forward_length"] == 224


def test_a_k_quants_rows_are_the_checkpoints_with_zeros_behind_them(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    source = make_checkpoint(PRESETS["tiny"])
    convert(source, tmp_path / "out", Options("F32", "Q5_K"))
    found = tensor_bytes(tmp_path / "out" / "mmproj-Q5_K.gguf")
    theirs = load_file(source / "model.safetensors")
    layer = "model.vision_tower.encoder.layers.1."
    for part, name, padding in (
        ("attn_out", "self_attn.out_proj", ((0, 0), (0, 64))),
        ("ffn_up", "mlp.fc1", ((0, 56), (0, 64))),
        ("ffn_down", "mlp.fc2", ((0, 0), (0, 56))),
    ):
        matrix = np.pad(theirs[f"{layer}{name}.weight"], padding)
        assert found[f"v.blk.1.{part}.weight"][1] == quantize_rows(matrix, "Q5_K", 1).tobytes()
    assert found["v.blk.1.ffn_up.bias"][1] == np.pad(theirs[f"{layer}mlp.fc1.bias"], (0, 56)).tobytes()
    linear = np.pad(theirs["model.layerwise_projectors.1.out_linear.weight"], ((0, 0), (0, 64)))
    assert found["v.proj_blk.0.linear.weight"][1] == quantize_rows(linear, "Q5_K", 1).tobytes()


def test_q8_0_matrices_have_the_shapes_that_amx_takes(make_checkpoint: Callable[[CheckpointSpec], Path]) -> None:
    """Rows are whole tiles of 32 values, in an even number of tiles of 16 rows (ggml-cpu/amx/amx.cpp, `supports_op`);
    for a tower with a feed-forward width of 200, which like 4304 is not a multiple of 32."""
    (vision,) = (
        file
        for file in plan_conversion(make_checkpoint(PRESETS["tiny"]), Options("F32", "Q8_0")).files
        if file.arch == "clip"
    )
    matrices = [tensor for tensor in vision.tensors if tensor.type_name == "Q8_0"]
    assert len(matrices) == 90
    assert [tensor.name for tensor in matrices if tensor.shape[0] % 32 or tensor.shape[1] % 32] == []


def test_a_block_worked_out_by_hand() -> None:
    """Q8_0: a float16 scale of largest/127, then 32 signed bytes."""
    values = np.zeros((1, 32), dtype=np.float32)
    values[0, :4] = 127.0, -63.5, 1.0, 0.4
    expected = np.float16(1.0).tobytes() + np.array([127, -64, 1, 0] + [0] * 28, dtype=np.int8).tobytes()
    assert quantize_rows(values, "Q8_0", 1).tobytes() == expected


@pytest.mark.parametrize(
    ("name", "shape", "asked", "expected"),
    [
        ("blk.0.attn_norm.weight", (2560,), "Q4_K_M", "F32"),
        ("blk.3.attn_q.bias", (2560,), "F16", "F32"),
        ("token_embd.weight", (100353, 2560), "Q4_K_M", "Q6_K"),
        ("token_embd.weight", (100353, 2560), "Q8_0", "Q8_0"),
        ("blk.0.ffn_down.weight", (2560, 8192), "Q4_K_M", "Q6_K"),
        ("blk.5.ffn_down.weight", (2560, 8192), "Q4_K_M", "Q4_K"),
        ("blk.7.ffn_down.weight", (2560, 8192), "Q5_K_M", "Q6_K"),
        ("blk.35.attn_v.weight", (512, 2560), "Q4_K_M", "Q6_K"),
        ("blk.20.attn_v.weight", (512, 2560), "IQ4_NL", "Q5_K"),
        ("blk.4.ffn_down.weight", (2560, 8192), "IQ4_NL", "Q5_K"),
        ("blk.5.ffn_down.weight", (2560, 8192), "IQ4_NL", "IQ4_NL"),
        ("blk.5.ffn_up.weight", (8192, 2592), "Q5_K_M", "Q5_1"),
        ("blk.5.ffn_up.weight", (8192, 2570), "Q5_K_M", "F16"),
    ],
)
def test_the_text_table_for_the_published_sizes(name: str, shape: tuple[int, ...], asked: str, expected: str) -> None:
    assert text_type(name, shape, asked, TextShape(n_layers=40, n_gqa=5, tied=True)).type_name == expected


def test_a_tower_that_is_not_padded_falls_back_with_the_reason() -> None:
    choice = vision_type("v.blk.0.ffn_down.weight", (1152, 4304), "Q8_0")
    assert (choice.type_name, choice.forced) == ("F16", True)
    assert choice.reason == "rows of 4304 are not whole blocks of Q8_0"


def test_every_type_of_the_tables_is_one_that_ggml_has() -> None:
    named = {row.type_name for row in (*policy.TEXT_TABLE, *policy.VISION_TABLE) if row.type_name}
    for name in {*policy.BASE.values(), *policy.FALLBACK, *policy.FALLBACK.values(), *named}:
        assert block_size(name) in (1, 32, 256)


@pytest.mark.parametrize(
    ("text", "vision", "option"), [("Q3_K", "F16", "--text-type"), ("F16", "Q4_K_M", "--vision-type")]
)
def test_an_unknown_type_lists_the_known(text: str, vision: str, option: str) -> None:
    with pytest.raises(Granite4vError, match=f"unknown quantization type .* for {option}; known: F32, F16, BF16, Q8_0"):
        check_policies(text, vision)


def test_types_are_taken_in_any_case() -> None:
    assert check_policies("q4_k_m", "iq4_nl") == ("Q4_K_M", "IQ4_NL")
