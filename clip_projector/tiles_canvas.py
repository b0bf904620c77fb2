"""Cuts a canvas with an image in its top left corner into tiles. Needs only Pillow and NumPy.

Same pixels as transformers 5.24, to the last bit: as its PIL backend, or for a tiling in low precision as its
torchvision backend, the only one it has there. `grid_canvas` computes the sizes.
"""

from __future__ import annotations

import numpy as np
from PIL.Image import Image, Resampling

from granite4v.clip_projector.grid_canvas import CanvasLayout
from granite4v.clip_projector.pixels import normalize, patches
from granite4v.clip_projector.resizing import resize_bilinear
from granite4v.families.base import CanvasConfig


def cut_canvas(image: Image, where: CanvasLayout, tiling: CanvasConfig) -> np.ndarray:
    """Cuts an RGB image into tiles row by row, uint8 `(tiles, tile_px, tile_px, 3)`; the rest of the canvas is black.
    If there are several tiles and the tiling has an overview, the overview comes last."""
    side = tiling.tile_px
    canvas = np.zeros((where.rows * side, where.columns * side, 3), dtype=np.uint8)
    canvas[: where.height, : where.width] = _resized(image, (where.width, where.height), tiling)
    tiles = canvas.reshape(where.rows, side, where.columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    if tiling.overview and where.n_tiles > 1:
        tiles = np.concatenate([tiles, _resized(image, (side, side), tiling)[None]])
    return np.ascontiguousarray(tiles)


def _resized(image: Image, size: tuple[int, int], tiling: CanvasConfig) -> np.ndarray:
    if tiling.low_precision:
        return resize_bilinear(np.asarray(image), size)
    return np.asarray(image.resize(size, Resampling(tiling.resample)))


def canvas_patches(tiles: np.ndarray, tiling: CanvasConfig, patch_size: int, n_tiles: int) -> np.ndarray:
    """Computes the tower's input, float32 `(n_tiles, patches, values)`. Missing tiles are zeros after normalization,
    not normalized black like the rest of the canvas."""
    found = patches(normalize(tiles, tiling), patch_size)
    absent = np.zeros((n_tiles - len(found), *found.shape[1:]), dtype=np.float32)
    return np.concatenate([found, absent])
