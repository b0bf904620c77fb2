"""Cutting a canvas with an image in its top left corner into tiles; Pillow and NumPy only.

Same pixels as transformers 5.24 with its PIL backend, to the last bit. `grid_canvas` has the sizes.
"""

from __future__ import annotations

import numpy as np
from PIL.Image import Image, Resampling

from granite4v.clip_projector.grid_canvas import CanvasLayout
from granite4v.clip_projector.pixels import normalize, patches
from granite4v.families.base import CanvasConfig


def cut_canvas(image: Image, where: CanvasLayout, tiling: CanvasConfig) -> np.ndarray:
    """The tiles of an RGB image row by row, uint8 `(rows * columns, tile_px, tile_px, 3)`; black beside the image."""
    side = tiling.tile_px
    canvas = np.zeros((where.rows * side, where.columns * side, 3), dtype=np.uint8)
    canvas[: where.height, : where.width] = np.asarray(
        image.resize((where.width, where.height), Resampling(tiling.resample))
    )
    grid = canvas.reshape(where.rows, side, where.columns, side, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid).reshape(-1, side, side, 3)


def canvas_patches(tiles: np.ndarray, tiling: CanvasConfig, patch_size: int, n_tiles: int) -> np.ndarray:
    """The tower's input, float32 `(n_tiles, patches, values)`: black becomes a number by normalizing, while tiles that
    the image lacks are zeros afterwards."""
    found = patches(normalize(tiles, tiling), patch_size)
    absent = np.zeros((n_tiles - len(found), *found.shape[1:]), dtype=np.float32)
    return np.concatenate([found, absent])
