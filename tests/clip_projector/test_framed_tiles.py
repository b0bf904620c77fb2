"""Canvases whose tiles are separate runs of image tokens: sizes, order, pixels and numbers equal those of transformers
5.24 bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from granite4v.clip_projector.grid_canvas import canvas_layout, framed_layout
from granite4v.clip_projector.pixels import normalize
from granite4v.clip_projector.resizing import resize_bilinear
from granite4v.clip_projector.tiles_canvas import cut_canvas
from granite4v.families.base import (
    CanvasConfig,
    ImageFrame,
    PixelShuffleMlpConfig,
    TowerConfig,
    VisionConfig,
)
from granite4v.families.llama4 import FRAME, canvases
from tests.helpers.pictures import noise_picture
from tests.peers.llama4 import cut, processing, prompt_of_image

HALVES = (0.5, 0.5, 0.5)
PUBLISHED = CanvasConfig(336, canvases(16), HALVES, HALVES, overview=True, low_precision=True)
SMALL = replace(PUBLISHED, tile_px=56)
OTHER = replace(
    SMALL,
    supported_aspect_ratios=canvases(5),
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    rescale_factor=1 / 127,
)
# (width, height): canvas (rows, columns) of published checkpoints
CANVASES = {
    (336, 336): (1, 1),
    (1, 1): (1, 1),
    (30, 20): (1, 1),
    (337, 336): (1, 2),
    (640, 480): (2, 2),
    (700, 700): (3, 3),
    (1700, 2200): (4, 4),
    (3000, 7): (1, 9),
    (7, 3000): (9, 1),
}


def n_most(tiling: CanvasConfig) -> int:
    return max(rows * columns for rows, columns in tiling.supported_aspect_ratios)


def settings(tiling: CanvasConfig) -> dict[str, Any]:
    return {
        "size": {"height": tiling.tile_px, "width": tiling.tile_px},
        "max_patches": n_most(tiling),
        "image_mean": list(tiling.image_mean),
        "image_std": list(tiling.image_std),
        "rescale_factor": tiling.rescale_factor,
    }


def of_reference(sizes: list[tuple[int, int]], tiling: CanvasConfig) -> list[tuple[int, int, int, int]]:
    """Returns (rows, columns, width, height) for each (width, height), computed by the steps of the processor."""
    from transformers.image_utils import SizeDict

    module, side = processing(), tiling.tile_px
    module.find_supported_resolutions.cache_clear()
    canvases = torch.tensor(module.find_supported_resolutions(n_most(tiling), SizeDict(height=side, width=side)))
    found = []
    for width, height in sizes:
        canvas = module.get_best_fit((height, width), canvases)
        limits = tuple(min(max(own, side), most) for own, most in zip((height, width), canvas, strict=True))
        fitted = [max(int(n), 1) for n in module.get_max_res_without_distortion((height, width), limits)]
        rows, columns = (canvas // side).tolist()
        found.append((rows, columns, fitted[1], fitted[0]))
    return found


def of_ours(sizes: list[tuple[int, int]], tiling: CanvasConfig) -> list[tuple[int, int, int, int]]:
    layouts = [canvas_layout(size, tiling) for size in sizes]
    return [(where.rows, where.columns, where.width, where.height) for where in layouts]


@pytest.mark.parametrize("size", CANVASES, ids=str)
def test_canvases_of_published_checkpoints(size: tuple[int, int]) -> None:
    where = canvas_layout(size, PUBLISHED)
    assert (where.rows, where.columns) == CANVASES[size]
    assert of_ours([size], PUBLISHED) == of_reference([size], PUBLISHED)


@pytest.mark.parametrize("tiling", [PUBLISHED, SMALL, OTHER], ids=["published", "small", "five tiles"])
def test_sizes_on_the_canvas(tiling: CanvasConfig) -> None:
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 3000, (400, 2)), np.exp(rng.uniform(0, 9.5, (400, 2))).astype(int) + 1])
    pairs = [(int(w), int(h)) for w, h in sizes]
    assert of_ours(pairs, tiling) == of_reference(pairs, tiling)


def published() -> VisionConfig:
    tower = TowerConfig(1408, 5632, 34, 16, 336, 14, "gelu", 1e-5, class_token=True, class_token_last=True)
    projector = PixelShuffleMlpConfig(block_side=2, width=4096)
    return VisionConfig("llama4", tower, PUBLISHED, projector, (), 5120, newline=False, frame=FRAME)


@pytest.mark.parametrize(("size", "n_tiles", "n_tokens"), [((300, 300), 1, 147), ((1700, 2200), 17, 2467)])
def test_token_counts_of_published_checkpoints(size: tuple[int, int], n_tiles: int, n_tokens: int) -> None:
    where = framed_layout(size, published())
    assert (where.n_tiles, where.n_rows, where.n_tokens) == (n_tiles, 144 * n_tiles, n_tokens)


@pytest.mark.parametrize("size", CANVASES, ids=str)
def test_tokens_stand_around_tiles_as_in_the_reference(size: tuple[int, int]) -> None:
    where, frame = framed_layout(size, published()), FRAME
    assert isinstance(frame, ImageFrame)
    text = "".join(part if isinstance(part, str) else frame.patch * part for part in where.parts)
    assert text == prompt_of_image(CANVASES[size], 144)


@pytest.mark.parametrize("tiling", [PUBLISHED, SMALL, OTHER], ids=["published", "small", "five tiles"])
@pytest.mark.parametrize("size", [(1, 1), (56, 56), (40, 30), (57, 56), (130, 200), (700, 433), (500, 3)], ids=str)
def test_pixels_are_the_reference_to_the_last_bit(size: tuple[int, int], tiling: CanvasConfig) -> None:
    picture = noise_picture(size)
    canvas, expected = cut(picture, **settings(tiling))
    where = canvas_layout(size, tiling)
    tiles = cut_canvas(picture, where, tiling)
    assert (where.rows, where.columns) == canvas
    assert np.array_equal(normalize(tiles, tiling), expected)


def test_resizing_is_torch_to_the_last_bit() -> None:
    rng = np.random.default_rng(1)
    for n in range(60):
        old, new = (tuple(int(side) for side in rng.integers(1, 300, 2)) for _ in range(2))
        if n % 5 == 0:
            new = (old[0], new[1])
        pixels = rng.integers(0, 256, (old[1], old[0], 3), dtype=np.uint8)
        if n % 2:
            pixels = (pixels & 1) * np.uint8(255)
        given = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
        expected = torch.nn.functional.interpolate(given, new[::-1], mode="bilinear", antialias=True)
        assert np.array_equal(resize_bilinear(pixels, (new[0], new[1])), expected[0].permute(1, 2, 0)), (old, new)


def test_a_large_image_is_resized_in_pieces() -> None:
    """It gives the same bits as resizing in one piece."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (1500, 1200, 3), dtype=np.uint8)
    given = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    expected = torch.nn.functional.interpolate(given, (1400, 1300), mode="bilinear", antialias=True)
    assert np.array_equal(resize_bilinear(pixels, (1300, 1400)), expected[0].permute(1, 2, 0))
