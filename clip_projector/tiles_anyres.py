"""Cutting an image into square tiles by 'anyres', and packing the tiles' tokens; Pillow and NumPy only.

Same pixels as transformers 5.23, to the last bit (`get_image_patches`, `pack_image_features`). `grid_anyres` has the
sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image, Resampling

from granite4v.clip_projector.grid_anyres import Layout, best_resolution, fit_size
from granite4v.families.base import TilingConfig


def cut(image: Image, tiling: TilingConfig) -> np.ndarray:
    """The tiles of an RGB image, uint8 `(tiles, tile_px, tile_px, 3)`: overview, then the grid row by row."""
    side, resample = tiling.tile_px, Resampling(tiling.resample)
    grid_height, grid_width = best_resolution(image.size, tiling.image_grid_pinpoints)
    width, height = fit_size(image.size, (grid_height, grid_width))
    left, top = (grid_width - width) // 2, (grid_height - height) // 2
    canvas = np.zeros((grid_height, grid_width, 3), dtype=np.uint8)
    canvas[top : top + height, left : left + width] = np.asarray(image.resize((width, height), resample))
    grid = canvas.reshape(grid_height // side, side, grid_width // side, side, 3).swapaxes(1, 2)
    overview = np.asarray(image.resize((side, side), resample))
    return np.ascontiguousarray(np.concatenate([overview[None], grid.reshape(-1, side, side, 3)]))


def pack(tiles: Sequence[np.ndarray], newline: np.ndarray | None, where: Layout, out: np.ndarray) -> None:
    """Writes the tokens of an image in order into `out` `(n_tokens, n_embd)`.

    `tiles`: for the overview and each grid tile its tokens `(tokens_per_tile, n_embd)`. The overview comes
    first, then the unpadded grid row by row, each row ended by `newline` `(n_embd,)` if there is one.
    """
    side, n_overview = where.tokens_side, where.tokens_side**2
    out[:n_overview] = tiles[0]
    width = where.right - where.left
    grid = out[n_overview:].reshape(where.bottom - where.top, width + where.newlines, out.shape[1])
    if newline is not None:
        grid[:, width] = newline
    for i, tile in enumerate(tiles[1:]):
        tile = tile.reshape(side, side, -1)
        row, column = i // where.columns * side, i % where.columns * side
        top, bottom = max(row, where.top), min(row + side, where.bottom)
        left, right = max(column, where.left), min(column + side, where.right)
        if top < bottom and left < right:
            grid[top - where.top : bottom - where.top, left - where.left : right - where.left] = tile[
                top - row : bottom - row, left - column : right - column
            ]
