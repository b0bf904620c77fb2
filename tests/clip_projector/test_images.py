"""Opening images: the result is upright and RGB, and each image that cannot be opened has its message."""

import copy
import hashlib
import io
import os
import pickle
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from granite4v.clip_projector import Image, load_image
from granite4v.clip_projector.files import read_whole
from granite4v.clip_projector.images import MAX_SIDE_PX
from granite4v.errors import ImageError, ImageWarning
from tests.helpers.pictures import noise_picture

GRADIENT = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_path_bytes_file_pillow_and_array_give_the_same_pixels(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(GRADIENT)
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), path.open("rb"), image, GRADIENT):
        loaded = load_image(source)
        assert loaded.pillow.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), GRADIENT)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_value(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(
        np.asarray(load_image(encoded(PIL.Image.fromarray(GRADIENT), kind, **options))), GRADIENT
    )


def test_transparency_falls_on_white() -> None:
    rgba = PIL.Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    assert [load_image(rgba).pillow.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]


def test_exif_orientation_is_applied() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated clockwise by 90 degrees
    turned = load_image(encoded(PIL.Image.fromarray(GRADIENT), exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(GRADIENT, -1))


def exif_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Returns an EXIF block of (tag, type, count, value) entries, as cameras write it."""
    data, offset, body = b"", 8 + 2 + 12 * len(entries) + 4, struct.pack("<H", len(entries))
    for tag, kind, count, value in sorted(entries):
        where = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", offset + len(data))
        data += value if len(value) > 4 else b""
        body += struct.pack("<HHI", tag, kind, count) + where
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + body + bytes(4) + data


def photo(exif: bytes) -> bytes:
    data = encoded(PIL.Image.fromarray(GRADIENT), "JPEG", quality=95)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


TURNED = (0x0112, 3, 1, struct.pack("<H", 6))


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([], id="alone"),
        pytest.param([(0x011A, 2, 3, b"72\0")], id="resolution as text"),
        pytest.param([(0x011A, 10, 1, struct.pack("<ii", -1, 0))], id="negative over zero"),
        pytest.param([(0x011A, 5, 1, struct.pack("<II", 0, 0))], id="zero over zero"),
        pytest.param([(0x010F, 3, 1, struct.pack("<H", 5))], id="maker as number"),
        pytest.param([(0x1001, 99, 1, b"abcd")], id="unknown type"),
        pytest.param([(0x8769, 2, 5, b"abcd\0"), (0x8825, 4, 1, b"\0\xff\xff\xff")], id="other blocks nowhere"),
        pytest.param([(0xC000, 11, 2, struct.pack("<ff", float("nan"), float("inf")))], id="not a number"),
        pytest.param([(0x010F, 2, 4000, b"")], id="value cut off"),
    ],
)
def test_a_photo_is_turned_whatever_else_its_exif_block_holds(entries: list[tuple[int, int, int, bytes]]) -> None:
    upright = load_image(photo(exif_block()))
    turned = load_image(photo(exif_block(TURNED, *entries)))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(upright), -1))


@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(exif_block((0x0112, 2, 2, b"6\0")), id="text"),
        pytest.param(exif_block((0x0112, 3, 1, b"\x09\0")), id="9"),
        pytest.param(exif_block(TURNED)[:17], id="cut short"),
        pytest.param(b"Exif\0\0hello", id="no block"),
        pytest.param(b"Exif\0\0", id="empty"),
    ],
)
def test_an_orientation_that_is_none_leaves_the_photo_as_it_is(exif: bytes) -> None:
    loaded = load_image(photo(exif))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(load_image(photo(exif_block()))))


GREYS = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)


def grey_tiff(values: np.ndarray, photometric: int, bits: int, sample_format: int = 1) -> bytes:
    """Returns a TIFF of greyscale values, stored as they are in memory."""
    height, width = values.shape
    fields = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 200)]
    fields += [(277, 3, 1), (278, 4, height), (279, 4, values.nbytes), (339, 3, sample_format)]
    body = struct.pack("<H", len(fields)) + b"".join(struct.pack("<HHII", tag, kind, 1, n) for tag, kind, n in fields)
    return (b"II*\0\x08\0\0\0" + body).ljust(200, b"\0") + values.tobytes()


@pytest.mark.parametrize(
    ("data", "expected", "says"),
    [
        pytest.param(encoded(PIL.Image.fromarray(GREYS)), [0, 1, 128, 255], None, id="PNG"),
        pytest.param(encoded(PIL.Image.fromarray(GREYS), "TIFF"), [0, 1, 128, 255], None, id="TIFF"),
        pytest.param(grey_tiff(GREYS, 0, 16), [255, 254, 127, 0], None, id="white is zero"),
        pytest.param(grey_tiff(GREYS.astype(">u2").view("<u2"), 1, 16), [0, 1, 128, 255], None, id="bytes alike"),
        pytest.param(encoded(PIL.Image.fromarray(GREYS // 257)), [0, 1, 128, 255], None, id="8 bits in 16"),
        pytest.param(
            grey_tiff(np.array([[0, 0.5, 1]], "<f4"), 1, 32, 3), [0, 128, 255], "floats from 0 to 1,", id="0 to 1"
        ),
        pytest.param(
            grey_tiff(np.array([[-100, 0, 100]], "<f4"), 1, 32, 3), [0, 128, 255], "if -100 were black", id="any floats"
        ),
        pytest.param(
            grey_tiff(np.array([[0, np.nan, np.inf, 200]], "<f4"), 1, 32, 3),
            [0, 0, 0, 200],
            "0 to 200",
            id="not finite",
        ),
        pytest.param(
            grey_tiff(np.array([[0, 32896, 65535]], "<i4"), 1, 32, 2), [0, 128, 255], "large integers", id="32 bits"
        ),
        pytest.param(
            grey_tiff(np.array([[-500, 0, 500]], "<i2"), 1, 16, 2), [0, 128, 255], "from -500 to 500", id="signed"
        ),
    ],
)
def test_deep_greys_are_scaled_to_what_a_person_sees(data: bytes, expected: list[int], says: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_image(data)
    np.testing.assert_array_equal(np.asarray(loaded)[0, :, 0], expected)
    messages = [str(item.message) for item in caught if issubclass(item.category, ImageWarning)]
    assert len(messages) == (says is not None)
    assert says is None or says in messages[0]


def test_clear_pixels_of_deep_greys_fall_on_white() -> None:
    data = encoded(PIL.Image.fromarray(GREYS), transparency=257)
    np.testing.assert_array_equal(np.asarray(load_image(data))[0, :, 0], [0, 255, 128, 255])


def test_for_the_reference_deep_greys_are_cut_off_as_it_does() -> None:
    deep = PIL.Image.fromarray(np.array([[5, 256, 65535]], dtype=np.uint16))
    with pytest.warns(ImageWarning, match="greyscale with values up to 65535; those above 255 are read as white"):
        loaded = load_image(encoded(deep), as_reference=True)
    assert [loaded.pillow.getpixel((x, 0))[0] for x in range(3)] == [5, 255, 255]


def test_a_tiff_with_more_pages_says_how_many_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pages = [PIL.Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in range(3)]
    path.write_bytes(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    with pytest.warns(
        ImageWarning, match="a.tif' has 3 pages, of which only the first is read; 'granite4v extract' reads"
    ):
        assert load_image(path).pillow.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_says_that_only_its_first_frame_is_read(kind: str, tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 100, 200)]
    path = tmp_path / "a"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    with pytest.warns(ImageWarning, match="a' is animated; only its first frame is read"):
        assert load_image(path).pillow.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_a_single_frame_is_not_warned_of(kind: str) -> None:
    data = encoded(PIL.Image.new("RGB", (4, 4)), kind, **({} if kind == "TIFF" else {"save_all": True}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(data)


def bomb() -> bytes:
    """Returns a PNG that claims 30,000 x 30,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD = [
    pytest.param(b"", "is empty (0 bytes)", id="no bytes"),
    pytest.param(b"hello, I am text", "holds text, which Pillow cannot read here; give a PNG", id="text"),
    pytest.param(encoded(PIL.Image.fromarray(GRADIENT))[:50], "cannot be read as an image", id="cut short"),
    pytest.param(bomb(), "decompression bomb", id="bomb"),
    pytest.param(encoded(PIL.Image.new("1", (1_000_001, 1))), "has 1,000,001x1 pixels, and a side may", id="a line"),
    pytest.param(PIL.Image.new("RGB", (1, 2_000_000)), "has 1x2,000,000 pixels, and a side may", id="a column"),
    pytest.param(np.zeros((0, 5, 3), np.uint8), "is empty (shape (0, 5, 3))", id="empty array"),
    pytest.param(np.zeros((4, 5, 3), np.float32), "expected uint8", id="float array"),
    pytest.param(b"\x89\x01\xfe" * 99, "is not an image that Pillow can read; give a PNG", id="noise"),
    pytest.param(b"%PDF-1.7 ...", "is a PDF, not an image; 'granite4v extract' reads PDFs, page by page.", id="PDF"),
    pytest.param(b"\0\0\0\x18ftypheic" + bytes(99), "holds a HEIC (HEIF) image, which Pillow cannot", id="HEIC"),
    pytest.param(12, "is not an image; give a path", id="number"),
]


def test_a_long_strip_is_an_image() -> None:
    assert load_image(PIL.Image.new("L", (MAX_SIDE_PX, 1))).size == (MAX_SIDE_PX, 1)


@pytest.mark.parametrize("source, message", BAD)
def test_bad_pictures_say_what_is_wrong(source: object, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert message in str(caught.value)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="'.*nowhere.png' cannot be read as an image: No such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="Is a directory"):
        load_image(tmp_path)


@pytest.mark.parametrize("source", ["https://example.org/a.png", Path("https://example.org/a.png")])
def test_a_url_is_told_apart_and_shown_as_it_was_given(source: str | Path) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert str(caught.value) == (
        "'https://example.org/a.png' is a URL, which is not supported; download the file and give its path."
    )


@pytest.mark.parametrize(
    "error", [MemoryError(), struct.error("short"), KeyError("tag"), RecursionError(), zlib.error()]
)
def test_whatever_a_decoder_raises_is_an_error_of_the_image(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: PIL.Image.Image) -> None:
        raise error

    monkeypatch.setattr(PIL.Image.Image, "load", fail)
    with pytest.raises(ImageError, match="the image"):
        load_image(GRADIENT)


def test_what_is_no_file_and_what_has_no_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="'/dev/zero' cannot be read as an image: it is a device or a socket"):
        load_image("/dev/zero")
    path = tmp_path / "a.png"
    path.write_bytes(encoded(PIL.Image.fromarray(GRADIENT)))
    size = path.stat().st_size
    with pytest.raises(OSError, match=f"it has {size} bytes, and at most 9 are read"):
        read_whole(path, 9)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is a pipe into which nothing came for 0.1 s"):
        read_whole(pipe, pipe_s=0.1)


@pytest.mark.parametrize(("path", "name"), [("a\x1b[31m\n.png", r"a\x1b[31m\n.png"), ("\ud800.png", r"\ud800.png")])
def test_names_of_files_move_no_cursor(path: str, name: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"'{name}' ")


def test_the_digest_tells_pixels_and_shape_apart_and_nothing_else() -> None:
    picture = noise_picture((6, 4))
    grey = picture.convert("L")
    assert load_image(picture).digest == load_image(encoded(picture)).digest == load_image(np.asarray(picture)).digest
    assert load_image(grey).digest == load_image(grey.convert("RGB")).digest
    others = [picture, grey, noise_picture((6, 4), 1), noise_picture((4, 6))]  # the last has the first one's bytes
    assert len({load_image(other).digest for other in others}) == len(others)


def test_the_digest_is_that_of_the_records_of_earlier_versions() -> None:
    """SHA-256 of "((3, 1), 'RGB')" and nine bytes, computed by hand: records and stored pages are recognized by it."""
    expected = hashlib.sha256(b"((3, 1), 'RGB')" + bytes(range(9))).digest()
    assert load_image(np.arange(9, dtype=np.uint8).reshape(1, 3, 3)).digest == expected
    assert Image.from_pixels((3, 1), bytearray(range(9))).digest == expected


def test_an_image_is_opened_once_and_then_passed_along() -> None:
    picture = PIL.Image.fromarray(GRADIENT)
    image = load_image(picture)
    assert load_image(image) is image and image.size == (9, 6) and repr(image) == "Image(9x6)"
    picture.putpixel((0, 0), (9, 9, 9))
    np.testing.assert_array_equal(np.asarray(image), GRADIENT)  # a copy: later changes of the source do not affect it
    for copied in (copy.copy(image), copy.deepcopy(image), pickle.loads(pickle.dumps(image))):
        assert copied.digest == image.digest
        np.testing.assert_array_equal(np.asarray(copied), GRADIENT)
    with pytest.raises(ValueError, match="the image has mode L; expected RGB"):
        Image(PIL.Image.new("L", (1, 1)))


def test_threads_that_ask_for_a_digest_at_once_hash_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    tobytes = PIL.Image.Image.tobytes

    def counted(image: PIL.Image.Image, *arguments: object) -> bytes:
        data = tobytes(image, *arguments)
        hashed.append(data)
        time.sleep(0.01)  # so that the other threads arrive meanwhile
        return data

    image = load_image(GRADIENT)
    monkeypatch.setattr(PIL.Image.Image, "tobytes", counted)
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: image.digest, range(8)))
    assert len(digests) == 1 and len(hashed) == 1
