"""Tests of image files as pages, compared with Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from granite4v.clip_projector import load_image
from granite4v.runtime.documents import (
    Page,
    count_pages,
)
from tests.helpers.page_tests import GOOD, TIFF_PAGES, VIEW, failure, jpeg_that_lies, one, png, read, same, tiff
from tests.helpers.pdfs import scan_pdf, write
from tests.helpers.pictures import EXIF_ORIENTATION, encoded, noise_picture, text_picture


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_pictures_have_the_pixels_that_pillow_gives(kind: str, tmp_path: Path) -> None:
    picture = text_picture((150, 100)).quantize(64).convert("RGB")
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {})))
    page = one(path, view=VIEW)
    with Image.open(path) as expected:
        same(page.image, expected.convert("RGB"))
    if kind != "JPEG":
        same(page.image, picture)
    assert (page.image.pillow.mode, page.number, page.n_pages, page.dpi, page.warnings) == ("RGB", 1, 1, None, ())
    assert page.size_px == (150, 100)
    assert page.digest == load_image(path).digest.hex()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_stand_upright(kind: str, tmp_path: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        (tmp_path / str(orientation)).write_bytes(encoded(text_picture((60, 40)), kind, exif=exif))
    for orientation, page in enumerate(read(tmp_path / "[1-8]"), 1):
        assert isinstance(page, Page)
        with Image.open(tmp_path / str(orientation)) as opened:
            opened.load()
            expected = ImageOps.exif_transpose(opened).convert("RGB")
        same(page.image, expected)


def test_a_crop_is_taken_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    path = tmp_path / "a.png"
    picture = noise_picture((60, 40))
    path.write_bytes(encoded(picture, exif=exif))
    upright = picture.rotate(-90, expand=True)  # 40 x 60
    same(one(path, crop="5,10,20,30").image, upright.crop((5, 10, 25, 40)))
    same(one(path, crop="50%,50%,50%,50%").image, upright.crop((20, 30, 40, 60)))
    same(one(path, crop="99.9%,0,0.1%,0.1%").image, upright.crop((39, 0, 40, 1)))
    assert "the crop 0,0,41,60 extends to 41 x 60, but 'a.png' has 40 x 60 pixels; give x,y,width,height inside" in str(
        failure(path, crop="0,0,41,60").error
    ).replace(str(path), "a.png")


def test_moving_pictures_give_their_first_frame_on_white(tmp_path: Path) -> None:
    frames = [noise_picture((20, 10), seed).quantize(32) for seed in range(3)]
    for kind in ("GIF", "WEBP"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
        page = one(path)
        assert page.n_pages == 1
        same(page.image, frames[0].convert("RGB"))
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    (tmp_path / "clear.png").write_bytes(encoded(clear))
    same(one(tmp_path / "clear.png").image, Image.new("RGB", (4, 4), "white"))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_a_tiff_is_read_page_by_page(compression: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(*TIFF_PAGES, **({"compression": compression} if compression else {})))
    pages = read(path)
    assert [(page.number, page.n_pages) for page in pages if isinstance(page, Page)] == [(i, 4) for i in range(1, 5)]
    for page, expected in zip(pages, TIFF_PAGES, strict=True):
        assert isinstance(page, Page)
        same(page.image, expected.convert("RGB"))
    chosen = read(path, pages="2,4-")
    assert [item.number for item in chosen] == [2, 4]
    assert count_pages([path, GOOD], pages="1-2").pages == 4


def with_subfile_type(page: Image.Image, kind: int) -> Image.Image:
    page = page.copy()
    page.encoderinfo = {"tiffinfo": {254: kind}}
    return page


def test_smaller_copies_and_masks_in_a_tiff_are_no_pages(tmp_path: Path) -> None:
    pages = [noise_picture((60, 40)), noise_picture((30, 20)), noise_picture((15, 10)), noise_picture((60, 40), 9)]
    kinds = [0, 1, 4, 2]  # NewSubfileType: page, reduced-size copy, mask, one page of several
    path = tmp_path / "a.tif"
    marked = [with_subfile_type(page, kind) for page, kind in zip(pages, kinds, strict=True)]
    path.write_bytes(tiff(*marked))
    found = read(path)
    assert len(found) == 2
    for page, expected in zip(found, (pages[0], pages[3]), strict=True):
        assert isinstance(page, Page)
        assert page.n_pages == 2
        same(page.image, expected)


def test_what_is_not_as_one_would_expect_comes_with_the_page(tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(path)
    page = one(path)
    (warning,) = page.warnings
    assert "deep.tif' is greyscale of floats from 0 to 1, which are read as if 0 were black and 1 white" in warning
    same(page.image.pillow.convert("L"), [[0, 128, 255]])


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "PPM", "PCX"])
def test_other_kinds_that_pillow_knows_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path.write_bytes(encoded(text_picture((60, 40)), kind))
    same(one(path).image, load_image(path))


def test_an_even_grey_edge_matters_only_in_a_jpeg(tmp_path: Path) -> None:
    framed = Image.new("RGB", (80, 60), (128, 128, 128))
    framed.paste(noise_picture((40, 20)), (20, 20))
    (tmp_path / "a.png").write_bytes(encoded(framed))
    assert one(tmp_path / "a.png").warnings == ()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_ends_too_soon_is_read_with_a_warning(progressive: bool, tmp_path: Path) -> None:
    """The JPEG decoder fills in the missing part without an error."""
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_that_lies(progressive=progressive))
    assert "has a uniform grey area at its edge, as in a truncated JPEG" in one(path).warnings[0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (64, 48)])
def test_whole_pngs_are_not_taken_for_liars(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise_picture(size).convert("L" if mode == "I;16" else mode).convert(mode).save(path)
    same(one(path).image, load_image(path))


def test_interlaced_pngs_are_measured_pass_by_pass(tmp_path: Path) -> None:
    """Built by hand, since Pillow writes no interlaced PNGs: 3 x 5 grey pixels, in six of the seven Adam7 passes."""
    path = tmp_path / "a.png"
    passes = [(1, 1), (1, 1), (1, 2), (2, 1), (1, 3), (3, 2)]  # columns and rows of the passes that are not empty
    rows = b"".join(bytes([0, *[90] * columns]) * n for columns, n in passes)
    path.write_bytes(png(3, 5, data=rows, interlaced=1))
    same(one(path).image, np.full((5, 3, 3), 90, np.uint8))
    path.write_bytes(png(3, 5, data=rows[:-4], interlaced=1))
    assert "but contains 21 of 25 bytes of pixel data" in str(failure(path).error)


def test_equal_pixels_have_equal_digests_whatever_the_file(tmp_path: Path) -> None:
    picture = noise_picture((120, 80))
    (tmp_path / "a.png").write_bytes(encoded(picture))
    (tmp_path / "b.bmp").write_bytes(encoded(picture, "BMP"))
    (tmp_path / "c.tif").write_bytes(tiff(TIFF_PAGES[0], picture))
    write(tmp_path / "d.pdf", scan_pdf(picture, TIFF_PAGES[0]))
    digests = [page.digest for page in read(tmp_path, view=VIEW) if isinstance(page, Page)]
    assert len(digests) == 6
    assert digests[0] == digests[1] == digests[3] == digests[4]
    assert digests[2] == digests[5] != digests[0]
