"""Cutting a picture into square tiles and finding its way back: 'anyres', Pillow and NumPy only.

Same pixels and same geometry as transformers 5.23 (`image_processing_utils.select_best_resolution` and, of the model
that began with it, `get_image_patches` and `unpad_image`), in Python floats, to the
last bit. Sizes are (width, height) as in Pillow unless a name says otherwise; pinpoints are (height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from PIL.Image import Image

    from granite4v.families.base import TilingConfig, VisionConfig


@dataclass(frozen=True)
class Layout:
    """Where a picture's tokens come from.

    The overview tile first, then a grid of `rows` x `columns` tiles; of the grid's tokens only the window
    `top:bottom`, `left:right` remains once padding is taken off, and a newline ends each of its rows (none where
    `newlines` is 0).
    """

    rows: int
    columns: int
    tokens_side: int
    top: int
    bottom: int
    left: int
    right: int
    newlines: int = 1  # at the end of a row

    @property
    def n_tiles(self) -> int:
        return 1 + self.rows * self.columns

    @property
    def n_tokens(self) -> int:
        height, width = self.bottom - self.top, self.right - self.left
        return self.tokens_side**2 + height * (width + self.newlines)


def best_resolution(size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The (height, width) that keeps most of the picture's pixels, then wastes least; the first of equals."""
    width, height = size
    best, most, least_waste = pinpoints[0], 0, math.inf
    for grid_height, grid_width in pinpoints:
        scale = min(grid_width / width, grid_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = grid_width * grid_height - kept
        if kept > most or (kept == most and wasted < least_waste):
            best, most, least_waste = (grid_height, grid_width), kept, wasted
    return best


def fit_size(size: tuple[int, int], resolution: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) the picture is resized to inside `resolution`, its shape kept."""
    width, height = size
    grid_height, grid_width = resolution
    scale_width, scale_height = grid_width / width, grid_height / height
    if scale_width < scale_height:
        return grid_width, min(math.ceil(height * scale_width), grid_height)
    return min(math.ceil(width * scale_height), grid_width), grid_height


def layout(size: tuple[int, int], tiling: TilingConfig, tokens_side: int, *, newline: bool = True) -> Layout:
    """The grid and the token window for a picture of `size` (width, height); needs no pixels."""
    grid_height, grid_width = best_resolution(size, tiling.image_grid_pinpoints)
    rows, columns = grid_height // tiling.tile_px, grid_width // tiling.tile_px
    width, height = size
    tokens_high, tokens_wide = rows * tokens_side, columns * tokens_side
    if width / height > tokens_wide / tokens_high:
        kept = int(round(height * (tokens_wide / width), 7))
        padding = (tokens_high - kept) // 2
        window = (padding, tokens_high - padding, 0, tokens_wide)
    else:
        kept = int(round(width * (tokens_high / height), 7))
        padding = (tokens_wide - kept) // 2
        window = (0, tokens_high, padding, tokens_wide - padding)
    return Layout(rows, columns, tokens_side, *window, newlines=int(newline))


def count_tokens(size: tuple[int, int], config: VisionConfig) -> int:
    """Image tokens of a picture of `size` (width, height), newlines included."""
    return layout(size, config.tiling, config.tokens_side, newline=config.newline).n_tokens


def cut(image: Image, tiling: TilingConfig) -> np.ndarray:
    """The tiles of an RGB picture, uint8 `(tiles, tile_px, tile_px, 3)`: overview, then the grid row by row."""
    import numpy as np
    from PIL.Image import Resampling

    side, resample = tiling.tile_px, Resampling(tiling.resample)
    grid_height, grid_width = best_resolution(image.size, tiling.image_grid_pinpoints)
    width, height = fit_size(image.size, (grid_height, grid_width))
    left, top = (grid_width - width) // 2, (grid_height - height) // 2
    canvas = np.zeros((grid_height, grid_width, 3), dtype=np.uint8)
    canvas[top : top + height, left : left + width] = np.asarray(image.resize((width, height), resample))
    grid = canvas.reshape(grid_height // side, side, grid_width // side, side, 3).swapaxes(1, 2)
    overview = np.asarray(image.resize((side, side), resample))
    return np.ascontiguousarray(np.concatenate([overview[None], grid.reshape(-1, side, side, 3)]))


def normalize(tiles: np.ndarray, tiling: TilingConfig) -> np.ndarray:
    """uint8 tiles as the tower takes them, float32, same shape: (value * rescale_factor - mean) / std.

    A table of the 256 values of each channel, since a tile holds nothing else.
    """
    import numpy as np

    values = (np.arange(256, dtype=np.float64) * tiling.rescale_factor).astype(np.float32)[:, None]
    mean, std = np.array(tiling.image_mean, dtype=np.float32), np.array(tiling.image_std, dtype=np.float32)
    table = (values - mean) / std
    return np.stack([table[:, channel][tiles[..., channel]] for channel in range(3)], axis=-1)


def pack(tiles: Sequence[np.ndarray], newline: np.ndarray | None, where: Layout, out: np.ndarray) -> None:
    """Writes the tokens of a picture in order into `out` `(n_tokens, n_embd)`.

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
