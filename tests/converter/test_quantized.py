"""Checkpoints whose weights are already quantized."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from granite4v.converter import plan_conversion
from tests.helpers.damaged import edit, refusal
from tests.toy.checkpoint import PRESETS, CheckpointSpec


@pytest.fixture
def source(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_checkpoint(PRESETS["tiny"]), tmp_path / "source")


LINEAR = "model.language_model.layers.0.mlp.up_proj.weight"
QUANTIZED: dict[str, tuple[dict[str, Any] | None, dict[str, np.ndarray], str]] = {
    "bitsandbytes 4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {LINEAR: np.zeros((5632, 1), np.uint8), f"{LINEAR}.absmax": np.zeros(176, np.uint8)},
        "bitsandbytes",
    ),
    "bitsandbytes 8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {LINEAR: np.zeros((176, 64), np.int8), LINEAR.replace("weight", "SCB"): np.zeros(176, np.float32)},
        "bitsandbytes",
    ),
    "bitsandbytes, config.json says nothing": (
        None,
        {LINEAR: np.zeros((5632, 1), np.uint8), f"{LINEAR}.quant_state.bitsandbytes__nf4": np.zeros(80, np.uint8)},
        "bitsandbytes",
    ),
    "fp8": ({"quant_method": "fp8"}, {f"{LINEAR}_scale_inv": np.zeros((2, 1), np.float32)}, "FP8"),
    "fp8, config.json says nothing": (None, {f"{LINEAR}_scale_inv": np.zeros((2, 1), np.float32)}, "FP8"),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4},
        {LINEAR.replace("weight", "qweight"): np.zeros((8, 176), np.int32)},
        "GPTQ",
    ),
    "GPTQ, config.json says nothing": (
        None,
        {
            LINEAR.replace("weight", "g_idx"): np.zeros(64, np.int32),
            LINEAR.replace("weight", "qweight"): np.zeros((8, 176), np.int32),
        },
        "GPTQ",
    ),
    "AWQ": ({"quant_method": "awq"}, {LINEAR.replace("weight", "qzeros"): np.zeros((1, 22), np.int32)}, "AWQ"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {f"{LINEAR}_packed": np.zeros((176, 8), np.int32)},
        "compressed-tensors",
    ),
    "MXFP4": (
        {"quant_method": "mxfp4"},
        {LINEAR.replace(".weight", "_blocks"): np.zeros((176, 2, 16), np.uint8)},
        "MXFP4",
    ),
    "torchao": ({"quant_method": "torchao"}, {LINEAR: np.zeros((176, 64), np.int8)}, "torchao"),
    "weights of eight bits, nothing said": (None, {LINEAR: np.zeros((176, 64), np.int8)}, "weights of type I8"),
    "of no method": ({"bits": 4}, {LINEAR: np.zeros((176, 64), np.int8)}, "weights of type I8"),
    "MLX": (
        {"group_size": 64, "bits": 4},
        {LINEAR: np.zeros((176, 8), np.uint32), LINEAR.replace("weight", "scales"): np.zeros((176, 1), np.float16)},
        "MLX",
    ),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_checkpoint_is_one_message(case: str, source: Path) -> None:
    config, tensors, method = QUANTIZED[case]
    if config is not None:
        edit(source / "config.json", lambda values: values.update(quantization_config=config))
    weights = load_file(source / "model.safetensors")
    save_file(weights | tensors, source / "model.safetensors")
    message = refusal(source)
    assert message.startswith(f"this checkpoint is quantized ({method}); convert the full-precision one.")
    assert "\n" not in message


def test_full_precision_that_says_it_is_quantized_converts_with_a_warning(source: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(source / "config.json", lambda values: values.update(quantization_config=config))
    assert plan_conversion(source).warnings == (
        "config.json says that the checkpoint is quantized (bitsandbytes), but its weights are full precision; they "
        "are converted as such",
    )
