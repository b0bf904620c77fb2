"""Sizes of the 'anyres' tiling: which grid an image is cut into, and how many tokens it becomes. Needs no pixels.

Same geometry as transformers 5.23 (`image_processing_utils.select_best_resolution` and, of the model that began with
it, `get_image_patches` and `unpad_image`), in Python floats, to the last bit. Sizes are (width, height) as in Pillow
unless a name says otherwise; pinpoints are (height, width).

Imports no NumPy: the process that reads pages asks here how large to render them. `tiles_anyres` cuts and packs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from granite4v.families.base import TilingConfig, VisionConfig


@dataclass(frozen=True)
class Layout:
    """Where an image's tokens come from.

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
    """The (height, width) that keeps most of the image's pixels, then wastes least; the first of equals."""
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
    """The size (width, height) an image is resized to inside `resolution`, its aspect ratio kept."""
    width, height = size
    grid_height, grid_width = resolution
    scale_width, scale_height = grid_width / width, grid_height / height
    if scale_width < scale_height:
        return grid_width, min(math.ceil(height * scale_width), grid_height)
    return min(math.ceil(width * scale_height), grid_width), grid_height


def layout(size: tuple[int, int], tiling: TilingConfig, tokens_side: int, *, newline: bool = True) -> Layout:
    """The grid and the token window for an image of `size` (width, height); needs no pixels."""
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
    """Image tokens of an image of `size` (width, height), newlines included."""
    return layout(size, config.tiling, config.tokens_side, newline=config.newline).n_tokens
