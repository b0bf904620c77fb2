"""Defines the interface of a family, lists all families, and finds the family of a checkpoint or GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError, ModelFileError
from granite4v.families.base import Shapes, VisionConfig
from granite4v.families.granite4_vision import Granite4Vision
from granite4v.families.hf_fields import Fields, Json
from granite4v.families.llama4 import Llama4
from granite4v.families.llava_next import LlavaNext
from granite4v.families.llava_onevision import LlavaOnevision
from granite4v.families.mllama import Mllama
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.metadata import GgufMetadata


class Family(Protocol):
    """The interface that a family module implements."""

    name: str
    hf_model_types: tuple[str, ...]
    projector_type: str

    def config_from_hf(self, config: Json, preprocessor: Fields) -> VisionConfig:
        """The configuration from config.json and the image processor's settings; raises CheckpointError."""
        ...

    def config_from_gguf(self, metadata: GgufMetadata, shapes: Shapes) -> VisionConfig:
        """The configuration from an mmproj file's metadata and tensor shapes; raises ModelFileError."""
        ...

    def gguf_names(self, config: VisionConfig, shapes: Shapes) -> Mapping[str, str]:
        """Maps our tensor names to the file's, for tensors of an mmproj file that other converters name differently."""
        ...

    def vision_metadata(self, config: VisionConfig) -> dict[str, Any]:
        """The mmproj metadata that `config_from_gguf` reads back."""
        ...

    def text_metadata(self, config: VisionConfig, n_text_layers: int) -> dict[str, Any]:
        """The text file's metadata about the injection of streams, with `{arch}` in the keys."""
        ...

    def reference_streams(self, output: Any) -> dict[int, Any]:
        """Maps each decoder layer to the packed embeddings (torch) in the output of transformers' `get_image_features`
        for one image."""
        ...

    def reference_logits_divisor(self, config: Json) -> float:
        """The divisor that turns transformers' logits into those of the text model in config.json; mostly 1."""
        ...


FAMILIES: tuple[Family, ...] = (Granite4Vision(), LlavaNext(), LlavaOnevision(), Mllama(), Llama4())


def family_of_checkpoint(config: Json) -> Family:
    """The family of a Hugging Face config.json; raises CheckpointError if none matches."""
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
    """The family of an mmproj file's metadata; raises ModelFileError if none matches."""
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
    """The family with the name in `VisionConfig.family`."""
    return next(family for family in FAMILIES if family.name == name)


def read_vision(file: GgufFile) -> tuple[Family, VisionConfig]:
    """Reads the family and the configuration of an open vision file; raises ModelFileError."""
    family = family_of_gguf(file)
    return family, family.config_from_gguf(file, {name: info.shape for name, info in file.tensors.items()})
