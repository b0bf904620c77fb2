"""Sizes of the tiling by canvas: which canvas of tiles an image gets, and how large it is on it. Needs no pixels.

Same geometry as transformers 5.24 (`get_optimal_tiled_canvas`, `get_image_size_fit_to_canvas`), in
Python floats, to the last bit. Imports no NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from granite4v.families.base import CanvasConfig


@dataclass(frozen=True)
class CanvasLayout:
    """What the tower sees of an image: `rows` x `columns` tiles, and the image in their top left corner.

    `width`, `height`: of the image on the canvas, in pixels. `aspect_ratio_id`: of the canvas, 1 for the first that is
    supported.
    """

    rows: int
    columns: int
    width: int
    height: int
    aspect_ratio_id: int

    @property
    def n_tiles(self) -> int:
        return self.rows * self.columns

    @property
    def n_tokens(self) -> int:
        """Positions in the prompt: the image is one token there."""
        return 1


def canvas_layout(size: tuple[int, int], tiling: CanvasConfig) -> CanvasLayout:
    """The canvas for an image of `size` (width, height).

    The one that enlarges it least, else the one that shrinks it least; of equals the smallest, then the first.
    """
    width, height = size
    side = tiling.tile_px
    scales = [min(rows * side / height, columns * side / width) for rows, columns in tiling.supported_aspect_ratios]
    best = min((scale for scale in scales if scale >= 1), default=max(scales))
    equal = [i for i, scale in enumerate(scales) if scale == best]
    index = min(equal, key=lambda i: math.prod(tiling.supported_aspect_ratios[i]))
    rows, columns = tiling.supported_aspect_ratios[index]
    return CanvasLayout(rows, columns, *fit_canvas(size, (columns * side, rows * side), side), index + 1)


def fit_canvas(size: tuple[int, int], canvas: tuple[int, int], tile_px: int) -> tuple[int, int]:
    """The size (width, height) to which an image is scaled on a canvas (width, height): each side at least a tile's and
    at most the canvas's, as far as the aspect ratio, which is kept, lets both."""
    width, height = size
    wanted_width = min(max(width, tile_px), canvas[0])
    wanted_height = min(max(height, tile_px), canvas[1])
    scale_width, scale_height = wanted_width / width, wanted_height / height
    if scale_width < scale_height:
        return wanted_width, min(math.floor(height * scale_width) or 1, wanted_height)
    return min(math.floor(width * scale_height) or 1, wanted_width), wanted_height
