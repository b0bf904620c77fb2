"""Tests of unreadable files: each gives its message, and the batch continues."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from typing import Any

import pikepdf
import pytest
from PIL import Image

from granite4v.errors import Granite4vError, ImageError
from granite4v.runtime.documents import (
    Page,
    PageFailure,
    count_pages,
)
from granite4v.runtime.documents.limits import Limits
from tests.helpers.page_tests import GOOD, SMALL_VIEW, TIFF_PAGES, VIEW, failure, one, png, read, same, tiff
from tests.helpers.pdfs import add_image, add_page, pdf_bytes, scan_pdf, text_pdf, write
from tests.helpers.pictures import encoded, noise_picture


def bmp_that_lies() -> bytes:
    data = bytearray(encoded(noise_picture((20, 20)), "BMP"))
    data[18:26] = struct.pack("<ii", 2000, 2000)
    return bytes(data)


def tiff_that_lies() -> bytes:
    """Returns a TIFF whose header says twice the height of its only strip."""
    data = bytearray(encoded(noise_picture((20, 20)), "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0] + 2
    for entry in range(start, len(data) - 12, 12):
        if struct.unpack_from("<H", data, entry)[0] == 257:
            struct.pack_into("<I", data, entry + 8, 40)
            return bytes(data)
    raise AssertionError


def jpeg2000_pdf(size: tuple[int, int]) -> bytes:
    """Returns a PDF with a JPEG 2000 image whose own header declares `size`; the PDF's entry says 16 x 16."""
    data = bytearray(encoded(noise_picture((16, 16)), "JPEG2000", no_jp2=True))
    data[8:16] = struct.pack(">II", *size)  # Xsiz, Ysiz of the SIZ marker
    pdf = pikepdf.new()
    page = add_page(pdf, "q 612 0 0 792 0 0 cm /I Do Q")
    add_image(pdf, page, noise_picture((16, 16)))
    page.Resources.XObject.I.write(bytes(data), filter=pikepdf.Name.JPXDecode)
    return pdf_bytes(pdf)


def huge_image_pdf() -> bytes:
    pdf = scan_pdf(noise_picture((16, 16)))
    image = pdf.pages[0].Resources.XObject.I
    image.Width, image.Height = 100_000, 100_000
    return pdf_bytes(pdf)


def locked(**encryption: Any) -> bytes:
    return pdf_bytes(text_pdf("secret"), encryption=pikepdf.Encryption(**encryption))


def strange_encryption() -> bytes:
    pdf = pdf_bytes(text_pdf("x"), encryption=pikepdf.Encryption(user="u", owner="o", R=4))
    return pdf.replace(b"/Standard", b"/Curious!")


PDF = pdf_bytes(text_pdf("one", "two", "three"), object_stream_mode=pikepdf.ObjectStreamMode.disable)
PDF_IS_DAMAGED = "'bad.pdf' is damaged: PDFium finds no document in it; get a complete copy."
TRUNCATED = "'bad.png' declares {} pixels, but contains {} of pixel data; get a complete copy."
BOMB = "has more than 89,478,485 pixels, which may be a decompression bomb"
BAD = [
    pytest.param("bad.png", b"", "'bad.png' is empty (0 bytes).", id="empty"),
    pytest.param("bad.pdf", b"", "'bad.pdf' is empty (0 bytes).", id="empty PDF"),
    pytest.param("bad.png", bytes(500), "'bad.png' holds nothing but zero bytes; expected PNG", id="zeros"),
    pytest.param("bad.pdf", b"<!DOCTYPE html><p>404", "'bad.pdf' holds a web page; expected PNG", id="web page"),
    pytest.param("bad.jpg", b"PK\x03\x04" + bytes(99), "holds an office document or a ZIP archive", id="office"),
    pytest.param("bad.jpg", b"\0\0\0\x18ftypheic" + bytes(9), "holds a HEIC (HEIF) image", id="HEIF"),
    pytest.param("bad.tif", "Zwölf Bücher".encode(), "'bad.tif' holds text; expected", id="text"),
    pytest.param("bad.tif", b"\x89\x01\xfe" * 99, "neither an image nor a document of a known format", id="noise"),
    pytest.param(
        "bad.png", png(300, 200, 10), TRUNCATED.format("300 x 200", "3,010 of 60,200 bytes"), id="PNG with missing rows"
    ),
    pytest.param(
        "bad.tif", tiff_that_lies(), "pixels, but contains 1 of 2 strips; get a complete copy", id="TIFF lies"
    ),
    pytest.param(
        "bad.bmp", bmp_that_lies(), "'bad.bmp' cannot be read as an image: image file is trunc", id="BMP lies"
    ),
    pytest.param("bad.png", png(30_000, 30_000, 1), f"'bad.png' {BOMB}", id="PNG bomb"),
    pytest.param("bad.png", png(10_000, 10_000, 1), f"'bad.png' {BOMB}", id="smaller bomb"),
    pytest.param(
        "bad.jpg", encoded(noise_picture((99, 99)), "JPEG")[:2000], "image file is truncated", id="JPEG cut short"
    ),
    pytest.param("bad.webp", encoded(noise_picture((99, 99)), "WEBP")[:900], "'bad.webp' ", id="WebP cut short"),
    pytest.param(
        "bad.tif", b"II*\0\x08\0\0\0", "'bad.tif' is not an image that Pillow can read", id="TIFF without pages"
    ),
    pytest.param("bad.pdf", b"%PDF-1.7\nand nothing more", "'bad.pdf' is cut short: PDFium finds no", id="bare PDF"),
    pytest.param("bad.pdf", PDF[: len(PDF) // 2], "'bad.pdf' is cut short: PDFium finds no", id="half a PDF"),
    pytest.param("bad.pdf", b"%PDF-1.7\n" + b"junk " * 99 + b"\n%%EOF\n", PDF_IS_DAMAGED, id="damaged PDF"),
    pytest.param("bad.pdf", pdf_bytes(pikepdf.new()), "'bad.pdf' has no pages.", id="PDF without pages"),
    pytest.param(
        "bad.pdf", locked(user="u", owner="o"), "is encrypted; give its password with '--password'.", id="locked"
    ),
    pytest.param(
        "bad.pdf", strange_encryption(), "uses an encryption method that PDFium does not support", id="strange lock"
    ),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD)
def test_bad_files_say_what_is_wrong_and_the_batch_goes_on(
    name: str, data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    found = read(name, GOOD, view=VIEW)
    assert [type(item) for item in found] == [PageFailure, Page]
    bad = found[0]
    assert isinstance(bad, PageFailure)
    assert bad.source == name
    opened = isinstance(bad.error, ImageError) and "not an image" not in message
    assert bad.number == (1 if opened else None)
    assert message in str(bad.error)
    assert count_pages([name, GOOD]) == count_pages([GOOD, name])
    assert count_pages([name, GOOD]).pages == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(
            jpeg2000_pdf((30_000, 30_000)),
            "page 1 of 'bad.pdf' holds an image of 30,000 x 30,000 pixels, more than 89,478,485 together",
            id="JPEG 2000",
        ),
        pytest.param(huge_image_pdf(), "holds an image of 100,000 x 100,000 pixels, more than 4,000,", id="Flate"),
    ],
)
def test_bombs_in_a_pdf_are_refused_before_they_are_decoded(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.pdf").write_bytes(data)
    bad = failure("bad.pdf", view=VIEW)
    assert bad.number == 1
    assert message in str(bad.error)


def test_files_are_read_by_what_they_hold_whatever_their_name(tmp_path: Path) -> None:
    picture = noise_picture((40, 30))
    for name, data in {
        "a.jpg": encoded(picture),
        "b.pdf": encoded(picture, "BMP"),
        "c.png": pdf_bytes(scan_pdf(picture)),
        "d.pdf": b"\n\xef\xbb\xbfjunk\n" + pdf_bytes(scan_pdf(picture)),  # PDFium looks for the header, too
        "e.png": tiff(picture),
    }.items():
        (tmp_path / name).write_bytes(data)
    pages = read(tmp_path, view=VIEW)
    assert len(pages) == 5
    for page in pages:
        assert isinstance(page, Page)
        same(page.image, picture)


@pytest.mark.parametrize("revision", [2, 3, 4, 6])
@pytest.mark.parametrize("password", ["hush", "grüß"])
def test_either_password_opens_an_encrypted_pdf(revision: int, password: str, tmp_path: Path) -> None:
    modern = {"aes": revision >= 4, "metadata": revision >= 4}
    lock = pikepdf.Encryption(user=password, owner="boss", R=revision, **modern)
    plain = one(write(tmp_path / "plain.pdf", text_pdf("secret")), view=VIEW)
    path = write(tmp_path / "a.pdf", text_pdf("secret"), encryption=lock)
    for given in (password, "boss"):
        assert one(path, view=VIEW, password=given).digest == plain.digest
        assert count_pages([path, path.with_name("plain.pdf")], password=given).pages == 2
    assert "a.pdf' is encrypted; give its password" in str(failure(path).error)
    assert "a.pdf' is encrypted, and the given password does not open it; check '--password'." in str(
        failure(path, password="no").error
    )
    assert one(tmp_path / "plain.pdf", view=VIEW, password="hush").digest == plain.digest


def test_a_password_for_many_files_opens_those_that_need_none(tmp_path: Path) -> None:
    """Like bank statements: anybody may read them, only the owner may change them."""
    for revision in (3, 6):
        lock = pikepdf.Encryption(owner="boss", user="", R=revision, aes=revision >= 4, metadata=revision >= 4)
        path = write(tmp_path / f"{revision}.pdf", text_pdf("secret"), encryption=lock)
        assert one(path, password="hush").digest == one(path).digest == one(path, password="").digest


def test_pages_beyond_the_end_name_how_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.pdf"), text_pdf("1", "2", "3"))
    Path("b.png").write_bytes(GOOD.read_bytes())
    found = read("a.pdf", "b.png", pages="2-5,9,12-", view=SMALL_VIEW)
    assert [(item.source, item.number) for item in found] == [
        ("a.pdf", 2),
        ("a.pdf", 3),
        ("a.pdf", 4),
        ("a.pdf", 9),
        ("a.pdf", 12),
        ("b.png", 2),
        ("b.png", 9),
        ("b.png", 12),
    ]
    assert [str(item.error) for item in found if isinstance(item, PageFailure)] == [
        "'a.pdf' has 3 pages; there are no pages 4 to 5.",
        "'a.pdf' has 3 pages; there is no page 9.",
        "'a.pdf' has 3 pages; there is no page 12.",
        "'b.png' has 1 page; there are no pages 2 to 5.",
        "'b.png' has 1 page; there is no page 9.",
        "'b.png' has 1 page; there is no page 12.",
    ]
    assert count_pages(["a.pdf", "b.png"], pages="2-5,9,12-").pages == 8


def test_a_crop_beyond_a_page_names_its_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", text_pdf("1", "2"))
    found = read(path, crop="600,0,20,20")
    assert [item.number for item in found] == [1, 2]
    for item in found:
        assert isinstance(item, PageFailure)
        assert f"the crop 600,0,20,20 extends to 620 x 20, but page {item.number} of '" in str(item.error)
        assert "has 612 x 792 points; give x,y,width,height inside it, or in percent." in str(item.error)


def test_one_damaged_page_of_a_pdf_is_one_failure(tmp_path: Path) -> None:
    pdf = text_pdf("one", "two", "three")
    pdf.Root.Pages.Kids[1] = pdf.make_indirect(pikepdf.Dictionary(Type=pikepdf.Name.Catalog))
    path = write(tmp_path / "a.pdf", pdf)
    found = read(path, view=VIEW)
    assert [(type(item), item.number) for item in found] == [(Page, 1), (PageFailure, 2), (Page, 3)]
    assert isinstance(found[1], PageFailure)
    assert "page 2 of '" in str(found[1].error)
    assert "cannot be loaded: the file is damaged or cut short." in str(found[1].error)


@pytest.mark.parametrize("linearize", [False, True])
def test_a_pdf_without_its_end_is_read_with_a_warning(linearize: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    data = pdf_bytes(text_pdf("one", "two"), linearize=linearize)
    path.write_bytes(data[: data.rindex(b"%%EOF")])  # a linearized file has another one after its first page
    for page in read(path, view=VIEW):
        assert isinstance(page, Page)
        assert "has no end-of-file marker: it may be truncated" in page.warnings[0]


@pytest.mark.parametrize("linearize", [False, True])
@pytest.mark.parametrize("behind", [b"", bytes(100_000), b"\r\n<!-- sent by a server -->" * 99])
def test_what_stands_behind_the_end_of_a_pdf_is_no_sign_of_a_cut(
    behind: bytes, linearize: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf_bytes(text_pdf("one"), linearize=linearize) + behind)
    assert one(path).warnings == ()


def test_a_page_with_too_many_objects_is_refused(tmp_path: Path) -> None:
    pdf = pikepdf.new()
    add_page(pdf, "0 0 1 1 re f\n" * 60)
    form = pikepdf.Stream(pdf, b"0 0 1 1 re f\n" * 20)
    form.Type, form.Subtype, form.BBox = pikepdf.Name.XObject, pikepdf.Name.Form, [0, 0, 50, 50]
    add_page(pdf, "/X Do\n" * 3).Resources.XObject = pikepdf.Dictionary(X=form)
    path = write(tmp_path / "a.pdf", pdf)
    found = read(path, limits=Limits(n_objects=59))
    assert [str(item.error) for item in found if isinstance(item, PageFailure)] == [
        f"page {number} of '{path}' holds more than 59 objects; print it to a new PDF or save it as an image."
        for number in (1, 2)
    ]
    assert len([item for item in read(path, limits=Limits(n_objects=63)) if isinstance(item, Page)]) == 2


def test_a_form_that_only_adobe_can_draw_is_read_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pdf = text_pdf("Please wait...")
    template = pikepdf.Stream(pdf, b"<xdp:xdp xmlns:xdp='http://ns.adobe.com/xdp/'></xdp:xdp>")
    pdf.Root.AcroForm = pikepdf.Dictionary(Fields=[], XFA=template)
    pdf.Root.NeedsRendering = True
    page = one(write(tmp_path / "a.pdf", pdf), view=VIEW)
    assert "is an XFA form, of which only a placeholder page can be rendered" in page.warnings[0]
    assert capfd.readouterr().err == ""


def test_one_damaged_page_of_a_tiff_is_one_failure(tmp_path: Path) -> None:
    pages = [noise_picture((40, 30), seed) for seed in range(3)]
    data = tiff(*pages, compression="tiff_adobe_deflate")
    with Image.open(io.BytesIO(data)) as image:
        image.seek(1)
        start = image.tag_v2[273][0]
    path = tmp_path / "a.tif"
    path.write_bytes(data[:start] + bytes(50) + data[start + 50 :])
    found = read(path)
    assert [(type(item), item.number) for item in found] == [(Page, 1), (PageFailure, 2), (Page, 3)]
    assert isinstance(found[1], PageFailure)
    assert isinstance(found[1].error, ImageError)
    assert str(found[1].error).startswith(f"page 2 of '{path}' cannot be read as an image:")


def test_a_tiff_cut_short_gives_the_pages_it_has_and_a_failure(tmp_path: Path) -> None:
    data = tiff(*[noise_picture((40, 30), seed) for seed in range(3)])
    path = tmp_path / "a.tif"
    for kept in (0.4, 0.7, 0.95):
        path.write_bytes(data[: int(len(data) * kept)])
        found = read(path)
        assert len({(item.source, item.number) for item in found}) == len(found)
        assert isinstance(found[0], Page) == (kept > 0.34)
        assert isinstance(found[-1], PageFailure)
        assert count_pages([path]).pages == len(found)


def test_damaged_bytes_never_end_a_batch(tmp_path: Path) -> None:
    """Whatever the bytes are, the outcome is a page, or a failure with a message."""
    rng = random.Random(7)
    files = {
        "a.tif": tiff(*TIFF_PAGES[:3], compression="tiff_lzw"),
        "b.png": encoded(noise_picture((20, 20))),
        "c.gif": encoded(noise_picture((20, 20)).quantize(16), "GIF"),
        "d.pdf": PDF,
    }
    for name, whole in files.items():
        for i in range(60):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 3, 10))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            cut_at = rng.randint(1, len(data)) if rng.random() < 0.3 else len(data)
            (tmp_path / f"{i}{name}").write_bytes(data[:cut_at])
    found = read(tmp_path, view=SMALL_VIEW)
    assert len({item.source for item in found}) == 240
    for item in found:
        assert isinstance(item, Page) or (isinstance(item.error, Granite4vError) and str(item.error))
