"""Opening pictures: what comes out upright and RGB, and the message for each that cannot be opened."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from granite4v.clip_projector import load_image
from granite4v.errors import ImageError, ImageWarning

GRADIENT = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_path_bytes_file_pillow_and_array_give_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT)
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), path.open("rb"), image, GRADIENT):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), GRADIENT)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_value(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(np.asarray(load_image(encoded(Image.fromarray(GRADIENT), kind, **options))), GRADIENT)


def test_transparency_falls_on_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    assert [load_image(rgba).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    turned = load_image(encoded(Image.fromarray(GRADIENT), exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(GRADIENT, -1))


def test_a_grey_picture_of_16_bits_is_clipped_with_a_warning() -> None:
    deep = Image.fromarray(np.array([[5, 256, 65535]], dtype=np.uint16))
    with pytest.warns(ImageWarning, match="greyscale with values up to 65535"):
        loaded = load_image(encoded(deep))
    assert [loaded.getpixel((x, 0))[0] for x in range(3)] == [5, 255, 255]


def bomb() -> bytes:
    """A PNG that claims 30,000 x 30,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD = [
    pytest.param(b"", "is empty (0 bytes)", id="no bytes"),
    pytest.param(b"hello, I am text", "is not a picture that Pillow can read", id="text"),
    pytest.param(encoded(Image.fromarray(GRADIENT))[:50], "cannot be read as a picture", id="cut short"),
    pytest.param(bomb(), "decompression bomb", id="bomb"),
    pytest.param(np.zeros((0, 5, 3), np.uint8), "is empty (shape (0, 5, 3))", id="empty array"),
    pytest.param(np.zeros((4, 5, 3), np.float32), "expected uint8", id="float array"),
    pytest.param(12, "is not a picture; give a path", id="number"),
]


@pytest.mark.parametrize("source, message", BAD)
def test_bad_pictures_say_what_is_wrong(source: object, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert message in str(caught.value)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="'.*nowhere.png' cannot be read as a picture: No such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="Is a directory"):
        load_image(tmp_path)
