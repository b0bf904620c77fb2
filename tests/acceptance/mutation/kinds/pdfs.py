"""PDFs damaged in their objects, in their content streams, and in any bytes."""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pikepdf
from pikepdf import Array, Dictionary, Name, Stream, String

from .. import edits, pdf_samples, samples
from ..case import Case, Result
from ..product import command_line
from ..records import problems, records

name = "pdfs"
GOOD = "zz-good.png"  # read last
BASES = "pdfs"
run = command_line


def prepare(bases: Path) -> None:
    folder = bases / BASES
    folder.mkdir(exist_ok=True)
    packed = pikepdf.ObjectStreamMode.generate
    for maker in (pdf_samples.plain, pdf_samples.scan, pdf_samples.rich):
        pdf = maker()
        pdf.save(folder / f"{maker.__name__}.pdf", compress_streams=False, static_id=True)
        pdf.save(folder / f"{maker.__name__}-packed.pdf", object_stream_mode=packed, static_id=True)
    pdf_samples.plain().save(folder / "encrypted.pdf", encryption=pikepdf.Encryption(owner="o", user="", R=4))
    pdf_samples.plain().save(folder / "locked.pdf", encryption=pikepdf.Encryption(owner="o", user="secret", R=6))


def build(rng: random.Random, bases: Path, folder: Path) -> Case:
    samples.write_page(folder / GOOD)
    case, names = Case(), []
    for i in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice(sorted((bases / BASES).glob("*.pdf")))
        data, what = _damage(rng, path.read_bytes())
        names.append(f"{i}.pdf" if rng.random() < 0.97 else f"{i}.png")
        (folder / names[-1]).write_bytes(data)
        case.edits.append(f"{names[-1]}: {path.stem}; {what}")
    options = ["--prompt", "what?", "--max-tokens", "30", "--threads", "1", "--out", "out"]
    options += rng.choice(([], [], [], ["--report"], ["--password", "secret"], ["--crop", "0.1,0.1,0.5,0.5"]))
    case.commands.append(["extract", *names, GOOD, *options])
    return case


def check(folder: Path, case: Case, results: list[Result]) -> list[str]:
    """Checks that the good image is read, whatever the others are."""
    out = folder / "out"
    good = [record for record in records(out) if record["source"].endswith(GOOD)]
    if len(good) != 1 or good[0]["error"] or good[0]["finish_reason"] is None:
        return [f"the good image is not read: {[record.get('error') for record in good]}", *problems(out)]
    return problems(out)


# --- damage ---

_STRUCTURE = (
    b"obj endobj stream endstream xref trailer startxref /Length /Size /Kids /Count /Root /Prev %%EOF %PDF- /Type << "
    b">> /Filter R"
).split()
_KEYS = [
    "Parent",
    "Kids",
    "Next",
    "Prev",
    "Resources",
    "SMask",
    "Length",
    "Filter",
    "DecodeParms",
    "Matrix",
    "Decode",
    "Mask",
    "UserUnit",
    "MediaBox",
    "Group",
    "OC",
]
_FILTERS = [
    "FlateDecode",
    "LZWDecode",
    "ASCII85Decode",
    "ASCIIHexDecode",
    "RunLengthDecode",
    "DCTDecode",
    "JPXDecode",
    "JBIG2Decode",
    "CCITTFaxDecode",
]
_NAMES = [
    *_FILTERS,
    *[
        "Crypt",
        "DeviceN",
        "Indexed",
        "ICCBased",
        "Lab",
        "CalRGB",
        "Pattern",
        "Type0",
        "TrueType",
        "CIDFontType2",
        "Type3",
        "MMType1",
        "None",
        "Identity-H",
    ],
    *["Form", "Image", "PS", "Page", "Pages", "Catalog", "ObjStm"],
]
_OPERATORS = (b"q Q cm Do Tf Tj BT ET re f W n S sh gs scn cs c d w BI EI Tr Tz BDC EMC d1 { } exch roll").split()


def _damage(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    kind = rng.random()
    if kind < 0.3:
        return edits.edit_bytes(rng, data)
    if kind < 0.4:
        return _edit_text(rng, data)
    try:
        return _edit_objects(rng, data)
    except Exception:  # pikepdf refuses some edits with errors of many types
        return edits.edit_bytes(rng, data)


def _edit_text(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Edits a keyword of a file's structure, or inserts something after it."""
    there = [word for word in _STRUCTURE if word in data]
    word = rng.choice(there)
    at = rng.choice([i for i in range(len(data)) if data.startswith(word, i)])
    end = at + len(word)
    other = rng.choice(
        (b"", rng.choice(_STRUCTURE), b" 0 R ", b" 99999999999 ", b"-1", b"[" * 400, b"<<" * 400, rng.randbytes(4))
    )
    choice = rng.randrange(3)
    if choice == 0:
        return data[:at] + other + data[end:], f"{word!r} at {at} is {other[:20]!r}"
    if choice == 1:
        return data[:end] + other + data[end:], f"{other[:20]!r} behind {word!r} at {at}"
    number = str(edits.number(rng)).encode()
    return data[:end] + b" " + number + b" " + data[end:], f"{number!r} behind {word!r} at {at}"


def _edit_objects(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    with _open(data) as pdf:
        done = [
            rng.choice((_edit_member, _edit_member, _edit_stream))(rng, pdf) for _ in range(rng.choice((1, 1, 2, 4)))
        ]
        buffer = io.BytesIO()
        modes = pikepdf.ObjectStreamMode
        mode = rng.choice((modes.preserve, modes.disable, modes.generate))
        pdf.save(buffer, static_id=True, object_stream_mode=mode, compress_streams=rng.random() < 0.3)
    return buffer.getvalue(), "; ".join(done)


def _open(data: bytes) -> pikepdf.Pdf:
    try:
        return pikepdf.open(io.BytesIO(data))
    except pikepdf.PasswordError:
        return pikepdf.open(io.BytesIO(data), password="secret")


def _edit_member(rng: random.Random, pdf: pikepdf.Pdf) -> str:
    """Replaces, removes or adds a member of a dictionary or an array, anywhere in the file."""
    holder, path = _holder(rng, pdf)
    keys: list[Any] = sorted(holder.keys()) if not isinstance(holder, Array) else list(range(len(holder)))
    if not keys:
        return "an empty holder"
    key = rng.choice(keys)
    choice = rng.random()
    if choice < 0.12:
        del holder[key]
        return f"{path}[{key}] removed"
    if choice < 0.22:
        other, _ = _holder(rng, pdf)
        new = Name("/" + rng.choice(_KEYS))
        if not isinstance(holder, Array):
            holder[new] = _odd_object(rng, pdf, other)
            return f"{path}[{new}] added"
    other, where = _holder(rng, pdf)
    holder[key] = value = _odd_object(rng, pdf, other)
    return f"{path}[{key}] = {value!r:.60}".replace("\n", " ") + f" (or {where})" * (value is other)


def _holder(rng: random.Random, pdf: pikepdf.Pdf) -> tuple[Any, str]:
    objects = [found for found in pdf.objects if isinstance(found, Dictionary | Array | Stream)]
    found: Any = rng.choice([pdf.Root, pdf.pages[rng.randrange(len(pdf.pages))].obj, *objects])
    path = f"{found.objgen[0]}" if found.is_indirect else "?"
    while True:
        members = (
            sorted(found.items(), key=lambda item: item[0]) if not isinstance(found, Array) else list(enumerate(found))
        )
        below = [
            (key, value)
            for key, value in members
            if isinstance(value, Dictionary | Array | Stream) and key != "/Parent"
        ]
        if not below or rng.random() < 0.4:
            return found, path
        key, found = rng.choice(below)
        path += f"[{key}]"


def _odd_object(rng: random.Random, pdf: pikepdf.Pdf, other: Any) -> Any:
    numbers: list[Callable[[], Any]] = [
        lambda: rng.randint(-3, 40),
        lambda: max(-(2**31), min(2**31 - 1, edits.number(rng))),
        lambda: rng.choice((0.0, -0.5, 1e-6, 14400.5, 99999999.0)),
    ]
    others: list[Callable[[], Any]] = [
        lambda: other,
        lambda: pdf.make_indirect(other) if not other.is_indirect else other,
        lambda: Name("/" + rng.choice(_NAMES)),
        lambda: String(edits.text(rng).encode("utf-8", "replace").decode()),
        lambda: Array([rng.choice(numbers)() for _ in range(rng.choice((0, 1, 3, 4, 6, 300)))]),
        lambda: Dictionary(),
        lambda: Array([other]),
        lambda: bool(rng.randrange(2)),
        lambda: Stream(pdf, rng.choice((b"", rng.randbytes(50), b"q " * 5000, b"/X Do " * 50))),
        lambda: Array([Name.Indexed, Name.DeviceRGB, 255, String("abc")]),
    ]
    return rng.choice([*numbers * 3, *others])()


def _edit_stream(rng: random.Random, pdf: pikepdf.Pdf) -> str:
    streams = [found for found in pdf.objects if isinstance(found, Stream)]
    if not streams:
        return "no stream"
    stream = rng.choice(streams)
    try:
        data = stream.read_bytes()
    except pikepdf.PdfError:
        data = stream.read_raw_bytes()
    choice = rng.randrange(4)
    if choice == 0:
        data, what = _edit_operators(rng, data)
        stream.write(data)
    elif choice == 1:
        data, what = edits.edit_bytes(rng, data)
        stream.write(data)
    elif choice == 2:
        data, what = edits.edit_bytes(rng, zlib.compress(data))
        stream.write(
            data, filter=Name.FlateDecode, decode_parms=rng.choice((None, Dictionary(Predictor=15, Columns=7)))
        )
        what = f"deflated: {what}"
    else:
        filters = [Name(f"/{name}") for name in _FILTERS]
        chosen = [rng.choice(filters) for _ in range(rng.choice((1, 1, 2, 40)))]
        stream.write(rng.choice((data, zlib.compress(data))), filter=Array(chosen))
        what = f"filters {[str(name) for name in chosen][:5]}"
    return f"stream {stream.objgen[0]}: {what}"


def _edit_operators(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    words = data.split(b" ")
    done = []
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(words))
        new = rng.choice(
            (rng.choice(_OPERATORS), str(edits.number(rng)).encode(), b"1e9", b"-0.0", b"/X", b"(", b"<", b"[", b"]")
        )
        choice = rng.randrange(4)
        if choice == 0:
            words[at] = new
        elif choice == 1:
            words.insert(at, new)
        elif choice == 2 and len(words) > 1:
            del words[at]
        else:
            words[at:at] = words[at : at + 8] * rng.choice((2, 300))
        done.append(f"word {at}, {new[:20]!r}")
    return b" ".join(words), ", ".join(done)
