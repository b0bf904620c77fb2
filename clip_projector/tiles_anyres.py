"""Cuts an image into square tiles by 'anyres', and packs the tiles' tokens. Needs only Pillow and NumPy.

Same pixels as transformers 5.24, to the last bit (`get_image_patches`, `pad_to_square`, `pack_image_features`).
`grid_anyres` computes the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as pillow
from PIL.Image import Image, Resampling

from granite4v.clip_projector.grid_anyres import Layout, VideoLayout, best_resolution, fit_size
from granite4v.clip_projector.views import View
from granite4v.families.base import TilingConfig


def cut_view(view: View, tiling: TilingConfig) -> np.ndarray:
    """Cuts a view into tiles, uint8 `(tiles, tile_px, tile_px, 3)`, in the order in which `pack` takes their tokens."""
    images = [image.pillow for image in view.images]
    if view.form == "tiles":
        return cut(images[0], tiling)
    if view.form == "square":
        images = [_squared(images[0], tiling)]
    return np.stack([_resized(image, tiling) for image in images])


def cut(image: Image, tiling: TilingConfig) -> np.ndarray:
    """Cuts an RGB image into tiles, uint8 `(tiles, tile_px, tile_px, 3)`: the overview, then the grid row by row."""
    side = tiling.tile_px
    grid_height, grid_width = best_resolution(image.size, tiling.image_grid_pinpoints)
    width, height = fit_size(image.size, (grid_height, grid_width))
    left, top = (grid_width - width) // 2, (grid_height - height) // 2
    canvas = np.zeros((grid_height, grid_width, 3), dtype=np.uint8)
    canvas[top : top + height, left : left + width] = np.asarray(
        image.resize((width, height), Resampling(tiling.resample))
    )
    grid = canvas.reshape(grid_height // side, side, grid_width // side, side, 3).swapaxes(1, 2)
    overview = _resized(image, tiling)
    return np.ascontiguousarray(np.concatenate([overview[None], grid.reshape(-1, side, side, 3)]))


def _resized(image: Image, tiling: TilingConfig) -> np.ndarray:
    """Resizes the whole image to one tile, without keeping its aspect ratio."""
    return np.asarray(image.resize((tiling.tile_px, tiling.tile_px), Resampling(tiling.resample)))


def _squared(image: Image, tiling: TilingConfig) -> Image:
    """Pads the image to a square with the mean colour, centered."""
    side = max(image.size)
    red, green, blue = (int(255 * mean) for mean in tiling.image_mean)
    square = pillow.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def pack(tiles: Sequence[np.ndarray], newline: np.ndarray | None, where: Layout | VideoLayout, out: np.ndarray) -> None:
    """Writes the tokens of an image or a video in order into `out` `(n_tokens, n_embd)`.

    `tiles`: the tokens `(tokens_per_tile, n_embd)` of each tile. For an image, writes the overview, then the unpadded
    grid row by row, each row followed by `newline` `(n_embd,)` if there is one. For a video, writes the frames, then
    one newline.
    """
    if isinstance(where, VideoLayout):
        _pack_frames(tiles, newline, where, out)
        return
    n_overview = where.tokens_side**2
    out[:n_overview] = tiles[0]
    height, width = where.grid
    grid = out[n_overview:].reshape(height, width + where.newlines, out.shape[1])
    if newline is not None:
        grid[:, width] = newline
    if where.reduced is not None:
        _reduce(tiles[1:], where, grid[:, :width])
        return
    _place(tiles[1:], where, grid[:, :width])


def _place(tiles: Sequence[np.ndarray], where: Layout, grid: np.ndarray) -> None:
    """Writes the window of the grid's tokens into `grid` `(bottom - top, right - left, n_embd)`."""
    side = where.tokens_side
    for i, tile in enumerate(tiles):
        tile = tile.reshape(side, side, -1)
        row, column = i // where.columns * side, i % where.columns * side
        top, bottom = max(row, where.top), min(row + side, where.bottom)
        left, right = max(column, where.left), min(column + side, where.right)
        if top < bottom and left < right:
            grid[top - where.top : bottom - where.top, left - where.left : right - where.left] = tile[
                top - row : bottom - row, left - column : right - column
            ]


def _reduce(tiles: Sequence[np.ndarray], where: Layout, out: np.ndarray) -> None:
    """Resizes the window of the grid's tokens into `out` `(height, width, n_embd)`.

    Assembles only two rows of the window at a time, since the whole window would take hundreds of megabytes.
    """
    side, columns = where.tokens_side, where.columns

    def row(y: int) -> np.ndarray:
        y += where.top
        of_row = tiles[y // side * columns : (y // side + 1) * columns]
        whole = np.concatenate([tile.reshape(side, side, -1)[y % side] for tile in of_row])
        return whole[where.left : where.right]

    height, width = out.shape[:2]
    across = bilinear_weights(where.right - where.left, width)
    for i, (above, below, share) in enumerate(zip(*bilinear_weights(where.bottom - where.top, height), strict=True)):
        out[i] = _between(_mixed_columns(row(above), across), _mixed_columns(row(below), across), share)


def _pack_frames(frames: Sequence[np.ndarray], newline: np.ndarray | None, where: VideoLayout, out: np.ndarray) -> None:
    side, pooled = where.tokens_side, where.pooled_side
    above, below, share = bilinear_weights(side, pooled)
    tokens = out[: where.n_frames * pooled**2].reshape(where.n_frames, pooled, pooled, -1)
    for i, frame in enumerate(frames):
        grid = frame.reshape(side, side, -1)
        rows = _between(grid[above], grid[below], share[:, None, None])
        tokens[i] = _mixed_columns(rows.swapaxes(0, 1), (above, below, share)).swapaxes(0, 1)
    if newline is not None:
        out[-1] = newline


def bilinear_weights(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, for each of `n_out` positions, the two of `n_in` positions that it lies between, and its distance from
    the first, 0 to 1.

    Same as torch's `interpolate(mode="bilinear")`: corners are not aligned, and only these two positions are averaged.
    """
    place = np.maximum((np.arange(n_out, dtype=np.float32) + np.float32(0.5)) * np.float32(n_in / n_out) - 0.5, 0)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, n_in - 1), (place - first).astype(np.float32)


def _mixed_columns(rows: np.ndarray, weights: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Resamples the first axis with the result of `bilinear_weights`."""
    first, second, share = weights
    return _between(rows[first], rows[second], share.reshape(-1, *[1] * (rows.ndim - 1)))


def _between(one: np.ndarray, other: np.ndarray, share: np.ndarray | np.float32) -> np.ndarray:
    mixed: np.ndarray = one * (1 - share) + other * share
    return mixed
