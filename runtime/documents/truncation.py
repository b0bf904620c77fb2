"""Detects truncated images: Pillow's decoders fill missing rows silently."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL.Image import Image

from granite4v.errors import ImageError

_PNG = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # PNG 8.2
_INFLATE_BYTES = 1 << 20
_HEIGHT, _ROWS_PER_STRIP, _STRIP_OFFSETS, _PLANAR = 257, 278, 273, 284  # TIFF tags
_SEPARATE_PLANES = 2
_FILLING = 128  # the grey that libjpeg puts where a JPEG has no data
_FILLED_PX = 8  # the side of JPEG's blocks


def check_png(content: Path | bytes, name: str) -> None:
    """Raises ImageError for a PNG with less pixel data than its size needs; files of other formats pass.

    Pillow must have opened the PNG, so that its header is valid.
    """
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if file.read(len(_PNG)) != _PNG:
            return
        _, _, width, height, depth, colours, _, _, interlaced = struct.unpack(">I4sIIBBBBB", file.read(21))
        bits = depth * _CHANNELS[colours]
        passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
        # each row has a filter byte before its pixels: 100 x 50 pixels of 24 bits need 50 * (1 + 300) = 15,050 bytes
        needed = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
        file.seek(len(_PNG))
        found = _inflated_bytes(file, needed)
    if found < needed:
        raise ImageError(
            f"{name} declares {width:,} x {height:,} pixels, but contains {found:,} of {needed:,} bytes of pixel data; "
            "get a complete copy."
        )


def _inflated_bytes(file: BinaryIO, enough: int) -> int:
    """Returns how many bytes the pixel data from here on inflate to, counted up to `enough`."""
    inflate = zlib.decompressobj()
    found = 0
    while found < enough and len(head := file.read(8)) == 8:
        n_bytes, kind = struct.unpack(">I4s", head)
        if kind != b"IDAT":
            file.seek(n_bytes + 4, 1)
            continue
        data = file.read(n_bytes)
        file.seek(4, 1)
        while data and found < enough and not inflate.eof:
            try:  # inflate no byte beyond the rows: damage after them does no harm
                found += len(inflate.decompress(data, min(_INFLATE_BYTES, enough - found)))
            except zlib.error:
                return found
            data = inflate.unconsumed_tail
    return found


def check_tiff(image: Image, name: str) -> None:
    """Raises ImageError for a TIFF page with fewer strips than its height needs."""
    tags = image.tag_v2  # type: ignore[attr-defined]  # of TIFF alone
    height, rows, offsets = tags.get(_HEIGHT), tags.get(_ROWS_PER_STRIP), tags.get(_STRIP_OFFSETS)
    if not isinstance(height, int) or not isinstance(rows, int) or not isinstance(offsets, tuple) or rows < 1:
        return  # in tiles, or all in one strip
    planes = len(image.getbands()) if tags.get(_PLANAR) == _SEPARATE_PLANES else 1
    needed = -(-height // rows) * planes
    if len(offsets) < needed:
        raise ImageError(
            f"{name} declares a height of {height:,} pixels, but contains {len(offsets):,} of {needed:,} strips; get "
            "a complete copy."
        )


def looks_filled(image: Image) -> bool:
    """Whether an RGB image from a JPEG has a uniform grey edge, with which libjpeg fills in for missing data."""
    width, height = image.size
    edges = (  # all four: the image may have been rotated upright since
        (0, height - _FILLED_PX, width, height),
        (0, 0, width, _FILLED_PX),
        (width - _FILLED_PX, 0, width, height),
        (0, 0, _FILLED_PX, height),
    )
    even = ((_FILLING, _FILLING),) * 3
    return min(image.size) > _FILLED_PX and any(image.crop(edge).getextrema() == even for edge in edges)
