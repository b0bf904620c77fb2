"""Image files of every format that Pillow writes, damaged at the structures of their formats and anywhere else."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, features

from .. import edits, samples
from ..case import Case, Result
from ..product import command_line
from ..records import problems, records

name = "images"
GOOD = "zz-good.png"  # read last
run = command_line
Edit = Callable[[random.Random, bytes], tuple[bytes, str]]


def prepare(bases: Path) -> None:
    """Does nothing: images are made in each case."""


def build(rng: random.Random, bases: Path, folder: Path) -> Case:
    samples.write_page(folder / GOOD)
    case = Case()
    names = []
    for i in range(rng.choice((1, 2, 4))):
        data, suffix, what = _image(rng)
        names.append(f"{i}{suffix if rng.random() < 0.95 else rng.choice(('', '.png', '.pdf', '.jpg', '.txt'))}")
        (folder / names[-1]).write_bytes(data)
        case.edits.append(f"{names[-1]}: {what}")
    if rng.random() < 0.25:
        case.commands.append(["ask", names[0], "Total?", "--max-tokens", "1", "--threads", "1"])
    else:
        options = ["--prompt", "what?", "--max-tokens", "30", "--threads", "1", "--out", "out"]
        options += rng.choice(([], [], ["--report"], ["--crop", "0,0,1,1"], ["--pages", "1"]))
        case.commands.append(["extract", *names, GOOD, *options])
    return case


def check(folder: Path, case: Case, results: list[Result]) -> list[str]:
    """Checks that the good image is read, whatever the others are."""
    if case.commands[0][0] != "extract":
        return []
    out = folder / "out"
    good = [record for record in records(out) if record["source"].endswith(GOOD)]
    if len(good) != 1 or good[0]["error"] or good[0]["finish_reason"] is None:
        return [f"the good image is not read: {[record.get('error') for record in good]}", *problems(out)]
    return problems(out)


# --- images ---


def _image(rng: random.Random) -> tuple[bytes, str, str]:
    """Returns a file, its suffix, and its edits in words."""
    suffix, data, what = _sound(rng)
    done = [what]
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        edit = rng.choice([*_JOINTS.get(suffix, []), edits.edit_bytes] if rng.random() < 0.8 else [edits.edit_bytes])
        try:
            data, what = edit(rng, data)
        except (struct.error, IndexError, ValueError, zlib.error):  # an earlier edit broke the structure
            data, what = edits.edit_bytes(rng, data)
        done.append(what)
    return data, suffix, "; ".join(done)


def _sound(rng: random.Random) -> tuple[str, bytes, str]:
    size = rng.choice(((1, 1), (17, 9), (64, 48), (200, 31), (128, 128)))
    image = samples.page_image(size)
    writers: list[tuple[str, str, tuple[str, ...], list[dict[str, Any]]]] = [
        (".png", "PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"), [{}, {"compress_level": 0},
            {"dpi": (72, 72)}]),
        (".jpg", "JPEG", ("L", "RGB", "CMYK"), [{}, {"progressive": True}, {"quality": 30}]),
        (".gif", "GIF", ("L", "P"), [{}, {"save_all": True, "append_images": [image.convert("P")] * 2}]),
        (".bmp", "BMP", ("1", "L", "P", "RGB", "RGBA"), [{}]),
        (".tif", "TIFF", ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"), [
            {}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "packbits"},
            {"compression": "jpeg"}, {"compression": "group4"}, {"save_all": True, "append_images": [image] * 2},
        ]),
        (".webp", "WEBP", ("RGB", "RGBA"), [{}, {"lossless": True}]),
    ]  # fmt: skip
    if features.check("avif"):
        writers.append((".avif", "AVIF", ("RGB",), [{"speed": 10}]))
    if features.check("jpg_2000"):
        writers.append((".jp2", "JPEG2000", ("L", "RGB"), [{}]))
    suffix, file_format, modes, choices = rng.choice(writers)
    mode, options = rng.choice(modes), dict(rng.choice(choices))
    exif = _exif(rng) if rng.random() < 0.3 and suffix in (".png", ".jpg", ".webp") else b""
    if exif:
        options["exif"] = exif
    buffer = io.BytesIO()
    try:
        _in_mode(image, mode).save(buffer, file_format, **options)
    except (OSError, ValueError, KeyError, TypeError, struct.error):  # this mode is not possible with these options
        buffer = io.BytesIO()
        image.save(buffer, file_format)
        options = {}
    shown = {key: value for key, value in options.items() if key not in ("exif", "append_images")}
    return suffix, buffer.getvalue(), f"{mode} {size} {shown or ''}{' EXIF' if exif else ''}"


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return image.convert("I").point(lambda value: value * 256).convert("I;16")
    return image.convert(mode)


def _exif(rng: random.Random) -> bytes:
    """Returns an EXIF block with entries of any type, count and value under known and unknown tags."""
    order = rng.choice("<>")
    tags = (0x0112, 0x011A, 0x011B, 0x0128, 0x8769, 0x8825, 0xA005, 0x0100, 0x010E, 0x9003, 0x014A, 0x8773, 0x02BC)
    entries = []
    for _ in range(rng.choice((1, 1, 2, 5))):
        tag = rng.choice((0x0112, *tags, rng.getrandbits(16)))
        kind, count = rng.choice((*range(14), 16, 255)), rng.choice((0, 1, 1, 1, 2, 8, 2**31, 2**32 - 1))
        value = rng.choice((bytes(4), rng.randbytes(4), struct.pack(order + "I", edits.number(rng) & 0xFFFFFFFF)))
        value = struct.pack(order + "HH", rng.randrange(10), 0) if rng.random() < 0.3 else value
        entries.append(struct.pack(order + "HHI", tag, kind, count) + value)
    n = rng.choice((len(entries), len(entries), len(entries) + 1, 0xFFFF))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", rng.choice((8, 8, 8, 0, 7, 4000)))
    tail = struct.pack(order + "I", rng.choice((0, 0, 8, 0xFFFFFFFF))) + rng.randbytes(rng.choice((0, 40)))
    return rng.choice((b"Exif\0\0", b"Exif\0\0", b"")) + head + struct.pack(order + "H", n) + b"".join(entries) + tail


# --- edits of the formats' structures ---


_PNG_CHUNKS = (
    *b"tEXt zTXt iTXt iCCP eXIf pHYs tRNS PLTE acTL fcTL fdAT gAMA cHRM sBIT IDAT IEND zzZz".split(),
    b"\0\0\0\0",
)


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(data):
        n = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + n]))
        at += 12 + n
    return chunks


def _edit_png(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Edits a chunk and updates its checksum."""
    chunks = _png_chunks(data)
    i = rng.randrange(len(chunks))
    kind, body = chunks[i]
    shown = kind.decode("latin-1")
    choice = rng.randrange(8)
    if choice == 0:
        del chunks[i]
        what = f"{shown} removed"
    elif choice == 1:
        chunks.insert(rng.randrange(len(chunks) + 1), (kind, body))
        what = f"{shown} again"
    elif choice == 2:
        rng.shuffle(chunks)
        what = "chunks shuffled"
    elif choice == 3:
        new = rng.choice(_PNG_CHUNKS)
        new_body = rng.choice(
            (b"", rng.randbytes(rng.randint(1, 40)), b"a\0\0" + zlib.compress(bytes(rng.choice((9, 9**7)))))
        )
        chunks.insert(rng.randrange(1, len(chunks) + 1), (new, new_body))
        what = f"{new!r} of {len(new_body)} bytes"
    elif choice == 4 and any(kind == b"IDAT" for kind, _ in chunks):
        at = next(i for i, (kind, _) in enumerate(chunks) if kind == b"IDAT")
        pixels = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
        pixels = rng.choice((pixels[: len(pixels) // 2], pixels * 2, b"\x07" * len(pixels), bytes(50_000_000), b""))
        chunks[at] = (b"IDAT", zlib.compress(pixels, 1))
        what = f"{len(pixels)} bytes of pixels"
    elif choice == 5 and chunks[0][0] == b"IHDR" and len(chunks[0][1]) == 13:
        fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
        at = rng.randrange(7)
        fields[at] = edits.number(rng) & (0xFFFFFFFF if at < 2 else 0xFF)
        if rng.random() < 0.5 and at >= 2:
            fields[at] = rng.randrange(20)
        chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *fields))
        what = f"IHDR {fields}"
    else:
        body, what = edits.edit_bytes(rng, body) if body else (rng.randbytes(3), "3 bytes")
        chunks[i] = (kind, body)
        what = f"{shown}: {what}"
    parts = [data[:8]]
    for kind, body in chunks:
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts), what


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields where each marker begins and where its segment ends, up to the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        end = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        yield at, end
        if data[at + 1] == 0xDA:
            return
        at = end


def _edit_jpeg(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    begin, end = rng.choice(list(_jpeg_segments(data)))
    marker, body = data[begin + 1], data[begin + 4 : end]
    choice = rng.randrange(5)
    if choice == 0:
        return data[:begin] + data[end:], f"marker {marker:02x} removed"
    if choice == 1:
        return data[:end] + data[begin:end] * rng.choice((1, 1, 300)) + data[end:], f"marker {marker:02x} again"
    if choice == 2:
        new = rng.choice(
            (0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xCC, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE)
        )
        return data[: begin + 1] + bytes([new]) + data[begin + 2 :], f"marker {marker:02x} is {new:02x}"
    if choice == 3 and marker in (0xC0, 0xC1, 0xC2) and len(body) >= 6:
        fields = list(struct.unpack(">BHHB", body[:6]))
        at = rng.randrange(4)
        fields[at] = edits.number(rng) & (0xFFFF if at in (1, 2) else 0xFF)
        return data[: begin + 4] + struct.pack(">BHHB", *fields) + data[begin + 10 :], f"frame {fields}"
    body, what = edits.edit_bytes(rng, body) if body else (b"\0", "a byte")
    segment = data[begin : begin + 2] + struct.pack(">H", min(0xFFFF, len(body) + 2)) + body
    return data[:begin] + segment + data[end:], f"marker {marker:02x}: {what}"


def _edit_tiff(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Edits an entry of the first directory, its number of entries, or the offset of the next directory."""
    order = "<" if data[:2] == b"II" else ">"
    at = struct.unpack(order + "I", data[4:8])[0]
    n = struct.unpack(order + "H", data[at : at + 2])[0]
    choice = rng.randrange(8)
    if choice == 0:
        new = rng.choice((0, n - 1, n + 1, 0xFFFF)) & 0xFFFF
        return data[:at] + struct.pack(order + "H", new) + data[at + 2 :], f"{new} entries instead of {n}"
    if choice == 1:
        end = at + 2 + 12 * n
        new = rng.choice((at, 8, len(data), 0xFFFFFFFF, rng.randrange(len(data))))
        return data[:end] + struct.pack(order + "I", new) + data[end + 4 :], f"next directory at {new}"
    entry = at + 2 + 12 * rng.randrange(n)
    tag, kind, count, value = struct.unpack(order + "HHII", data[entry : entry + 12])
    fields = [tag, kind, count, value]
    where = rng.choice((0, 1, 2, 3, 3, 3))
    limit = 0xFFFF if where < 2 else 0xFFFFFFFF
    usual = rng.choice((rng.randrange(20), 256 + rng.randrange(80), fields[where] + 1, fields[where] * 2))
    fields[where] = rng.choice((usual, edits.number(rng))) & limit
    return data[:entry] + struct.pack(order + "HHII", *fields) + data[entry + 12 :], f"tag {tag}: {fields}"


def _edit_boxes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Edits a box of AVIF or JPEG 2000: its size, its type, or its contents with the size adjusted."""
    boxes, at = [], 0
    containers = (b"meta", b"iprp", b"ipco", b"jp2h", b"moov")
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        if size < 8:
            break
        boxes.append((at, size, kind))
        at += 12 if kind == b"meta" else 8 if kind in containers else size
    at, size, kind = rng.choice(boxes)
    shown = kind.decode("latin-1")
    choice = rng.randrange(4)
    if choice == 0:
        new = rng.choice((0, 1, 7, size - 1, size + 1, edits.number(rng) & 0xFFFFFFFF))
        return data[:at] + struct.pack(">I", new) + data[at + 4 :], f"{shown} of size {new}"
    if choice == 1:
        new_kind = rng.choice(boxes)[2]
        return data[: at + 4] + new_kind + data[at + 8 :], f"{shown} is {new_kind!r}"
    if choice == 2:
        return data[: at + size] + data[at : at + size] + data[at + size :], f"{shown} again"
    body, what = edits.edit_bytes(rng, data[at + 8 : at + size] or b"\0")
    return data[:at] + struct.pack(">I", len(body) + 8) + kind + body + data[at + size :], f"{shown}: {what}"


def _edit_riff(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    chunks, at = [], 12
    while at + 8 <= len(data):
        n = struct.unpack("<I", data[at + 4 : at + 8])[0]
        chunks.append((at, n))
        at += 8 + n + n % 2
    at, n = rng.choice(chunks)
    shown = data[at : at + 4].decode("latin-1")
    choice = rng.randrange(4)
    if choice == 0:
        new = rng.choice((0, n - 1, n + 1, edits.number(rng))) & 0xFFFFFFFF
        return data[: at + 4] + struct.pack("<I", new) + data[at + 8 :], f"{shown} of {new} bytes"
    if choice == 1:
        kind = rng.choice((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"ICCP", b"XMP ", b"zzzz"))
        return data[:at] + kind + data[at + 4 :], f"{shown} is {kind!r}"
    body, what = edits.edit_bytes(rng, data[at + 8 : at + 8 + n] or b"\0")
    body += bytes(len(body) % 2)
    new = data[12:at] + data[at : at + 4] + struct.pack("<I", len(body)) + body + data[at + 8 + n + n % 2 :]
    return b"RIFF" + struct.pack("<I", len(new) + 4) + b"WEBP" + new, f"{shown}: {what}"


def _edit_head(fields: dict[int, int]) -> Edit:
    """Returns an edit of fields at fixed offsets: {offset: number of bytes}, little endian."""

    def edit(rng: random.Random, data: bytes) -> tuple[bytes, str]:
        at = rng.choice(list(fields))
        n = fields[at]
        value = rng.choice((edits.number(rng), rng.randrange(40)))
        return data[:at] + (value & ((1 << 8 * n) - 1)).to_bytes(n, "little") + data[at + n :], f"{value} at {at}"

    return edit


_JOINTS: dict[str, list[Edit]] = {
    ".png": [_edit_png, _edit_png],
    ".jpg": [_edit_jpeg, _edit_jpeg],
    ".tif": [_edit_tiff, _edit_tiff],
    ".webp": [_edit_riff],
    ".avif": [_edit_boxes],
    ".jp2": [_edit_boxes],
    ".bmp": [_edit_head({2: 4, 10: 4, 14: 4, 18: 4, 22: 4, 26: 2, 28: 2, 30: 4, 34: 4, 46: 4, 50: 4})],
    ".gif": [_edit_head({6: 2, 8: 2, 10: 1, 11: 1, 12: 1})],
}
