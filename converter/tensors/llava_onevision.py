"""The tensors of LLaVA-OneVision's vision file: those of LLaVA-NeXT, with other defaults."""

from __future__ import annotations

from granite4v.converter.tensors.llava_next import llava_next_tensors
from granite4v.converter.tensors.rules import TensorGroup
from granite4v.families.base import VisionConfig
from granite4v.families.hf_fields import Json
from granite4v.families.llava_onevision import with_defaults


def llava_onevision_tensors(config: VisionConfig, hf_config: Json, block: int) -> tuple[TensorGroup, ...]:
    """All tensors of the mmproj file, for a checkpoint with this config.json."""
    return llava_next_tensors(config, with_defaults(hf_config), block)
