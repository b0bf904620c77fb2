"""Llama 4, Scout and Maverick: a canvas of tiles plus an overview, with tokens around each, and a tower with 2D RoPE.

Format: transformers 5.23 `models/llama4`. llama.cpp's libmtmd has its own `llama4`, with other pixels, other tokens
around the tiles and each tile's tokens transposed. So the file names a projector type that libmtmd does not know, and
libmtmd refuses the file. The text model is in `llama4_text.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError, ModelFileError
from granite4v.families.anyres import FILTERS, MAX_TILES, pixel_scaling, scaling_from_gguf, scaling_metadata
from granite4v.families.base import (
    CanvasConfig,
    ImageFrame,
    PixelShuffleMlpConfig,
    Shapes,
    Stream,
    TowerConfig,
    VisionConfig,
)
from granite4v.families.fields import short
from granite4v.families.hf_fields import MAX_FACTOR, MAX_HEADS, MAX_LAYERS, MAX_PIXELS, MAX_WIDTH, Fields, Json
from granite4v.families.rope import MIN_THETA
from granite4v.families.text import text_section
from granite4v.families.towers import check_channels, sizes_from_gguf, sizes_metadata
from granite4v.ggml.metadata import AGAIN, GgufMetadata

HALVES = (0.5, 0.5, 0.5)
BILINEAR = FILTERS.index("bilinear")
NORM_EPS = 1e-5  # torch's default; the tower's norms ignore `norm_eps`
MAX_CANVAS_TILES = 16
THETA = 10000.0
# hard-coded in `Llama4Processor._prompt_split_image`
FRAME = ImageFrame(
    start="<|image_start|>",
    end="<|image_end|>",
    patch="<|patch|>",
    image="<|image|>",
    tile_x="<|tile_x_separator|>",
    tile_y="<|tile_y_separator|>",
)


class Llama4:
    name = "llama4"
    hf_model_types: tuple[str, ...] = ("llama4",)
    projector_type = "llama4_canvas"

    def config_from_hf(self, config: Json, preprocessor: Fields) -> VisionConfig:
        """The configuration from config.json and the image processor's settings; raises CheckpointError."""
        vision = Fields(config).section("vision_config")
        tower = _tower(vision)
        return _vision_config(
            tower,
            _canvas(preprocessor, tower),
            _projector(vision, tower),
            text_section(config).integer("hidden_size", 1, MAX_WIDTH),
        )

    def config_from_gguf(self, metadata: GgufMetadata, shapes: Shapes) -> VisionConfig:
        """The configuration from an mmproj file's metadata and tensor shapes; raises ModelFileError."""
        tower = TowerConfig(
            **sizes_from_gguf(metadata),
            rope_theta=short(metadata.number(keys.VISION_ROPE_FREQ_BASE, MIN_THETA, MAX_FACTOR)),
            **_FIXED,
        )
        projector = PixelShuffleMlpConfig(
            block_side=metadata.integer(keys.PROJECTOR_SCALE_FACTOR, 1, MAX_PIXELS),
            width=metadata.integer(keys.PROJECTOR_WIDTH, 1, MAX_WIDTH),
        )
        problem = _problem(tower, projector)
        if problem:
            raise ModelFileError(f"'{metadata.path}' has {problem}; {AGAIN}.")
        canvas = CanvasConfig(
            tile_px=tower.image_size,
            supported_aspect_ratios=canvases(metadata.integer(keys.MAX_TILES, 1, MAX_TILES)),
            **{**scaling_from_gguf(metadata), "resample": metadata.integer(keys.RESAMPLE, BILINEAR, BILINEAR)},
            overview=True,
            low_precision=True,
        )
        return _vision_config(tower, canvas, projector, metadata.integer(keys.VISION_PROJECTION_DIM, 1, MAX_WIDTH))

    def gguf_names(self, config: VisionConfig, shapes: Shapes) -> Mapping[str, str]:
        """Empty: files of other converters are not read."""
        return {}

    def vision_metadata(self, config: VisionConfig) -> dict[str, Any]:
        """The mmproj metadata that `config_from_gguf` reads back."""
        tower, canvas, projector = config.tower, config.tiling, config.projector
        assert isinstance(canvas, CanvasConfig) and isinstance(projector, PixelShuffleMlpConfig)
        return {
            keys.PROJECTOR_TYPE: self.projector_type,
            **sizes_metadata(tower),
            keys.VISION_ROPE_FREQ_BASE: tower.rope_theta,
            keys.MAX_TILES: max(h * w for h, w in canvas.supported_aspect_ratios),
            **scaling_metadata(canvas),
            keys.PROJECTOR_SCALE_FACTOR: projector.block_side,
            keys.PROJECTOR_WIDTH: projector.width,
            keys.VISION_PROJECTION_DIM: config.text_hidden_size,
        }

    def text_metadata(self, config: VisionConfig, n_text_layers: int) -> dict[str, Any]:
        """Empty: image tokens are the input of the first layer."""
        return {}

    def reference_streams(self, output: Any) -> dict[int, Any]:
        """The embeddings of all tiles, in prompt order."""
        return {0: output}

    def reference_logits_divisor(self, config: Json) -> float:
        return 1.0


def canvases(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Lists (height, width) in tiles of every canvas of at most `max_tiles` tiles, in the order of the reference
    (`find_supported_resolutions`), since the order breaks ties.

    Tile counts descend, and all canvases of an aspect ratio follow its first one. For 4 tiles: (1, 4), (2, 2), (1, 1),
    (4, 1), (1, 3), (3, 1), (1, 2), (2, 1).
    """
    by_ratio: dict[float, list[tuple[int, int]]] = defaultdict(list)
    for n_tiles in range(max_tiles, 0, -1):
        for height in range(1, n_tiles + 1):
            if n_tiles % height == 0:
                width = n_tiles // height
                by_ratio[height / width].append((height, width))
    return tuple(canvas for found in by_ratio.values() for canvas in found)


# The same in every Llama 4 tower.
_FIXED: dict[str, Any] = {
    "hidden_act": "gelu",  # the config's `hidden_act` is ignored
    "layer_norm_eps": NORM_EPS,
    "class_token": True,
    "class_token_last": True,
    "pre_norm": True,
    "post_norm": True,
    "patch_bias": False,
}


def _vision_config(
    tower: TowerConfig, canvas: CanvasConfig, projector: PixelShuffleMlpConfig, text_hidden_size: int
) -> VisionConfig:
    return VisionConfig(
        family=Llama4.name,
        tower=tower,
        tiling=canvas,
        projector=projector,
        streams=(Stream((tower.num_hidden_layers,), 0),),
        text_hidden_size=text_hidden_size,
        newline=False,
        frame=FRAME,
    )


def _tower(vision: Fields) -> TowerConfig:
    """Reads the tower of a vision_config, with transformers' defaults. Raises CheckpointError."""
    check_channels(vision)
    rope = vision.section("rope_parameters", {})
    if rope.get("rope_type", "default") != "default":
        raise rope.error("rope_type", "'default', which the tower computes")
    at = rope if "rope_theta" in rope else vision
    return TowerConfig(
        hidden_size=vision.integer("hidden_size", 1, MAX_WIDTH, 768),
        intermediate_size=vision.integer("intermediate_size", 1, MAX_WIDTH, 5632),
        num_hidden_layers=vision.integer("num_hidden_layers", 1, MAX_LAYERS, 34),
        num_attention_heads=vision.integer("num_attention_heads", 1, MAX_HEADS, 16),
        image_size=vision.integer("image_size", 1, MAX_PIXELS, 448),
        patch_size=vision.integer("patch_size", 1, MAX_PIXELS, 14),
        rope_theta=at.number("rope_theta", MIN_THETA, MAX_FACTOR, THETA),
        **_FIXED,
    )


def _projector(vision: Fields, tower: TowerConfig) -> PixelShuffleMlpConfig:
    ratio = vision.number("pixel_shuffle_ratio", 0, 1, 0.5, positive=True)
    block_side = round(1 / ratio)
    if ratio * block_side != 1:
        raise vision.error("pixel_shuffle_ratio", "1 divided by an integer, such as 0.5")
    width = vision.integer("projector_input_dim", 1, MAX_WIDTH, 4096)
    for key, default in (("projector_output_dim", 4096), ("vision_output_dim", 7680)):
        if vision.integer(key, 1, MAX_WIDTH, default) != width:
            raise vision.error(
                key, f"{width}, as 'projector_input_dim': the layers of the projector follow one another"
            )
    if vision.flag("multi_modal_projector_bias", False):
        raise vision.error("multi_modal_projector_bias", "false; the projector has no biases in transformers")
    joined = tower.hidden_size * block_side**2
    if tower.intermediate_size != joined:
        raise vision.error("intermediate_size", f"{joined}, the width of {block_side}x{block_side} joined patches")
    projector = PixelShuffleMlpConfig(block_side, width)
    problem = _problem(tower, projector)
    if problem:
        raise CheckpointError(f"vision_config has {problem}.")
    return projector


def _canvas(preprocessor: Fields, tower: TowerConfig) -> CanvasConfig:
    """Reads the canvases of a checkpoint. Raises CheckpointError if the tile sizes of processor and tower differ, or
    for settings that no published model has."""
    size = preprocessor.section("size", {"height": 336, "width": 336})
    if any(size.integer(side, 1, MAX_PIXELS) != tower.image_size for side in ("height", "width")):
        raise preprocessor.error("size", f"height and width {tower.image_size}, which the tower takes")
    for key, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True)):
        if preprocessor.flag(key, wanted) != wanted:
            raise preprocessor.error(key, "true, as the published models have it")
    if preprocessor.flag("resize_to_max_canvas", False):
        raise preprocessor.error("resize_to_max_canvas", "false, as the published models have it")
    scaling = pixel_scaling(preprocessor, HALVES, HALVES, "bilinear")
    if scaling["resample"] != BILINEAR:
        raise preprocessor.error("resample", f"{BILINEAR} (bilinear), as the published models have it")
    return CanvasConfig(
        tile_px=tower.image_size,
        supported_aspect_ratios=canvases(preprocessor.integer("max_patches", 1, MAX_TILES, MAX_CANVAS_TILES)),
        **scaling,
        overview=True,
        low_precision=True,
    )


def _problem(tower: TowerConfig, projector: PixelShuffleMlpConfig) -> str:
    """Describes the first setting that cannot be computed; empty if there is none."""
    hidden, heads = tower.hidden_size, tower.num_attention_heads
    if hidden % (4 * heads):
        return (
            f"a width of {hidden} with {heads} heads; a head must be a multiple of 4, since its halves are rotated in "
            "pairs, by column and by row"
        )
    if tower.grid_side < 1 or tower.grid_side % projector.block_side:
        return (
            f"patches of {tower.patch_size} px in a tile of {tower.image_size} px; a tile must hold whole blocks of "
            f"{projector.block_side}x{projector.block_side} patches"
        )
    return ""
