"""Computes the sizes of 'anyres' tiling: the grid that an image is cut into, and its number of tokens. Needs no pixels.

Same geometry as transformers 5.23 (`image_processing_utils.select_best_resolution`, and `get_image_patches` and
`unpad_image` of the model that introduced it), in Python floats, to the last bit. Sizes are (width, height) as in
Pillow unless a name says otherwise; pinpoints are (height, width).

Imports no NumPy: the page reader process uses this module to decide how large to render pages. `tiles_anyres` cuts and
packs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from granite4v.families.base import TilingConfig, VisionConfig

REDUCE_FROM = 1.1  # tokens are reduced above this times the side that `max_tiles_of_tokens` allows; from transformers


@dataclass(frozen=True)
class Layout:
    """The tiles of an image, and the tokens that are kept.

    The overview tile comes first, then a grid of `rows` x `columns` tiles. Of the grid's tokens, only the window
    `top:bottom`, `left:right` is kept, which leaves out padding. A newline ends each row of the window (none if
    `newlines` is 0). A window with too many tokens is resized to `reduced` (height, width) before the newlines are
    added.
    """

    rows: int
    columns: int
    tokens_side: int
    top: int
    bottom: int
    left: int
    right: int
    newlines: int = 1  # at the end of a row
    reduced: tuple[int, int] | None = None

    @property
    def n_tiles(self) -> int:
        return 1 + self.rows * self.columns

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the kept grid tokens, without newlines."""
        return self.reduced or (self.bottom - self.top, self.right - self.left)

    @property
    def n_tokens(self) -> int:
        height, width = self.grid
        return self.tokens_side**2 + height * (width + self.newlines)


@dataclass(frozen=True)
class VideoLayout:
    """The tokens of a video: the `tokens_side`^2 tokens of each frame are pooled to `pooled_side`^2, row by row; one
    newline follows the last frame (none if `newlines` is 0)."""

    n_frames: int
    tokens_side: int
    pooled_side: int
    newlines: int = 1

    @property
    def n_tiles(self) -> int:
        return self.n_frames

    @property
    def n_tokens(self) -> int:
        return self.n_frames * self.pooled_side**2 + self.newlines


def best_resolution(size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Picks the (height, width) that keeps the most pixels of the image and then wastes the fewest; the first of
    equals."""
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
    """The size (width, height) that an image is resized to inside `resolution`, with its aspect ratio kept."""
    width, height = size
    grid_height, grid_width = resolution
    scale_width, scale_height = grid_width / width, grid_height / height
    if scale_width < scale_height:
        return grid_width, min(math.ceil(height * scale_width), grid_height)
    return min(math.ceil(width * scale_height), grid_width), grid_height


def layout(size: tuple[int, int], tiling: TilingConfig, tokens_side: int, *, newline: bool = True) -> Layout:
    """Computes the grid and the token window for an image of `size` (width, height); needs no pixels.

    For example, an image of 1000x600 px on 2 rows x 3 columns of tiles with 12 tokens a side covers the width of the
    24 rows x 36 columns of tokens, and int(600 * 36 / 1000) = 21 rows. (24 - 21) // 2 = 1 row of padding is removed at
    the top and at the bottom, so the window is 1:23, 0:36.
    """
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
    top, bottom, left, right = window
    reduced = _reduced(bottom - top, right - left, tokens_side, tiling.max_tiles_of_tokens)
    return Layout(rows, columns, tokens_side, *window, newlines=int(newline), reduced=reduced)


def _reduced(height: int, width: int, tokens_side: int, max_tiles: int | None) -> tuple[int, int] | None:
    """The (height, width) that grid tokens are resized to if they exceed those of `max_tiles` tiles by more than a
    factor of REDUCE_FROM along a side; else None."""
    ratio = 0.0 if max_tiles is None else math.sqrt(height * width / (max_tiles * tokens_side**2))
    return (max(1, int(height // ratio)), max(1, int(width // ratio))) if ratio > REDUCE_FROM else None


def square_layout(config: VisionConfig) -> Layout:
    """The layout of an image that is one tile: the overview, then a single row with only a newline."""
    return Layout(0, 0, config.tokens_side, top=0, bottom=1, left=0, right=0, newlines=int(config.newline))


def video_layout(n_frames: int, config: VisionConfig) -> VideoLayout:
    """The layout of a video with `n_frames` frames, for a model that takes videos."""
    assert config.tiling.video_pooling is not None
    pooled = math.ceil(config.tokens_side / config.tiling.video_pooling)
    return VideoLayout(n_frames, config.tokens_side, pooled, int(config.newline))
