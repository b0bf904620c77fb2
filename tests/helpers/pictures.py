"""Test images, drawn with Pillow and the same on every run."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# (width, height) in pixels: degenerate, off by one from a tile, very wide and tall, screens and pages.
SIZES: tuple[tuple[int, int], ...] = (
    (1, 1),
    (2, 3),
    (37, 911),
    (100, 1000),
    (1000, 100),
    (383, 385),
    (384, 384),
    (640, 480),
    (800, 600),
    (435, 2174),
    (1080, 2400),
    (1700, 2200),
    (2200, 1700),
    (3000, 500),
)
SMALL_SIZES = (*SIZES[:2], (64, 64), (63, 65), (300, 200), (70, 350))  # for 64-pixel tiles

LINES = (
    "INVOICE 2024-00317",
    "Item            Qty   Price   Amount",
    "Paper A4, 500     4    6.20    24.80",
    "Toner, black      2   81.50   163.00",
    "Shipping          1    9.90     9.90",
    "Total                         197.70",
)
EXIF_ORIENTATION = 0x0112


def text_picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Draws dark text and ruled lines on white, RGB."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    height_px = max(8, min(size) // 24)
    font = ImageFont.load_default(height_px)
    for i, top in enumerate(range(0, size[1], 2 * height_px)):
        ink = tuple(int(value) for value in rng.integers(0, 120, 3))
        pen.text((height_px, top), LINES[(i + seed) % len(LINES)], fill=ink, font=font)
        if i % 3 == 0:
            pen.line((0, top, size[0], top), fill="gray", width=max(1, height_px // 8))
    return image


def noise_picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Draws every pixel independently, RGB, so that a misplaced tile cannot go unnoticed."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def blank_picture(size: tuple[int, int]) -> Image.Image:
    """Draws a white image: all tiles without padding are equal."""
    return Image.new("RGB", size, "white")


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """Returns the image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, *, idat: bytes, interlaced: int = 0) -> bytes:
    """Returns a PNG that claims width x height grey 8-bit pixels and contains `idat`, which should be zlib data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def odd_files(size: tuple[int, int] = (150, 100)) -> dict[str, bytes]:
    """Returns image files of other kinds than 8-bit RGB, by name."""
    colour, text = noise_picture(size, 3), text_picture(size, 4)
    alpha = Image.fromarray(np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[1], size[0]))
    rgba = colour.copy()
    rgba.putalpha(alpha)
    grey_alpha = text.convert("L")
    grey_alpha.putalpha(alpha)
    ramp = np.random.default_rng(5).integers(0, 1 << 16, (size[1], size[0]), dtype=np.uint16)
    files = {
        "grey": encoded(text.convert("L")),
        "bilevel": encoded(text.convert("1")),
        "palette": encoded(colour.convert("P", palette=Image.Palette.ADAPTIVE)),
        "palette-transparent": encoded(text.quantize(16), transparency=0),
        "rgba": encoded(rgba),
        "grey-alpha": encoded(grey_alpha),
        "16-bit": encoded(Image.fromarray(ramp)),
        "cmyk": encoded(colour.convert("CMYK"), "JPEG", quality=90),
        "webp": encoded(colour, "WEBP", lossless=True),
        "tiff": encoded(colour, "TIFF", compression="tiff_lzw"),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        files[f"exif-{orientation}"] = encoded(colour, "JPEG", quality=95, exif=exif)
    return files
