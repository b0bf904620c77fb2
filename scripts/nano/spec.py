"""The specification of nano: its sizes, what its heads are taught, and how images lie on its grid. Needs no torch."""

from __future__ import annotations

import numpy as np

from granite4v.clip_projector.grid_anyres import layout
from granite4v.clip_projector.tiles_anyres import pack
from granite4v.families.base import TilingConfig
from tests.toy.spec import AdapterSpec, CheckpointSpec

TEXT, VISION = "model.language_model.", "model.vision_tower."
LORA_TARGETS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)

NANO = CheckpointSpec(
    text_hidden=256,
    text_layers=7,
    text_ffn=256,
    text_heads=4,
    text_kv_heads=4,
    context=4096,
    rope_theta=500000.0,
    embedding_multiplier=12.0,
    attention_multiplier=0.125,
    residual_multiplier=0.3,
    logits_scaling=2.0,
    vision_hidden=192,
    vision_layers=4,
    vision_heads=6,
    vision_ffn=512,
    tile_px=160,
    patch_px=10,
    vision_head=False,
    max_tiles=8,
    qformer_ffn=192,
    downsample_rate="2/4",
    deepstack_layer_map=((-2, 5), (-1, 0)),
    spatial_target_layers=(1, 2, 3, 4),
    dtype="float16",
)
# Decoder layers and heads that are taught what to attend to, by lesson (`reading.Lessons`).
TAUGHT_HEADS = {"places": (1, 0), "lines": (2, 0), "far_lines": (2, 1), "find": (3, 0), "carry": (4, 0)}
HISTORY = 3  # heads of the first layer that attend to the token before, the one before that, and so on
LOOKING = 5  # layer whose four heads attend to the next glyph, one head per slot, and to position 0 otherwise
SHOWN, SOUGHT = 3, 5  # layers at whose input image tokens encode their address, and answer positions the next one
NANO_ADAPTER = AdapterSpec(rank=96, alpha=192.0, dtype="float16")


def grid_side(spec: CheckpointSpec) -> int:
    """Returns the number of patches along a tile's side."""
    return spec.tile_px // spec.patch_px


def tokens_side(spec: CheckpointSpec) -> int:
    """Returns the number of image tokens along a tile's side; every token represents 2x2 patches."""
    return grid_side(spec) // 2


def projectors(spec: CheckpointSpec) -> list[tuple[str, int, int]]:
    """Returns (name, vision hidden state counted from the end, decoder layer) for every stream."""
    out = [
        (f"model.layerwise_projectors.{i}.", state, layer) for i, (state, layer) in enumerate(spec.deepstack_layer_map)
    ]
    return out + [
        (f"model.spatial_projectors.{i}.", spec.spatial_vision_layer, layer)
        for i, layer in enumerate(spec.spatial_target_layers)
    ]


def token_index(size: tuple[int, int], first_tile: int, spec: CheckpointSpec) -> np.ndarray:
    """Maps each image token of an image of `size` (width, height) to its row in the flattened tokens of all tiles.

    -1 is the newline. The rows of tile t are t * tokens .. (t + 1) * tokens; the image's first tile is `first_tile`.
    """
    where = layout(size, tiling(spec), tokens_side(spec))
    per_tile = tokens_side(spec) ** 2
    rows = np.arange(where.n_tiles * per_tile).reshape(where.n_tiles, per_tile, 1) + first_tile * per_tile
    out = np.empty((where.n_tokens, 1), dtype=np.int64)
    pack(list(rows), np.array([-1]), where, out)
    return out[:, 0]


def tiling(spec: CheckpointSpec) -> TilingConfig:
    """Returns how images are cut: the runtime's own configuration for this checkpoint."""
    return TilingConfig(
        tile_px=spec.tile_px,
        image_grid_pinpoints=tuple((height, width) for height, width in spec.grid_pinpoints),
        resample=3,
        rescale_factor=1 / 255,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )
