"""Chooses the size at which to render a page: the model's input resolution, and no more.

A model that cuts images into tiles shrinks a page to its best grid, at whatever size the page was rendered. So pages
are rendered for that size; the grid's tiles are then the page's own pixels, not resized again.

PDFium renders a page at twice that size, and the model's own filter halves it. PDFium places small print at whole
pixels and draws no line thinner than one pixel, so at the final size letters would be spaced unevenly and hairlines
would be bold (PSNR against an eightfold rendering: 23 dB, and 30 dB at twice the size, for 30 ms more per page).

A page that is nothing but a scan is rendered at the scan's own resolution, which gives exactly its pixels. If the model
sees fewer, its own filter shrinks them: the tiles equal, bit for bit, those of the scan as an image file.
"""

from __future__ import annotations

import math

from PIL.Image import Image, Resampling

from granite4v.clip_projector.grid_anyres import best_resolution, fit_size
from granite4v.clip_projector.grid_canvas import canvas_layout
from granite4v.families.base import CanvasConfig, Tiling

PLAIN_DPI = 200  # without a model to see the page
MAX_DPI = 2400  # a crop is not magnified beyond this
OVERSAMPLING = 2
MAX_PIXELS = 40_000_000  # of a rendered bitmap (120 MB): a letter page at 600 dpi has 34 million
_FAR_PX = 1 << 20  # so long a shorter side that every grid has to shrink it

Size = tuple[int, int]


def render_size(shape: tuple[float, float], scan: tuple[float, float] | None, tiling: Tiling | None) -> Size:
    """Returns (width, height) in pixels at which to render a page or a part of it. `shape`: its width and height in
    points.

    `scan`: pixels per point, horizontally and vertically, if the page is nothing but a scan.
    """
    if tiling is None:
        scale = (PLAIN_DPI / 72, PLAIN_DPI / 72)
    elif scan is not None:
        scale = scan
    else:
        useful = useful_size(shape, tiling)
        scale = (OVERSAMPLING * useful[0] / shape[0], OVERSAMPLING * useful[1] / shape[1])
    width, height = shape[0] * scale[0], shape[1] * scale[1]
    shrink = min(1.0, math.sqrt(MAX_PIXELS / (width * height)), MAX_DPI / 72 / max(scale))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def useful_size(shape: tuple[float, float], tiling: Tiling) -> Size:
    """Returns the largest (width, height) in pixels that the model can see of a page of this shape."""
    size = (round(shape[0] * _FAR_PX / min(shape)), round(shape[1] * _FAR_PX / min(shape)))
    return _fitted(size, tiling)


def _fitted(size: Size, tiling: Tiling) -> Size:
    """Returns the size to which the model's preprocessing scales an image of `size`."""
    if isinstance(tiling, CanvasConfig):
        where = canvas_layout(size, tiling)
        return where.width, where.height
    return fit_size(size, best_resolution(size, tiling.image_grid_pinpoints))


def shrunk(image: Image, tiling: Tiling | None) -> Image:
    """Returns the image at the size at which the model will see it, resized as in the model's preprocessing; unchanged
    if that would not shrink it, or cannot be done here."""
    if tiling is None or (isinstance(tiling, CanvasConfig) and tiling.low_precision):  # whose filter is not Pillow's
        return image
    size = _fitted(image.size, tiling)
    if size[0] >= image.width or size[1] >= image.height:
        return image  # if it must be enlarged, preprocessing does that
    return image.resize(size, Resampling(tiling.resample))
