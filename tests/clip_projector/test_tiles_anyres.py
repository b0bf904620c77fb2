"""Tile geometry: expected grids and token counts worked out by hand, and packing as the inverse of cutting.

test_parity.py checks that tiles equal the reference's bit for bit.
"""

import numpy as np
import pytest
from PIL import Image

from granite4v.clip_projector.grid_anyres import best_resolution, fit_size, layout
from granite4v.clip_projector.pixels import normalize
from granite4v.clip_projector.tiles_anyres import cut, pack
from granite4v.families.base import TilingConfig

PINPOINTS = tuple((384 * h, 384 * w) for h in range(1, 11) for w in range(1, 11) if h * w <= 10)
TILING = TilingConfig(384, PINPOINTS, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TOKENS_SIDE = 12

# (width, height), grid (rows, columns), tokens
# 1700x2200: 3x3 tiles, 36x36 tokens of which 36 * 1700/2200 = 27.8 -> 27 wide, padding (36-27)//2 = 4 a side,
#            28 left: 36 * (28 + 1) + 144 = 1188
# A4 at 200 dpi, 1654x2339: 36 * 1654/2339 = 25.46 -> 25, padding 5 a side, 26 left: 36 * 27 + 144 = 1116
# 384x384: one tile, 12 * 13 + 144 = 300
# 3000x500: 1 row of 6, 12 high of which 72 * 500/3000 = 12: 12 * 73 + 144 = 1020
CASES = [
    ((1700, 2200), (3, 3), 1188),
    ((1654, 2339), (3, 3), 1116),
    ((384, 384), (1, 1), 300),
    ((1, 1), (1, 1), 300),
    ((3000, 500), (1, 6), 1020),
    ((500, 3000), (6, 1), 72 * 13 + 144),
    ((768, 768), (2, 2), 24 * 25 + 144),
]


@pytest.mark.parametrize("size, grid, n_tokens", CASES)
def test_grid_and_tokens(size: tuple[int, int], grid: tuple[int, int], n_tokens: int) -> None:
    where = layout(size, TILING, TOKENS_SIDE)
    assert (where.rows, where.columns) == grid
    assert where.n_tokens == n_tokens


def test_equal_pinpoints_go_to_the_first() -> None:
    assert best_resolution((100, 100), ((200, 400), (400, 200))) == (200, 400)


def test_geometry_is_in_double_precision() -> None:
    """In single precision these two give other results: 288x217, and a grid of six tiles."""
    assert fit_size((800, 600), (288, 288)) == (288, 216)
    where = layout((435, 2174), TILING, TOKENS_SIDE)
    assert where.rows * where.columns == 10


def test_a_line_of_pixels_leaves_the_overview_alone() -> None:
    """Scaled to a grid, it is less than one token high, so nothing of the grid remains after unpadding."""
    assert layout((20000, 1), TILING, TOKENS_SIDE).n_tokens == 144
    assert len(cut(Image.new("RGB", (20000, 1)), TILING)) == 2


def test_cut_keeps_the_picture_and_pads_with_black() -> None:
    tiling = TilingConfig(4, ((8, 4),), (0.0,) * 3, (1.0,) * 3)
    picture = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3) + 1
    overview, upper, lower = cut(Image.fromarray(picture), tiling)
    np.testing.assert_array_equal(overview, picture)
    np.testing.assert_array_equal(upper[2:], picture[:2])
    np.testing.assert_array_equal(lower[:2], picture[2:])
    assert not upper[:2].any() and not lower[2:].any()


def test_normalize_is_scale_then_mean_then_deviation() -> None:
    tiling = TilingConfig(1, ((1, 1),), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    pixel = np.array([[[[255, 51, 102]]]], dtype=np.uint8)
    np.testing.assert_allclose(normalize(pixel, tiling)[0, 0, 0], [1.0, -0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("size", [(1700, 2200), (2200, 1700), (3000, 500), (37, 911), (384, 384)])
def test_pack_puts_every_token_in_reading_order(size: tuple[int, int]) -> None:
    """Each token is labelled with its row and column on the whole grid; the sequence must read row by row."""
    where = layout(size, TILING, TOKENS_SIDE)
    tiles = [np.full((TOKENS_SIDE**2, 2), -2.0, np.float32)]
    for row in range(where.rows):
        for column in range(where.columns):
            y, x = np.mgrid[0:TOKENS_SIDE, 0:TOKENS_SIDE]
            tiles.append(np.stack([y + row * TOKENS_SIDE, x + column * TOKENS_SIDE], -1).reshape(-1, 2).astype("f4"))
    out = np.full((where.n_tokens, 2), np.nan, np.float32)
    pack(tiles, np.array([-1.0, -1.0], np.float32), where, out)
    expected = [(-2, -2)] * TOKENS_SIDE**2
    for y in range(where.top, where.bottom):
        expected += [(y, x) for x in range(where.left, where.right)] + [(-1, -1)]
    np.testing.assert_array_equal(out, np.array(expected, np.float32))
