"""Recognizes checkpoints whose weights are quantized already, which cannot be converted.

The tensors decide: some tools leave `quantization_config` in config.json after restoring the weights to full precision.
The method is named by the configuration or, if it names none, by the tensors' names and types.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from granite4v.converter.checkpoint import Checkpoint
from granite4v.converter.safetensors_file import SourceTensor
from granite4v.errors import CheckpointError
from granite4v.families.hf_fields import Fields

# Tensors that a quantized layer has in addition to its weights or instead of them; the first match names the method.
TELL_TALES = (
    (re.compile(r"\.(weight\.quant_state\.bitsandbytes\w*|weight\.absmax|weight\.quant_map|SCB)$"), "bitsandbytes"),
    (re.compile(r"\.(weight_packed|weight_shape|input_global_scale|weight_global_scale)$"), "compressed-tensors"),
    (re.compile(r"\.(g_idx)$"), "GPTQ"),
    (re.compile(r"\.(qweight|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"_blocks$"), "MXFP4"),
    (re.compile(r"\.(weight_scale_inv|weight_scale_2|input_scale|weight_scale)$"), "FP8"),
    (re.compile(r"\.(q_weight|q_scale|q_invperm)$"), "EXL2"),
    (re.compile(r"\.(W_q|weight\._data|weight_qdata|weight\._scale|codebooks|codes)$"), "torchao, quanto or HQQ"),
    (re.compile(r"\.(scales)$"), "MLX"),
)
METHODS = {
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4",
}
PLAIN_TYPES = ("F64", "F32", "F16", "BF16", "I64", "BOOL")  # I64 and BOOL: counters and masks


def check_full_precision(checkpoint: Checkpoint) -> list[str]:
    """Raises CheckpointError for a quantized checkpoint; warns when only config.json says that it is quantized."""
    named = _named_method(checkpoint)
    found = _method_of(checkpoint.tensors.values(), named is not None)
    if found is not None:
        raise CheckpointError(
            f"this checkpoint is quantized ({named or found}); convert the full-precision one. "
            f"'{checkpoint.location.name}' holds weights that 'convert' cannot read."
        )
    if named is None:
        return []
    how = named or "it names no method"
    return [
        f"config.json says that the checkpoint is quantized ({how}), but its weights are full precision; they are "
        "converted as such"
    ]


def _named_method(checkpoint: Checkpoint) -> str | None:
    """The quantization method in config.json; empty if it names none, None if it has no quantization."""
    config = checkpoint.config
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if values.get(key):
                section = Fields(values).section(key)
                method = section.get("quant_method", "")
                return METHODS.get(str(method), str(method))
    return None


def _method_of(tensors: Collection[SourceTensor], is_named: bool) -> str | None:
    """The quantization method according to the tensors; None for full precision."""
    for pattern, method in TELL_TALES:
        if any(pattern.search(tensor.name) for tensor in tensors):
            return method
    for tensor in tensors:
        is_matrix = tensor.name.endswith("weight") and len(tensor.shape) > 1
        if tensor.dtype not in PLAIN_TYPES and (is_named or is_matrix):
            return f"weights of type {tensor.dtype}"
    return None
