"""Tests of PDF pages, compared with the positions in their content, with direct calls of pypdfium2, and with the
images that scans were made from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pikepdf
import pytest
from PIL import Image, ImageOps

from granite4v.clip_projector.tiles_anyres import cut
from granite4v.families.base import VisionConfig
from granite4v.runtime.documents import (
    Page,
)
from granite4v.runtime.documents.resolution import useful_size
from tests.helpers.page_tests import SMALL_VIEW, VIEW, VIEWS, one, read, same
from tests.helpers.pdfs import LETTER, add_image, add_page, add_text_field, scan_pdf, square, text_pdf, write
from tests.helpers.pictures import noise_picture, text_picture


def colour_at(image: Image.Image, x: float, y: float, size: tuple[float, float] = LETTER) -> Any:
    """Returns the pixel at (x, y) points from the top left of a page of `size` points."""
    return image.getpixel((int(x / size[0] * image.width), int(y / size[1] * image.height)))


def colours(image: Image.Image) -> set[Any]:
    return {colour for _, colour in image.getcolors(1 << 24) or []}


RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def corner_page() -> pikepdf.Pdf:
    """A letter page with 1-inch squares 1 inch from its edges: red top left, green top right, blue bottom left."""
    pdf = pikepdf.new()
    add_page(pdf, square(72, 648, "1 0 0") + square(468, 648, "0 1 0") + square(72, 72, "0 0 1"))
    return pdf


@pytest.mark.parametrize("view", [VIEW, SMALL_VIEW, None])
def test_things_stand_where_the_page_says(view: VisionConfig | None, tmp_path: Path) -> None:
    page = one(write(tmp_path / "a.pdf", corner_page()), view=view)
    ink = np.asarray(page.image) > 127
    for colour, (left, top) in ((RED, (72, 72)), (GREEN, (468, 72)), (BLUE, (72, 648))):
        rows, columns = np.nonzero((ink == (np.array(colour) > 127)).all(axis=-1))
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        scale = np.array([page.image.pillow.width / 612, page.image.pillow.height / 792] * 2)
        np.testing.assert_allclose(found, np.array([left, top, left + 72, top + 72]) * scale, atol=1)
    assert colour_at(page.image.pillow, 300, 300) == WHITE
    assert page.dpi == pytest.approx(page.image.pillow.width / 8.5, abs=0.05)


@pytest.mark.parametrize(("turn", "corner"), [(0, (108, 108)), (90, (684, 108)), (180, (504, 684)), (270, (108, 504))])
def test_a_turned_page_stands_upright(turn: int, corner: tuple[int, int], tmp_path: Path) -> None:
    pdf = corner_page()
    pdf.pages[0].Rotate = turn
    page = one(write(tmp_path / "a.pdf", pdf), view=VIEW)
    shown = LETTER if turn % 180 == 0 else (792, 612)
    assert page.size_px == useful_size(shown, VIEW.tiling)
    assert colour_at(page.image.pillow, *corner, shown) == RED


def test_only_what_the_crop_box_shows_is_drawn(tmp_path: Path) -> None:
    pdf = corner_page()
    pdf.pages[0].CropBox = [36, 576, 336, 776]  # around the red square, now 36 points from the left edge
    page = one(write(tmp_path / "a.pdf", pdf), view=VIEW)
    assert page.size_px == useful_size((300, 200), VIEW.tiling)
    assert colour_at(page.image.pillow, 40, 60, (300, 200)) == RED
    assert colour_at(page.image.pillow, 30, 60, (300, 200)) == WHITE
    assert GREEN not in colours(page.image.pillow)


@pytest.mark.parametrize("box", [[5000, 5000, 6000, 6000], [612, 0, 700, 792], [-20, -20, 0, 0]])
def test_a_crop_box_outside_of_the_page_shows_the_whole_page_with_a_warning(box: list[int], tmp_path: Path) -> None:
    plain = one(write(tmp_path / "a.pdf", corner_page()), view=VIEW)
    pdf = corner_page()
    pdf.pages[0].CropBox = box
    page = one(write(tmp_path / "b.pdf", pdf), view=VIEW)
    assert page.digest == plain.digest
    (warning,) = page.warnings
    assert "the crop box of page 1 of '" in warning
    assert "b.pdf' lies outside the page, so the full page is used instead." in warning


def test_text_in_a_font_that_is_nowhere_is_told(tmp_path: Path) -> None:
    pdf = pikepdf.new()
    for content in ("BT /F 20 Tf 9 9 Td (seen) Tj ET", "BT /F 20 Tf 3 Tr 9 9 Td (hidden) Tj ET", ""):
        add_page(pdf, content)
    add_page(pdf, "BT 1 g /F 20 Tf 9 9 Td (white on white, like letters without a font) Tj ET")
    pages = read(write(tmp_path / "a.pdf", pdf), view=VIEW)
    assert [len(page.warnings) for page in pages if isinstance(page, Page)] == [0, 0, 0, 1]
    assert isinstance(pages[3], Page)
    assert (
        "a.pdf' contains text, but none is visible when rendered: its fonts may be neither embedded nor"
        in pages[3].warnings[0]
    )


def test_text_in_a_layer_that_is_switched_off_is_told(tmp_path: Path) -> None:
    pdf = pikepdf.new()
    page = add_page(pdf, "/OC /L BDC BT /F 20 Tf 9 9 Td (hidden) Tj ET EMC")
    layer = pdf.make_indirect(pikepdf.Dictionary(Type=pikepdf.Name.OCG, Name=pikepdf.String("L")))
    page.Resources.Properties = pikepdf.Dictionary(L=layer)
    off = pikepdf.Dictionary(OFF=pikepdf.Array([layer]))
    pdf.Root.OCProperties = pikepdf.Dictionary(OCGs=pikepdf.Array([layer]), D=off)
    (warning,) = one(write(tmp_path / "a.pdf", pdf), view=VIEW).warnings
    assert "its layers may be hidden" in warning


def test_names_of_attached_files_are_short_and_printable_in_messages(tmp_path: Path) -> None:
    pdf = text_pdf("cover")
    for name in ("n" * 3000 + ".pdf", "red\u202etxt.pdf"):
        pdf.attachments[name] = pikepdf.AttachedFileSpec(pdf, b"x", filename=name)
    (warning,) = one(write(tmp_path / "a.pdf", pdf)).warnings
    assert f"'{'n' * 80}', 'red\\u202etxt.pdf'" in warning


def test_documents_in_a_portfolio_are_told_and_data_in_an_invoice_is_not(tmp_path: Path) -> None:
    pdf = text_pdf("cover")
    for name in ("a.pdf", "data.xml", "Ü.PDF", "c.docx", "d.png"):
        pdf.attachments[name] = pikepdf.AttachedFileSpec(pdf, b"x", filename=name)
    (warning,) = one(write(tmp_path / "a.pdf", pdf)).warnings
    assert "a.pdf' has attached files, which are not read: 'a.pdf', 'c.docx', 'd.png' and 1 more; save" in warning
    pdf = text_pdf("invoice")
    pdf.attachments["factur-x.xml"] = pikepdf.AttachedFileSpec(pdf, b"<x/>", filename="factur-x.xml")
    assert one(write(tmp_path / "b.pdf", pdf)).warnings == ()


def test_pages_without_a_model_are_what_pypdfium2_draws_at_200_dpi(tmp_path: Path) -> None:
    import pypdfium2

    path = write(tmp_path / "a.pdf", text_pdf("Invoice 42", "and its second page"))
    pages = read(path)
    with pypdfium2.PdfDocument(path) as pdf:
        for page, drawn in zip(pages, pdf, strict=True):
            assert isinstance(page, Page)
            same(page.image, drawn.render(scale=200 / 72).to_pil())
            assert page.dpi == 200


def test_text_stands_where_pdfium_says(tmp_path: Path) -> None:
    import pypdfium2

    path = write(tmp_path / "a.pdf", text_pdf("HIH"))
    page = one(path, view=VIEW)
    dark = np.asarray(page.image.pillow.convert("L")) < 128
    rows, columns = np.nonzero(dark)
    with pypdfium2.PdfDocument(path) as pdf:
        text = pdf[0].get_textpage()
        boxes = np.array([text.get_charbox(i) for i in range(3)])  # left, bottom, right, top
    scale = page.image.pillow.width / 612
    expected = (boxes[:, 0].min(), 792 - boxes[:, 3].max(), boxes[:, 2].max(), 792 - boxes[:, 1].min())
    np.testing.assert_allclose(
        [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.array(expected) * scale, atol=1.5
    )


def test_hairlines_stay_as_light_as_they_are_thin(tmp_path: Path) -> None:
    """Drawn at the final size, PDFium would make them a whole pixel wide."""
    pdf = pikepdf.new()
    add_page(pdf, "0.2 w 0 400 m 612 400 l S")
    column = np.asarray(one(write(tmp_path / "a.pdf", pdf), view=VIEW).image.pillow.convert("L"))[:, 400].astype(float)
    ink_px = (255 - column).sum() / 255
    assert ink_px == pytest.approx(0.5, abs=0.1)  # one pixel at twice the size, the least possible; 0.29 would be exact


def test_annotations_and_form_fields_are_drawn(tmp_path: Path) -> None:
    pdf = corner_page()
    page = pdf.pages[0]
    add_text_field(pdf, page, [200, 300, 400, 340], "FILLED")
    appearance = pikepdf.Stream(pdf, b"0.5 g 0 0 50 50 re f")
    appearance.Type, appearance.Subtype, appearance.BBox = pikepdf.Name.XObject, pikepdf.Name.Form, [0, 0, 50, 50]
    stamp = pikepdf.Dictionary(
        Type=pikepdf.Name.Annot,
        Subtype=pikepdf.Name.Stamp,
        Rect=[300, 500, 350, 550],
        F=4,
        AP=pikepdf.Dictionary(N=appearance),
    )
    page.Annots.append(pdf.make_indirect(stamp))
    path = write(tmp_path / "a.pdf", pdf)
    image = one(path, view=VIEW).image.pillow
    assert colour_at(image, 325, 267) == pytest.approx(GREY, abs=1)
    field = np.asarray(image.convert("L"))[int(452 * 1.4545) : int(492 * 1.4545), int(200 * 1.4545) : int(400 * 1.4545)]
    assert (field < 100).sum() > 100  # letters
    assert np.median(field) == 255  # and no highlight behind them
    part = one(path, view=VIEW, crop="200,452,200,40").image.pillow  # only the field, no pixel of the squares
    assert (np.asarray(part.convert("L")) < 100).mean() == pytest.approx((field < 100).mean(), rel=0.25)
    assert RED not in colours(part)


def test_transparency_falls_on_white(tmp_path: Path) -> None:
    pdf = pikepdf.new()
    page = add_page(pdf, "/G gs " + square(72, 648, "1 0 0"))
    page.Resources.ExtGState = pikepdf.Dictionary(G=pikepdf.Dictionary(ca=0.5))
    image = one(write(tmp_path / "a.pdf", pdf), view=VIEW).image.pillow
    assert image.mode == "RGB"
    assert colour_at(image, 108, 108) == pytest.approx((255, 127, 127), abs=1)


@pytest.mark.parametrize("view", [VIEW, None])
@pytest.mark.parametrize("crop", ["306,39.6,306,198", "50%,5%,50%,25%", "50%,39.6,306,25%"])
def test_a_crop_of_a_page_gets_the_whole_resolution(view: VisionConfig | None, crop: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", corner_page())
    whole, part = one(path, view=view), one(path, view=view, crop=crop)
    assert part.size_px == (useful_size((306, 198), VIEW.tiling) if view else (850, 550))
    for x, y, colour in ((164, 34, GREEN), (232, 102, GREEN), (160, 34, WHITE), (236, 102, WHITE)):
        assert colour_at(part.image.pillow, x, y, (306, 198)) == colour
    if view:
        assert whole.dpi and part.dpi and part.dpi > 1.9 * whole.dpi


def test_a_crop_of_a_turned_page_counts_from_the_corner_that_is_seen(tmp_path: Path) -> None:
    pdf = corner_page()
    pdf.pages[0].Rotate = 90
    path = write(tmp_path / "a.pdf", pdf)
    part = one(path, view=VIEW, crop="600,36,150,150").image.pillow
    assert [colour_at(part, *at, (150, 150)) for at in ((50, 40), (115, 105), (46, 40), (125, 105))] == [
        RED,
        RED,
        WHITE,
        WHITE,
    ]


def test_a_tiny_crop_is_not_magnified_without_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", corner_page())
    part = one(path, view=VIEW, crop="75,75,0.3,0.3")
    assert part.size_px == (10, 10)  # 2400 dpi
    assert colours(part.image.pillow) == {RED}


# --- scans ---


@pytest.mark.parametrize("dpi", [72, 100, 150, 200, 204.5, 300])
def test_a_scan_has_the_pixels_of_its_picture(dpi: float, tmp_path: Path) -> None:
    for seed, size in enumerate([(333, 777), (200, 64), (31, 17), (640, 480)]):
        picture = noise_picture(size, seed)
        page = one(write(tmp_path / "a.pdf", scan_pdf(picture, dpi=dpi)), view=VIEW)
        same(page.image, picture)
        assert page.dpi == pytest.approx(dpi, abs=0.06)


@VIEWS
def test_a_scan_finer_than_the_model_sees_gives_the_tiles_of_its_picture(view: VisionConfig, tmp_path: Path) -> None:
    picture = text_picture((1275, 1650))
    page = one(write(tmp_path / "a.pdf", scan_pdf(picture, dpi=150)), view=view)
    assert page.size_px == useful_size(LETTER, view.tiling)
    expected, found = cut(picture, view.tiling), cut(page.image.pillow, view.tiling)
    np.testing.assert_array_equal(found[1:], expected[1:])
    assert np.abs(found[0].astype(int) - expected[0]).mean() < 2  # the overview is scaled down twice


@pytest.mark.parametrize("kind", ["JPEG", "1 bit"])
def test_scans_as_pillow_writes_them_have_the_pixels_of_their_picture(kind: str, tmp_path: Path) -> None:
    picture = text_picture((600, 800))
    picture = picture.convert("1") if kind == "1 bit" else picture
    path = tmp_path / "a.pdf"
    picture.save(path, "PDF", resolution=150, **({"quality": 95} if kind == "JPEG" else {}))
    if kind == "JPEG":
        with pikepdf.open(path) as pdf:
            picture = Image.open(io.BytesIO(next(iter(pdf.pages[0].Resources.XObject.values())).read_raw_bytes()))
    same(one(path, view=VIEW).image, picture.convert("RGB"))


def test_a_scan_is_turned_and_cropped_without_touching_its_pixels(tmp_path: Path) -> None:
    picture = noise_picture((300, 200))
    for turn, method in ((90, Image.Transpose.ROTATE_270), (270, Image.Transpose.ROTATE_90)):
        pdf = scan_pdf(picture)
        pdf.pages[0].Rotate = turn
        path = write(tmp_path / "a.pdf", pdf)
        upright = picture.transpose(method)
        same(one(path, view=VIEW).image, upright)
        same(one(path, view=VIEW, crop="10%,20%,50%,25%").image, upright.crop((20, 60, 120, 135)))
        png = tmp_path / "a.png"
        upright.save(png)
        for crop in ("33.3%,1%,20%,50%", "0.7%,0.7%,0.1%,0.1%"):
            assert one(path, view=VIEW, crop=crop).digest == one(png, view=VIEW, crop=crop).digest


def test_text_recognition_over_a_scan_leaves_it_a_scan(tmp_path: Path) -> None:
    picture = noise_picture((300, 200))
    pdf = scan_pdf(picture)
    form = pikepdf.Stream(pdf, b"BT 3 Tr /F 10 Tf 20 20 Td (hidden) Tj ET")
    form.Type, form.Subtype, form.BBox = pikepdf.Name.XObject, pikepdf.Name.Form, [0, 0, 144, 96]
    form.Resources = pdf.pages[0].Resources
    pdf.pages[0].Resources.XObject.T = form
    pdf.pages[0].contents_add(b"BT 3 Tr /F 10 Tf 20 40 Td (also hidden) Tj ET /T Do")
    same(one(write(tmp_path / "a.pdf", pdf), view=VIEW).image, picture)


def test_a_coarse_picture_under_text_does_not_coarsen_the_text(tmp_path: Path) -> None:
    for content in ("BT /F 10 Tf 20 40 Td (seen) Tj ET", square(20, 20, "1 0 0", 5)):
        pdf = scan_pdf(noise_picture((30, 20)), dpi=15)
        pdf.pages[0].contents_add(content.encode())
        page = one(write(tmp_path / "a.pdf", pdf), view=VIEW)
        assert page.size_px == useful_size((144, 96), VIEW.tiling)


@pytest.mark.parametrize("kind", ["SMask", "Mask"])
def test_the_fine_mask_of_a_coarse_picture_keeps_its_fineness(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in compressed scans: the text is a mask of 150 dpi over a black image of 4 x 3 pixels."""
    picture = text_picture((400, 300)).convert("L").point(lambda value: 255 if value > 127 else 0)
    pdf = scan_pdf(Image.new("RGB", (4, 3), "black"), dpi=1.5)
    pdf.pages[0].MediaBox = [0, 0, 192, 144]
    pdf.pages[0].Contents = pikepdf.Stream(pdf, b"q 192 0 0 144 0 0 cm /I Do Q")
    mask = pikepdf.Stream(pdf, ImageOps.invert(picture).tobytes())
    mask.Type, mask.Subtype, mask.Width, mask.Height = pikepdf.Name.XObject, pikepdf.Name.Image, 400, 300
    if kind == "SMask":
        mask.ColorSpace, mask.BitsPerComponent = pikepdf.Name.DeviceGray, 8
    else:
        mask.write(picture.convert("1").tobytes())
        mask.ImageMask, mask.BitsPerComponent = True, 1
    pdf.pages[0].Resources.XObject.I[f"/{kind}"] = mask
    page = one(write(tmp_path / "a.pdf", pdf), view=VIEW)
    assert page.size_px == useful_size((4, 3), VIEW.tiling)
    shown = np.asarray(page.image.pillow.convert("L").resize(picture.size)).astype(float)
    assert np.abs(shown - np.asarray(picture)).mean() < 12
    assert capfd.readouterr().err == ""


def test_a_fax_keeps_the_shape_of_its_page(tmp_path: Path) -> None:
    pdf = pikepdf.new()
    page = add_page(pdf, "q 612 0 0 792 0 0 cm /I Do Q")
    add_image(pdf, page, noise_picture((867, 561)))  # 102 dpi across, 51 down
    assert one(write(tmp_path / "a.pdf", pdf), view=VIEW).size_px == (867, 1122)
