"""PDFs damaged object by object, in their content streams, and byte by byte."""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pikepdf
from pikepdf import Array, Dictionary, Name, Stream, String

from .. import edits, samples
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
    for maker in (_plain, _scan, _rich):
        pdf = maker()
        pdf.save(folder / f"{maker.__name__.strip('_')}.pdf", compress_streams=False, static_id=True)
        pdf.save(folder / f"{maker.__name__.strip('_')}-packed.pdf", object_stream_mode=packed, static_id=True)
    _plain().save(folder / "encrypted.pdf", encryption=pikepdf.Encryption(owner="o", user="", R=4))
    _plain().save(folder / "locked.pdf", encryption=pikepdf.Encryption(owner="o", user="secret", R=6))


def build(rng: random.Random, bases: Path, folder: Path) -> Case:
    samples.write_page(folder / GOOD)
    case, names = Case(), []
    for i in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice(sorted((bases / BASES).glob("*.pdf")))
        data, what = _damage(rng, path.read_bytes())
        names.append(f"{i}.pdf" if rng.random() < 0.97 else f"{i}.png")
        (folder / names[-1]).write_bytes(data)
        case.edits.append(f"{names[-1]}: {path.stem}; {what}")
    options = ["--prompt", "Total?", "--max-tokens", "1", "--threads", "1", "--out", "out"]
    options += rng.choice(([], [], [], ["--report"], ["--password", "secret"], ["--crop", "0.1,0.1,0.5,0.5"]))
    case.commands.append(["extract", *names, GOOD, *options])
    return case


def check(folder: Path, case: Case, results: list[Result]) -> list[str]:
    """Whatever the others are, the good image is read."""
    out = folder / "out"
    good = [record for record in records(out) if record["source"].endswith(GOOD)]
    if len(good) != 1 or good[0]["error"] or good[0]["finish_reason"] is None:
        return [f"the good image is not read: {[record.get('error') for record in good]}", *problems(out)]
    return problems(out)


# --- sound PDFs, small pages ---

SIZE = (120, 90)


def _page(pdf: pikepdf.Pdf, content: str, **entries: Any) -> pikepdf.Page:
    page = pdf.add_blank_page(page_size=SIZE)
    font = Dictionary(Type=Name.Font, Subtype=Name.Type1, BaseFont=Name.Helvetica)
    page.Resources = Dictionary(Font=Dictionary(F=font))
    page.Contents = Stream(pdf, content.encode())
    for key, value in entries.items():
        page[f"/{key}"] = value
    return page


def _plain() -> pikepdf.Pdf:
    pdf = pikepdf.new()
    _page(pdf, "BT /F 12 Tf 10 60 Td (Total 12.50) Tj ET 1 0 0 rg 10 10 30 20 re f")
    _page(
        pdf, "BT /F 9 Tf 10 60 Td [(Item) -500 (Price)] TJ T* (Tea) ' ET", Rotate=90, CropBox=Array([10, 10, 110, 80])
    )
    return pdf


def _image(pdf: pikepdf.Pdf) -> Stream:
    image = Stream(pdf, samples.page_image((24, 16)).tobytes())
    image.Type, image.Subtype, image.ColorSpace = Name.XObject, Name.Image, Name.DeviceRGB
    image.Width, image.Height, image.BitsPerComponent = 24, 16, 8
    return image


def _scan() -> pikepdf.Pdf:
    pdf = pikepdf.new()
    page = _page(pdf, "q 120 0 0 90 0 0 cm /I Do Q q 20 0 0 20 5 5 cm /J Do Q q 9 0 0 9 50 5 cm /M Do Q")
    jpeg = io.BytesIO()
    samples.page_image((24, 16)).save(jpeg, "JPEG")
    photo = Stream(pdf, jpeg.getvalue())
    photo.Type, photo.Subtype, photo.ColorSpace, photo.Filter = Name.XObject, Name.Image, Name.DeviceRGB, Name.DCTDecode
    photo.Width, photo.Height, photo.BitsPerComponent = 24, 16, 8
    photo.SMask = Stream(pdf, bytes(range(24)) * 16)
    photo.SMask.Type, photo.SMask.Subtype, photo.SMask.ColorSpace = Name.XObject, Name.Image, Name.DeviceGray
    photo.SMask.Width, photo.SMask.Height, photo.SMask.BitsPerComponent = 24, 16, 8
    mask = Stream(pdf, b"\xaa\x55" * 8)
    mask.Type, mask.Subtype, mask.ImageMask, mask.Width, mask.Height = Name.XObject, Name.Image, True, 8, 16
    mask.BitsPerComponent, mask.Decode = 1, Array([1, 0])
    page.Resources.XObject = Dictionary(I=_image(pdf), J=photo, M=mask)
    return pdf


def _rich() -> pikepdf.Pdf:
    """Forms, patterns, shadings, functions, a Type 3 font, transparency, annotations, fields, outlines, labels."""
    pdf = pikepdf.new()
    page = _page(
        pdf,
        "/G gs /Pattern cs /P scn 0 0 60 40 re f q 1 0 0 1 60 0 cm /S sh Q /X Do BT /T 8 Tf 5 70 Td (ab) Tj ET "
        "/Sep cs 0.5 scn 70 50 20 20 re f BI /W 2 /H 2 /CS /G /BPC 8 ID abcd EI 0 0 m 10 10 20 10 30 0 c [3 2] 0 d S",
    )
    function = Dictionary(FunctionType=2, Domain=Array([0, 1]), C0=Array([1, 0, 0]), C1=Array([0, 0, 1]), N=1)
    sampled = Stream(pdf, bytes(range(12)))
    sampled.FunctionType, sampled.Domain, sampled.Range = 0, Array([0, 1]), Array([0, 1, 0, 1, 0, 1])
    sampled.Size, sampled.BitsPerSample = Array([4]), 8
    calculator = Stream(pdf, b"{ dup 2 mul exch 0.5 sub 1 }")
    calculator.FunctionType, calculator.Domain, calculator.Range = 4, Array([0, 1]), Array([0, 1, 0, 1, 0, 1])
    stitched = Dictionary(FunctionType=3, Domain=Array([0, 1]), Functions=Array([function, sampled]),
        Bounds=Array([0.5]),
                          Encode=Array([0, 1, 0, 1]))  # fmt: skip
    shading = Dictionary(ShadingType=2, ColorSpace=Name.DeviceRGB, Coords=Array([0, 0, 60, 0]), Function=stitched)
    tile = Stream(pdf, b"1 0 0 rg 0 0 4 4 re f")
    tile.PatternType, tile.PaintType, tile.TilingType, tile.BBox = 1, 1, 1, Array([0, 0, 8, 8])
    tile.XStep, tile.YStep, tile.Resources = 8, 8, Dictionary()
    form = Stream(pdf, b"0 1 0 rg 0 0 9 9 re f /Y Do")
    form.Type, form.Subtype, form.BBox = Name.XObject, Name.Form, Array([0, 0, 20, 20])
    form.Group = Dictionary(S=Name.Transparency, CS=Name.DeviceRGB, I=True)
    form.Resources = Dictionary(XObject=Dictionary(Y=_image(pdf)))
    glyph = Stream(pdf, b"600 0 0 0 500 500 d1 0 0 500 500 re f")
    type3 = Dictionary(
        Type=Name.Font, Subtype=Name.Type3, FontBBox=Array([0, 0, 500, 500]), FontMatrix=Array([0.001, 0, 0,
        0.001, 0, 0]),
        CharProcs=Dictionary(a=glyph, b=glyph), FirstChar=97, LastChar=98, Widths=Array([600, 600]),
            Resources=Dictionary(),
        Encoding=Dictionary(Type=Name.Encoding, Differences=Array([97, Name.a, Name.b])),
    )  # fmt: skip
    page.Resources.Font.T = type3
    page.Resources.Pattern, page.Resources.Shading = Dictionary(P=tile), Dictionary(S=shading)
    page.Resources.XObject = Dictionary(X=form)
    page.Resources.ExtGState = Dictionary(G=Dictionary(CA=0.5, ca=0.5, BM=Name.Multiply, SMask=Name("/None")))
    page.Resources.ColorSpace = Dictionary(Sep=Array([Name.Separation, Name.Spot, Name.DeviceRGB, calculator]))
    field = pdf.make_indirect(Dictionary(
        Type=Name.Annot, Subtype=Name.Widget, FT=Name.Tx, T="field", V="value", Rect=Array([5, 50, 60, 65]),
        DA="/F 8 Tf 0 g", F=4, P=page.obj,
    ))  # fmt: skip
    note = Dictionary(Type=Name.Annot, Subtype=Name.Square, Rect=Array([60, 60, 80, 80]), C=Array([1, 0, 0]), F=4)
    page.Annots = Array([field, note])
    fonts = Dictionary(Font=Dictionary(F=page.Resources.Font.F))
    pdf.Root.AcroForm = Dictionary(Fields=Array([field]), DA="/F 8 Tf 0 g", NeedAppearances=True, DR=fonts)
    pdf.Root.PageLabels = Dictionary(Nums=Array([0, Dictionary(S=Name.r)]))
    layer = pdf.make_indirect(Dictionary(Type=Name.OCG, Name="layer"))
    pdf.Root.OCProperties = Dictionary(OCGs=Array([layer]), D=Dictionary(ON=Array([layer])))
    with pdf.open_outline() as outline:
        outline.root.append(pikepdf.OutlineItem("one", 0))
    return pdf


# --- damage ---


def _damage(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    kind = rng.random()
    if kind < 0.3:
        return edits.edit_bytes(rng, data)
    if kind < 0.4:
        return _edit_text(rng, data)
    try:
        return _edit_objects(rng, data)
    except Exception:  # pikepdf refuses some of it, with errors of many types
        return edits.edit_bytes(rng, data)


def _edit_text(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Edits at the words of a file's structure."""
    words = (b"obj", b"endobj", b"stream", b"endstream", b"xref", b"trailer", b"startxref", b"/Length",
        b"/Size", b"/Kids",
             b"/Count", b"/Root", b"/Prev", b"%%EOF", b"%PDF-", b"/Type", b"<<", b">>", b" R", b"/Filter")  # fmt: skip
    there = [word for word in words if word in data]
    word = rng.choice(there)
    at = rng.choice([i for i in range(len(data)) if data.startswith(word, i)])
    end = at + len(word)
    other = rng.choice(
        (b"", rng.choice(words), b" 0 R ", b" 99999999999 ", b"-1", b"[" * 400, b"<<" * 400, rng.randbytes(4))
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
        new = Name("/" + rng.choice(("Parent", "Kids", "Next", "Prev", "Resources", "SMask", "Length",
            "Filter", "DecodeParms",
                                     "Matrix", "Decode", "Mask", "UserUnit", "MediaBox", "Group", "OC")))  # fmt: skip
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
        lambda: Name("/" + rng.choice(("DCTDecode", "FlateDecode", "LZWDecode", "JPXDecode", "JBIG2Decode",
            "CCITTFaxDecode",
                                       "ASCII85Decode", "RunLengthDecode", "Crypt", "DeviceN", "Indexed",
                                       "ICCBased", "Lab",
                                       "CalRGB", "Pattern", "Type0", "TrueType", "CIDFontType2", "Type3",
                                       "MMType1", "None",
                                       "Identity-H", "Form", "Image", "PS", "Page", "Pages", "Catalog", "ObjStm"))),
        lambda: String(edits.text(rng).encode("utf-8", "replace").decode()),
        lambda: Array([rng.choice(numbers)() for _ in range(rng.choice((0, 1, 3, 4, 6, 300)))]),
        lambda: Dictionary(),
        lambda: Array([other]),
        lambda: bool(rng.randrange(2)),
        lambda: Stream(pdf, rng.choice((b"", rng.randbytes(50), b"q " * 5000, b"/X Do " * 50))),
        lambda: Array([Name.Indexed, Name.DeviceRGB, 255, String("abc")]),
    ]  # fmt: skip
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
        filters = [Name.FlateDecode, Name.LZWDecode, Name.ASCII85Decode, Name.ASCIIHexDecode, Name.RunLengthDecode,
                   Name.DCTDecode, Name.JPXDecode, Name.JBIG2Decode, Name.CCITTFaxDecode]  # fmt: skip
        chosen = [rng.choice(filters) for _ in range(rng.choice((1, 1, 2, 40)))]
        stream.write(rng.choice((data, zlib.compress(data))), filter=Array(chosen))
        what = f"filters {[str(name) for name in chosen][:5]}"
    return f"stream {stream.objgen[0]}: {what}"


def _edit_operators(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    words = data.split(b" ")
    operators = (b"q", b"Q", b"cm", b"Do", b"Tf", b"Tj", b"BT", b"ET", b"re", b"f", b"W", b"n", b"S", b"sh",
        b"gs", b"scn",
                 b"cs", b"c", b"d", b"w", b"BI", b"EI", b"Tr", b"Tz", b"BDC", b"EMC", b"d1", b"{", b"}",
                 b"exch", b"roll")  # fmt: skip
    done = []
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(words))
        new = rng.choice(
            (rng.choice(operators), str(edits.number(rng)).encode(), b"1e9", b"-0.0", b"/X", b"(", b"<", b"[", b"]")
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
