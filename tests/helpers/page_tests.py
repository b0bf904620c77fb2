"""Helpers of the page tests: vision configurations, shortcuts for reading, and inputs that several tests share."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from granite4v.families.base import TilingConfig, TowerConfig, VisionConfig, WindowQFormerConfig
from granite4v.runtime.documents import Page, PageFailure, open_pages
from tests.helpers.pictures import encoded, noise_picture, png_of, text_picture


def view_of(tile_px: int, most_tiles: int) -> VisionConfig:
    grid = range(1, most_tiles + 1)
    pinpoints = tuple((h * tile_px, w * tile_px) for h in grid for w in grid if h * w <= most_tiles)
    return VisionConfig(
        family="test",
        tower=TowerConfig(8, 8, 1, 1, tile_px, 16, "gelu", 1e-6),
        tiling=TilingConfig(tile_px, pinpoints, (0.5,) * 3, (0.5,) * 3),
        projector=WindowQFormerConfig(1, 2, 1),
        streams=(),
        text_hidden_size=8,
    )


VIEW = view_of(384, 10)  # as published
SMALL_VIEW = view_of(64, 6)
VIEWS = pytest.mark.parametrize("view", [VIEW, SMALL_VIEW], ids=["384 px", "64 px"])


def read(*inputs: str | Path, **options: Any) -> list[Page | PageFailure]:
    return list(open_pages(inputs, **options))


def one(source: str | Path, **options: Any) -> Page:
    (page,) = read(source, **options)
    assert isinstance(page, Page), page
    return page


def failure(source: str | Path, **options: Any) -> PageFailure:
    """Returns the single failure from reading `source` followed by a page that can be read."""
    (found,) = [item for item in read(source, GOOD, **options) if isinstance(item, PageFailure)]
    return found


def same(image: Image.Image, expected: Any) -> None:
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


GOOD = Path(__file__).parents[1] / "data" / "invoice.png"


def png(width: int, height: int, rows: int = 0, data: bytes = b"", interlaced: int = 0) -> bytes:
    """Returns a PNG that claims width x height grey pixels but contains only `rows` black rows, or `data`."""
    return png_of(width, height, idat=zlib.compress(data or bytes(rows * (width + 1))), interlaced=interlaced)


TIFF_PAGES = [
    noise_picture((50, 30), 1),
    text_picture((40, 60)).convert("L"),
    text_picture((64, 64), 2).convert("1"),
    noise_picture((10, 90), 3),
]


def tiff(*pages: Image.Image, **options: Any) -> bytes:
    return encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:], **options)


def jpeg_that_lies(**options: Any) -> bytes:
    """Returns a JPEG whose header claims twice the height of its data."""
    data = bytearray(encoded(noise_picture((64, 64)), "JPEG", **options))
    start = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    struct.pack_into(">H", data, start + 5, 128)
    return bytes(data)
