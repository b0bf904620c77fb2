"""Computes the sizes of canvas tiling: the canvas of tiles for an image, and the image's size on it. Needs no pixels.

Same geometry as transformers 5.24, to the last bit: `get_optimal_tiled_canvas` and `get_image_size_fit_to_canvas` in
Python floats, or `get_best_fit` and `get_max_res_without_distortion` in torch's. Imports no NumPy.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from granite4v.families.base import CanvasConfig, VisionConfig

Size = tuple[int, int]


@dataclass(frozen=True)
class CanvasLayout:
    """A canvas of `rows` x `columns` tiles with an image in its top left corner.

    `width`, `height`: size of the image on the canvas, in pixels. `aspect_ratio_id`: id of the canvas, 1 for the first
    supported aspect ratio.
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
        """Positions in the prompt: the image is a single token."""
        return 1


@dataclass(frozen=True)
class FramedLayout:
    """An image that is several runs of image tokens, one per tile, with vocabulary tokens around them.

    `parts`: the image's part of the prompt; each item is the text of a token or a number of image tokens.
    `has_overview`: a tile with the whole image follows those of the canvas.
    """

    canvas: CanvasLayout
    has_overview: bool
    parts: tuple[str | int, ...]

    @property
    def n_tiles(self) -> int:
        return self.canvas.n_tiles + self.has_overview

    @property
    def n_rows(self) -> int:
        """The number of image tokens: the positions that get image embeddings."""
        return sum(part for part in self.parts if isinstance(part, int))

    @property
    def n_tokens(self) -> int:
        """Positions in the prompt, including those of vocabulary tokens."""
        return sum(part if isinstance(part, int) else 1 for part in self.parts)


def canvas_layout(size: Size, tiling: CanvasConfig) -> CanvasLayout:
    """Chooses the canvas for an image of `size` (width, height).

    This is the canvas that enlarges the image least, or if none enlarges it, the one that shrinks it least; of equals
    the one with the fewest tiles, then the first.
    """
    width, height = size
    side, rounded = tiling.tile_px, _float32 if tiling.low_precision else float
    scales = [
        min(rounded(rows * side / height), rounded(columns * side / width))
        for rows, columns in tiling.supported_aspect_ratios
    ]
    best = min((scale for scale in scales if scale >= 1), default=max(scales))
    equal = [i for i, scale in enumerate(scales) if scale == best]
    index = min(equal, key=lambda i: math.prod(tiling.supported_aspect_ratios[i]))
    rows, columns = tiling.supported_aspect_ratios[index]
    fit = _fit_tensor if tiling.low_precision else fit_canvas
    return CanvasLayout(rows, columns, *fit(size, (columns * side, rows * side), side), index + 1)


def framed_layout(size: Size, config: VisionConfig) -> FramedLayout:
    """The tiles and tokens of an image of `size` (width, height), for a model with vocabulary tokens around tiles.

    For a canvas of 2x2 tiles: start, tile, tile_x, tile, tile_y, tile, tile_x, tile, tile_y, image, overview, end. A
    canvas of one tile has no overview; the tile takes its place: start, image, tile, end.
    """
    frame, n_each = config.frame, config.tokens_per_tile
    assert frame is not None
    canvas = canvas_layout(size, config.tiling)
    is_cut = canvas.n_tiles > 1
    row = (n_each, *(frame.tile_x, n_each) * (canvas.columns - 1), frame.tile_y)
    tiles = row * canvas.rows if is_cut else ()
    return FramedLayout(canvas, is_cut, (frame.start, *tiles, frame.image, n_each, frame.end))


def fit_canvas(size: Size, canvas: Size, tile_px: int) -> Size:
    """The size (width, height) to which an image is scaled on a canvas (width, height), with its aspect ratio kept. As
    far as that allows, each side is at least that of a tile and at most that of the canvas."""
    width, height = size
    wanted_width = min(max(width, tile_px), canvas[0])
    wanted_height = min(max(height, tile_px), canvas[1])
    scale_width, scale_height = wanted_width / width, wanted_height / height
    if scale_width < scale_height:
        return wanted_width, min(math.floor(height * scale_width) or 1, wanted_height)
    return min(math.floor(width * scale_height) or 1, wanted_width), wanted_height


def _fit_tensor(size: Size, canvas: Size, tile_px: int) -> Size:
    """`fit_canvas` as the reference computes it with the canvas as a torch tensor: a side that the canvas limits is a
    float32 tensor, and so are its quotient and the product with that quotient."""
    wanted = [max(side, tile_px) for side in size]
    is_tensor = [most < side for side, most in zip(wanted, canvas, strict=True)]
    width, height = (min(side, most) for side, most in zip(wanted, canvas, strict=True))
    scales = [width / size[0], height / size[1]]
    compared = map(_float32, scales) if any(is_tensor) else iter(scales)
    is_wide = next(compared) < next(compared)
    first = 0 if is_wide else 1
    scale = _float32(scales[first]) if is_tensor[first] else scales[first]
    other = size[1 - first] * scale
    fitted = max(1, math.floor(_float32(other) if is_tensor[first] else other))
    return (width, min(fitted, height)) if is_wide else (min(fitted, width), height)


def _float32(value: float) -> float:
    """The nearest float32."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)
