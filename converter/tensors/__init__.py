"""Tensor tables: the name of every tensor in the checkpoint and in the GGUF file, and its shape.

One file per family for the vision file (`granite4v.families` has their configurations), one for the towers that they
share, and `decoder.py` and `experts.py` for the decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from granite4v.converter.tensors.granite4_vision import granite4_vision_tensors
from granite4v.converter.tensors.llama4 import llama4_vision_tensors
from granite4v.converter.tensors.llava_next import llava_next_tensors
from granite4v.converter.tensors.llava_onevision import llava_onevision_tensors
from granite4v.converter.tensors.mllama import mllama_tensors
from granite4v.converter.tensors.rules import TensorGroup
from granite4v.families.base import VisionConfig
from granite4v.families.hf_fields import Json

__all__ = ["vision_tensors"]

# By `Family.name`.
VISION_TABLES: Mapping[str, Callable[[VisionConfig, Json, int], tuple[TensorGroup, ...]]] = {
    "granite4_vision": granite4_vision_tensors,
    "llava_next": llava_next_tensors,
    "llava_onevision": llava_onevision_tensors,
    "mllama": mllama_tensors,
    "llama4": llama4_vision_tensors,
}


def vision_tensors(config: VisionConfig, hf_config: Json, block: int) -> tuple[TensorGroup, ...]:
    """Builds the table of the mmproj file's tensors, for a checkpoint with this config.json.

    `block`: feed-forward widths become a multiple of it.
    """
    return VISION_TABLES[config.family](config, hf_config, block)
