"""The model families, one file each, and the way to find the one a checkpoint or a GGUF belongs to."""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError, ModelFileError
from granite4v.families import granite4_vision, llava_next
from granite4v.families.base import Family, VisionConfig
from granite4v.families.hf_fields import Json
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.metadata import GgufMetadata

__all__ = [
    "FAMILIES",
    "Family",
    "VisionConfig",
    "family_named",
    "family_of_checkpoint",
    "family_of_gguf",
    "read_vision",
]

FAMILIES: tuple[Family, ...] = (granite4_vision.Granite4Vision(), llava_next.LlavaNext())


def family_of_checkpoint(config: Json) -> Family:
    """The family of a Hugging Face config.json; raises CheckpointError when none matches."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.hf_model_types:
            return family
    known = ", ".join(repr(name) for family in FAMILIES for name in family.hf_model_types)
    raise CheckpointError(
        f"config.json has model_type {model_type!r}, which is not a vision-language family that granite4v "
        f"converts; known: {known}."
    )


def family_of_gguf(metadata: GgufMetadata) -> Family:
    """The family of an mmproj file's metadata; raises ModelFileError when none matches."""
    projector_type = metadata.text(keys.PROJECTOR_TYPE)
    for family in FAMILIES:
        if projector_type == family.projector_type:
            return family
    known = ", ".join(repr(family.projector_type) for family in FAMILIES)
    raise ModelFileError(
        f"'{metadata.path}' has '{keys.PROJECTOR_TYPE}' = {projector_type!r:.60}; this version runs {known}. "
        "Use a vision file of one of these families."
    )


def family_named(name: str) -> Family:
    """The family of a `VisionConfig.family`."""
    return next(family for family in FAMILIES if family.name == name)


def read_vision(file: GgufFile) -> tuple[Family, VisionConfig]:
    """The family and the configuration of an opened vision file; raises ModelFileError."""
    family = family_of_gguf(file)
    return family, family.config_from_gguf(file, {name: info.shape for name, info in file.tensors.items()})
