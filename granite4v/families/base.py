"""What a vision-language model is made of, as plain frozen data.

A family file (`granite4_vision.py`, ...) builds a `VisionConfig` from Hugging Face JSON or from GGUF
metadata; both give the same value. Shared code reads the parts of a `VisionConfig` and never asks
which family it came from. Nothing here computes on weights or imports a library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from granite4v.families.tensor_rules import TensorGroup

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class TowerConfig:
    """A ViT image encoder. Field names are Hugging Face's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    class_token: bool = False

    @property
    def grid_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TilingConfig:
    """How a picture is cut into square tiles: LLaVA-NeXT's 'anyres'.

    `image_grid_pinpoints` holds (height, width) pairs in pixels. The overview tile comes first, then
    the grid row by row.
    """

    tile_px: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True)
class WindowQFormerConfig:
    """One BLIP-2 Q-Former layer over windows of patches: `query_side`^2 tokens for `window_side`^2 patches."""

    query_side: int
    window_side: int
    num_attention_heads: int
    layer_norm_eps: float = 1e-12
    input_norm_eps: float = 1e-6
    hidden_act: str = "gelu"


@dataclass(frozen=True)
class Stream:
    """One set of image embeddings and where it goes.

    `hidden_state`: which hidden state of the tower it is made from, 0 is the embedding output and k the
    output of encoder layer k-1 (Hugging Face's numbering, negative indices resolved).
    `text_layer`: the decoder layer before which it is added to the hidden state.
    `spatial_offset`: the corner of every 2x2 block that seeds the queries (0 top left, 1 top right,
    2 bottom left, 3 bottom right); None for area interpolation.
    `source`: the projector's name in the checkpoint, for instance `layerwise_projectors.0`; None when
    the configuration was read from GGUF, where projectors are numbered as the streams are.
    """

    hidden_state: int
    text_layer: int
    spatial_offset: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class VisionConfig:
    """The image side of one model. `streams` is sorted by `text_layer`, one projector a stream."""

    family: str
    tower: TowerConfig
    tiling: TilingConfig
    projector: WindowQFormerConfig
    streams: tuple[Stream, ...]
    text_hidden_size: int

    @property
    def tokens_side(self) -> int:
        """Image tokens along one side of a tile."""
        return self.tower.grid_side // self.projector.window_side * self.projector.query_side

    @property
    def tokens_per_tile(self) -> int:
        return self.tokens_side**2


class Family(Protocol):
    """What a family file provides. `FAMILIES` in `granite4v.families` lists them."""

    name: str
    hf_model_types: tuple[str, ...]
    projector_type: str

    def config_from_hf(self, config: Metadata, preprocessor: Metadata) -> VisionConfig:
        """The configuration from config.json and preprocessor_config.json; raises CheckpointError."""
        ...

    def config_from_gguf(self, metadata: Metadata) -> VisionConfig:
        """The configuration from an mmproj file's metadata; raises ModelFileError."""
        ...

    def vision_metadata(self, config: VisionConfig) -> dict[str, Any]:
        """The mmproj metadata that `config_from_gguf` reads back."""
        ...

    def text_metadata(self, config: VisionConfig, n_text_layers: int) -> dict[str, Any]:
        """What the text GGUF must say about injection, without the architecture prefix."""
        ...

    def vision_tensors(self, config: VisionConfig, hf_config: Metadata) -> tuple[TensorGroup, ...]:
        """The table of the mmproj file's tensors, for a checkpoint with this config.json."""
        ...
