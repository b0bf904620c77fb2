"""The configuration of a vision-language model, as plain frozen data.

A family module builds a `VisionConfig` from Hugging Face JSON or from GGUF metadata; both give the same value. Shared
code reads the parts of a `VisionConfig` and never depends on the family. Imports only the standard library, so that the
page reader process can use it to compute the tiling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "quick_gelu")  # of towers and projectors, by Hugging Face's names
Shapes = Mapping[str, tuple[int, ...]]  # tensor shapes by name, in NumPy's order: slowest dimension first


@dataclass(frozen=True)
class TowerConfig:
    """A ViT image encoder. Field names are Hugging Face's.

    `num_hidden_layers`: the number of layers that are computed, which may be fewer than the checkpoint has.
    `class_token`: a learned position before the patches, or after them if `class_token_last`; projectors never see it.
    `pre_norm`: a LayerNorm before the first layer; hidden state 0 is taken after it. `patch_bias`: patch embedding has
    a bias. `post_norm`: a LayerNorm after the last layer, applied to the last hidden state. `rope_theta`: the base of
    2D RoPE, which rotates queries and keys by grid row and column, except those of the class token.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    class_token: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    class_token_last: bool = False
    post_norm: bool = False
    rope_theta: float | None = None

    @property
    def grid_side(self) -> int:
        """Patches along one side of a tile; pixels beyond the last complete patch are dropped."""
        return self.image_size // self.patch_size

    @property
    def n_positions(self) -> int:
        """Positions that pass through the layers: the patches, plus the class token if there is one."""
        return self.grid_side**2 + self.class_token

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TiledTowerConfig:
    """A ViT image encoder whose layers attend over all tiles of an image at once. Field names are Hugging Face's.

    `num_hidden_layers` local layers are followed by `num_global_layers` with a gate on each residual. An image always
    has `max_num_tiles` tiles; missing ones are computed, too. `supported_aspect_ratios`: (height, width) in tiles; the
    id of an image's aspect ratio is its index plus one. `intermediate_states`: the hidden states that are concatenated
    with the final one; 0 is the input of the first local layer and k the output of layer k-1.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_global_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    max_num_tiles: int
    supported_aspect_ratios: tuple[tuple[int, int], ...]
    intermediate_states: tuple[int, ...]

    @property
    def grid_side(self) -> int:
        """Patches along one side of a tile; pixels beyond the last complete patch are dropped."""
        return self.image_size // self.patch_size

    @property
    def n_positions(self) -> int:
        """Positions of a tile that pass through the layers: the class token, followed by the patches."""
        return self.grid_side**2 + 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def output_size(self) -> int:
        """Values per position that the projector takes: the final state and the intermediate ones."""
        return self.hidden_size * (1 + len(self.intermediate_states))


@dataclass(frozen=True)
class TilingConfig:
    """How 'anyres' cuts an image into square tiles: an overview tile, then the grid row by row.

    `image_grid_pinpoints`: the possible grids, as (height, width) pairs in pixels. `max_tiles_of_tokens`: if the grid's
    tokens are many more than those of this number of tiles, they are resized to about that many. `square_if_several`:
    if a prompt has several images, each is padded to a square and becomes one tile. `video_pooling`: divides the tokens
    of a video frame along each side; None if the model takes no video.
    """

    tile_px: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 3  # PIL.Image.Resampling.BICUBIC
    max_tiles_of_tokens: int | None = None
    square_if_several: bool = False
    video_pooling: int | None = None


@dataclass(frozen=True)
class CanvasConfig:
    """How an image is scaled into the top left corner of a canvas of square tiles, with its aspect ratio kept.

    `supported_aspect_ratios`: (height, width) of the canvases in tiles. `overview`: if the canvas has several tiles, an
    additional last tile holds the whole image, with its aspect ratio not kept. `low_precision`: scales are compared in
    float32, and each step of pixel normalization is rounded to bfloat16.
    """

    tile_px: int
    supported_aspect_ratios: tuple[tuple[int, int], ...]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 2  # PIL.Image.Resampling.BILINEAR
    overview: bool = False
    low_precision: bool = False


Tiling = TilingConfig | CanvasConfig


def tiling_from(values: Mapping[str, Any]) -> Tiling:
    """Restores a tiling from the dict that `dataclasses.asdict` returned, possibly after a round trip through JSON."""
    name = "image_grid_pinpoints" if "image_grid_pinpoints" in values else "supported_aspect_ratios"
    made = TilingConfig if name == "image_grid_pinpoints" else CanvasConfig
    return made(**{**values, name: tuple(map(tuple, values[name]))})


@dataclass(frozen=True)
class WindowQFormerConfig:
    """One BLIP-2 Q-Former layer over windows of patches: `query_side`^2 tokens per `window_side`^2 patches."""

    query_side: int
    window_side: int
    num_attention_heads: int
    layer_norm_eps: float = 1e-12
    input_norm_eps: float = 1e-6
    hidden_act: str = "gelu"

    label = "window Q-Former"

    def tokens_side(self, grid_side: int) -> int:
        """Image tokens along one side of a tile with `grid_side` patches."""
        return grid_side // self.window_side * self.query_side


@dataclass(frozen=True)
class MlpConfig:
    """Two linear layers with an activation between them, applied to each patch: one token per patch."""

    hidden_act: str = "gelu"

    label = "two layers"

    def tokens_side(self, grid_side: int) -> int:
        """Image tokens along one side of a tile with `grid_side` patches."""
        return grid_side


@dataclass(frozen=True)
class LinearConfig:
    """One linear layer, applied to each position, whose output feeds the keys and values of cross-attention. The image
    is a single token in the prompt."""

    hidden_act: str = ""

    label = "one layer"

    def tokens_side(self, grid_side: int) -> int:
        """Image tokens along one side of a tile with `grid_side` patches."""
        return 1


@dataclass(frozen=True)
class PixelShuffleMlpConfig:
    """Joins each block of `block_side`^2 patches along their width; then three linear layers without biases, with an
    activation after the first and the second. `width`: the output width of those two."""

    block_side: int
    width: int
    hidden_act: str = "gelu"

    label = "pixel shuffle and three layers"

    def tokens_side(self, grid_side: int) -> int:
        """Image tokens along one side of a tile with `grid_side` patches."""
        return grid_side // self.block_side


ProjectorConfig = WindowQFormerConfig | MlpConfig | LinearConfig | PixelShuffleMlpConfig


@dataclass(frozen=True)
class ImageFrame:
    """The text of the vocabulary tokens around an image's tiles in a prompt.

    The order is: `start`; if there are several tiles, these row by row, with `tile_x` between the tiles of a row and
    `tile_y` after every row; `image`; the overview or only tile; `end`. A tile is one `patch` per image token. A chat
    template writes only `image` for an image.
    """

    start: str
    end: str
    patch: str
    image: str
    tile_x: str
    tile_y: str


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Decoder layers that attend to an image instead of the preceding tokens. Field names are Hugging Face's.

    `layers`: their indices among all decoder layers, ascending; the text file has the other layers, renumbered.
    """

    layers: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str = "silu"


@dataclass(frozen=True)
class Stream:
    """One set of image embeddings, and the decoder layer it is added at.

    `hidden_states`: the tower's hidden states that it is computed from, joined in this order along their width;
    0 is the input of the first encoder layer and k the output of layer k-1 (Hugging Face's numbering,
    negative indices resolved).
    `text_layer`: the decoder layer before which it is added to the hidden state.
    `spatial_offset`: for a window Q-Former, the corner of every 2x2 block that seeds the queries (0 top left,
    1 top right, 2 bottom left, 3 bottom right); None for area interpolation.
    `source`: the projector's name in the checkpoint, for instance `layerwise_projectors.0`; None if the
    configuration was read from GGUF, where projectors have the numbers of their streams.
    """

    hidden_states: tuple[int, ...]
    text_layer: int
    spatial_offset: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class VisionConfig:
    """The image side of one model. `streams` is sorted by `text_layer`, with one projector per stream.

    `newline`: a learned embedding ends each row of the grid.
    `frame`: the tokens around an image's tiles; with it, an image is several runs of image tokens.
    `cross_attention`: the decoder layers that attend to the image; with them there are no streams, `tower` is a
    TiledTowerConfig and `tiling` a CanvasConfig.
    `tower`: a TowerConfig or TiledTowerConfig; `tiling`: a TilingConfig or CanvasConfig. A family has one kind of each.
    """

    family: str
    tower: Any
    tiling: Any
    projector: ProjectorConfig
    streams: tuple[Stream, ...]
    text_hidden_size: int
    newline: bool = True
    cross_attention: CrossAttentionConfig | None = None
    frame: ImageFrame | None = None

    @property
    def takes_video(self) -> bool:
        return isinstance(self.tiling, TilingConfig) and self.tiling.video_pooling is not None

    @property
    def tokens_side(self) -> int:
        """Image tokens along one side of a tile."""
        return self.projector.tokens_side(self.tower.grid_side)

    @property
    def tokens_per_tile(self) -> int:
        return self.tokens_side**2
