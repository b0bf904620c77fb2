"""Cutting a canvas with an image in its top left corner into tiles; Pillow and NumPy only.

Same pixels as transformers 5.24, to the last bit: with its PIL backend, or, of a tiling in low precision, with its
torchvision backend, the only one that it has then. `grid_canvas` has the sizes.
"""

from __future__ import annotations

import numpy as np
from PIL.Image import Image, Resampling

from granite4v.clip_projector.grid_canvas import CanvasLayout
from granite4v.clip_projector.pixels import normalize, patches
from granite4v.clip_projector.resizing import resize_bilinear
from granite4v.families.base import CanvasConfig


def cut_canvas(image: Image, where: CanvasLayout, tiling: CanvasConfig) -> np.ndarray:
    """The tiles of an RGB image row by row, uint8 `(tiles, tile_px, tile_px, 3)`; black beside the image. Of several,
    an overview comes last if the tiling has one."""
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
    """The tower's input, float32 `(n_tiles, patches, values)`: black becomes a number by normalizing, while tiles that
    the image lacks are zeros afterwards."""
    found = patches(normalize(tiles, tiling), patch_size)
    absent = np.zeros((n_tiles - len(found), *found.shape[1:]), dtype=np.float32)
    return np.concatenate([found, absent])
