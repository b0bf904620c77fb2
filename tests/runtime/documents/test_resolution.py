"""Tests of the size at which a PDF page is rendered."""

from __future__ import annotations

import random
from typing import Any

import pytest

from granite4v.clip_projector.grid_anyres import best_resolution, fit_size
from granite4v.families.base import VisionConfig
from granite4v.runtime.documents.resolution import MAX_PIXELS, render_size, useful_size
from tests.helpers.page_tests import VIEW, VIEWS
from tests.helpers.pdfs import LETTER


def shapes() -> list[tuple[float, float]]:
    rng = random.Random(4)
    found = [LETTER, (595.276, 841.89), (842, 595), (30, 3), (200, 1.5), (100, 100)]
    return found + [(rng.uniform(10, 2000), rng.uniform(10, 2000)) for _ in range(400)]


@VIEWS
def test_the_useful_size_is_what_the_model_shrinks_larger_pages_to_and_no_less(view: VisionConfig) -> None:
    pinpoints = view.tiling.image_grid_pinpoints
    for width, height in shapes():
        size = useful_size((width, height), view.tiling)
        scales = [min(w / width, h / height) for h, w in pinpoints]
        assert size[0] / width >= max(scales) * 0.999  # no grid of tiles would show more
        assert fit_size(size, best_resolution(size, pinpoints)) == size  # and this size is not resized again
        twice = render_size((width, height), None, view.tiling)
        if twice == (2 * size[0], 2 * size[1]):  # not limited by `MAX_PIXELS` or `MAX_DPI`
            assert fit_size(twice, best_resolution(twice, pinpoints)) == size
        else:
            assert min(width, height) < 50


def test_the_sizes_of_ordinary_pages() -> None:
    assert useful_size(LETTER, VIEW.tiling) == (891, 1152)  # 3 x 3 tiles, the same grid as for the page at 200 dpi
    assert useful_size((792, 612), VIEW.tiling) == (1152, 891)
    assert useful_size((100, 1000), VIEW.tiling) == (384, 3840)
    assert render_size(LETTER, None, None) == (1700, 2200)


@pytest.mark.parametrize("tiling", [None, VIEW.tiling])
@pytest.mark.parametrize("scan", [None, (1000.0, 1000.0)])
def test_pages_of_any_size_are_drawn_within_limits(tiling: Any, scan: Any) -> None:
    for shape in ((14400, 14400), (14400, 0.01), (0.01, 0.01), *shapes()):
        width, height = render_size(shape, scan, tiling)
        assert width * height <= MAX_PIXELS * 1.001
        assert min(width, height) >= 1
