"""Files to pages: what is found, what a page looks like, and the message for each that cannot be read.

Pictures are compared with Pillow, PDF pages with where their content says that things stand, with pypdfium2 called by
hand, and with the picture that a scan was made of.
"""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pikepdf
import psutil
import pytest
from pdfs import LETTER, add_image, add_page, add_text_field, pdf_bytes, scan_pdf, square, text_pdf, write
from pictures import EXIF_ORIENTATION, encoded, noise_picture, png_of, text_picture
from PIL import Image, ImageOps

from granite4v.clip_projector import load_image
from granite4v.clip_projector.tiles import best_resolution, cut, fit_size
from granite4v.errors import DocumentError, Granite4vError, ImageError
from granite4v.families.base import TilingConfig, TowerConfig, VisionConfig, WindowQFormerConfig
from granite4v.runtime.pages import (
    Page,
    PageFailure,
    SelectionError,
    count_pages,
    open_pages,
    parse_crop,
    parse_pages,
)
from granite4v.runtime.pages.resolution import MAX_PIXELS, render_size, useful_size
from granite4v.runtime.prompt import image_digest


def view_of(tile_px: int, most_tiles: int) -> VisionConfig:
    grid = range(1, most_tiles + 1)
    pinpoints = tuple((h * tile_px, w * tile_px) for h in grid for w in grid if h * w <= most_tiles)
    return VisionConfig(
        family="test",
        tower=TowerConfig(8, 8, 1, 1, tile_px, 16, "gelu", 1e-6),
        tiling=TilingConfig(tile_px, pinpoints, (0.5,) * 3, (0.5,) * 3),
        projector=WindowQFormerConfig(1, 2, 1),
        streams=(),
        text_hidden_size=8,
    )


VIEW = view_of(384, 10)  # as published
SMALL_VIEW = view_of(64, 6)
VIEWS = pytest.mark.parametrize("view", [VIEW, SMALL_VIEW], ids=["384 px", "64 px"])


def read(*inputs: str | Path, **options: Any) -> list[Page | PageFailure]:
    return list(open_pages(inputs, **options))


def one(source: str | Path, **options: Any) -> Page:
    (page,) = read(source, **options)
    assert isinstance(page, Page), page
    return page


def failure(source: str | Path, **options: Any) -> PageFailure:
    """The one thing that is read from `source`, behind a page that can be read."""
    (found,) = [item for item in read(source, GOOD, **options) if isinstance(item, PageFailure)]
    return found


def same(image: Image.Image, expected: Any) -> None:
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


GOOD = Path(__file__).parent / "data" / "invoice.png"


# --- which pages, which part ---


@pytest.mark.parametrize(
    ("text", "n_pages", "expected"),
    [
        ("1-3,7,10-", 12, [1, 2, 3, 7, 10, 11, 12]),
        ("7, 1 - 3 ,2", 9, [1, 2, 3, 7]),
        ("2-4,3-6,7", 9, [2, 3, 4, 5, 6, 7]),
        ("5-,2-", 6, [2, 3, 4, 5, 6]),
        ("01", 1, [1]),
    ],
)
def test_page_ranges_are_ascending_and_give_each_page_once(text: str, n_pages: int, expected: list[int]) -> None:
    ranges = parse_pages(text)
    assert list(ranges.of(n_pages)) == [(page, page) for page in expected]
    assert ranges.count(n_pages) == len(expected)


@pytest.mark.parametrize(
    ("text", "missing"),
    [("4", (4, 4)), ("2-9", (4, 9)), ("5-7", (5, 7)), ("7-", (7, None)), ("1-1000000000", (4, 1000000000))],
)
def test_pages_that_a_document_does_not_have_are_one_piece(text: str, missing: tuple[int, int | None]) -> None:
    ranges = parse_pages(text)
    pairs = list(ranges.of(3))
    assert pairs[-1] == missing
    assert all(first <= 3 for first, _ in pairs[:-1])
    assert ranges.count(3) == len(pairs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "the pages '' have nothing before, after or between commas; write numbers and ranges such as '1-3,7,10-'.",
        ),
        ("1,,2", "have nothing before, after or between commas"),
        ("0", "the pages '0' hold '0', but pages are counted from 1."),
        ("1,0-3", "hold '0-3', but pages are counted from 1."),
        ("5-3", "the pages '5-3' hold '5-3', which counts down; write '3-5'."),
        ("-3", "the pages '-3' hold '-3'; write numbers and ranges such as '1-3,7,10-'."),
        ("1..3", "hold '1..3'; write numbers"),
        ("all", "hold 'all'; write numbers"),
        ("²", "hold '²'; write numbers"),
        ("9" * 30, "write numbers"),
    ],
)
def test_pages_that_make_no_sense_are_refused_at_once(text: str, message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        open_pages([GOOD], pages=text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("crop", "box"),
    [
        ("10,20,30,40", (10, 20, 40, 60)),
        ("10%,20%,30%,40%", (20, 20, 80, 60)),
        ("50%,0,50%,100", (100, 0, 200, 100)),
        ((0, 0, "33.3%", "100%"), (0, 0, 66.6, 100)),
        ((1.5, 2, 3, 4), (1.5, 2, 4.5, 6)),
        ("66.7%,0,33.3%,1", (133.4, 0, 200, 1)),
    ],
)
def test_a_crop_counts_from_the_top_left_in_units_or_percent(crop: Any, box: tuple[float, ...]) -> None:
    assert parse_crop(crop).box((200, 100), "the page", "pixels") == pytest.approx(box)


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        ("1,2,3", "the crop '1,2,3' is not four numbers of 0 or more; write x,y,width,height, for instance"),
        ("a,b,c,d", "is not four numbers"),
        ("-1,0,5,5", "is not four numbers of 0 or more"),
        ("0,0,nan,5", "is not four numbers"),
        ("0,0,0,5", "the crop '0,0,0,5' has no width or no height"),
        ((1, 2, 3, 4, 5), "is not four numbers"),
    ],
)
def test_a_crop_that_makes_no_sense_is_refused_at_once(crop: Any, message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        open_pages([GOOD], crop=crop)
    assert message in str(caught.value)


@pytest.mark.parametrize("password", ["a\0b", "\udcff"])
def test_a_password_that_cannot_be_one_is_refused_at_once(password: str) -> None:
    with pytest.raises(SelectionError, match="the password holds a character that no password can have"):
        open_pages([GOOD], password=password)


# --- what is found ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of pictures and other things, and the current one above it."""
    names = ("page10.png", "page2.PNG", "Page1.png", "notes.txt", ".hidden.png", "sub/a.jpg", ".git/b.png", "sub/c.d")
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise_picture((8, 8), len(name)), "JPEG" if name.endswith("jpg") else "PNG"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def sources(*inputs: str | Path) -> list[str]:
    return [item.source for item in read(*inputs)]


IN_ORDER = ["in/Page1.png", "in/page2.PNG", "in/page10.png", "in/sub/a.jpg"]


@pytest.mark.usefixtures("folder")
def test_a_directory_gives_known_files_in_natural_order_and_paths_as_given() -> None:
    assert sources("in") == IN_ORDER
    assert sources("./in/") == [f"./{name}" for name in IN_ORDER]
    assert sources(Path("in")) == IN_ORDER


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in/*.png", ["in/Page1.png", "in/page10.png"]),
        ("in/[pP]age?.*", ["in/Page1.png", "in/page2.PNG"]),
        ("in/**/*.jpg", ["in/sub/a.jpg"]),
        ("i*", IN_ORDER),
        ("in/s*", ["in/sub/a.jpg"]),
    ],
)
def test_a_glob_that_the_shell_did_not_expand_is_expanded(pattern: str, expected: list[str]) -> None:
    assert sources(pattern) == expected


def test_a_file_whose_name_looks_like_a_glob_is_that_file(folder: Path) -> None:
    (folder / "scan[1].png").write_bytes(GOOD.read_bytes())
    assert sources("in/scan[1].png") == ["in/scan[1].png"]


def test_each_file_is_read_once_and_given_order_is_kept(folder: Path) -> None:
    assert sources("in/page10.png", "in", folder / "page2.PNG", "in/*.png") == [
        "in/page10.png",
        "in/Page1.png",
        "in/page2.PNG",
        "in/sub/a.jpg",
    ]


def test_a_file_named_openly_is_read_whatever_its_suffix(folder: Path) -> None:
    assert [type(item) for item in read("in/notes.txt", "in/sub/c.d")] == [Page, Page]
    (folder / "notes.txt").write_text("nothing to see")
    assert "'in/notes.txt' holds text; expected PNG" in str(failure("in/notes.txt").error)


def test_links_to_files_are_followed_and_those_to_directories_are_not(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    (folder / "zz.png").symlink_to(folder / "page2.PNG")
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    assert sources("in") == ["in/dangling.png", *IN_ORDER[:3], *IN_ORDER[3:], "in/zz.png"]
    assert "'in/dangling.png' is a link to '" in str(failure("in/dangling.png").error)
    assert "gone.png', which is not there" in str(failure("in/dangling.png").error)


def test_pipes_in_a_directory_are_left_alone_and_one_that_is_named_is_read(folder: Path) -> None:
    pipe = folder / "pipe.png"
    os.mkfifo(pipe)
    assert sources("in") == IN_ORDER
    assert count_pages([pipe, "in"]).pages is None
    writer = threading.Thread(target=lambda: pipe.write_bytes(GOOD.read_bytes()))
    writer.start()
    same(one(pipe).image, load_image(GOOD))
    writer.join()


def test_names_that_are_no_utf8_become_text_that_can_be_written(folder: Path) -> None:
    name = os.fsencode(folder) + b"/sub/\xff.png"
    Path(os.fsdecode(name)).write_bytes(GOOD.read_bytes())
    page = next(item for item in read("in") if "xff" in item.source)
    assert isinstance(page, Page)
    assert page.source == "in/sub/\\xff.png"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gone.png", "there is no file or directory 'gone.png'."),
        ("in/*.pdf", "no file matches 'in/*.pdf'; is it the right directory?"),
        ("in/.git/b", "there is no file or directory"),
        ("", "an input is empty text"),
    ],
)
def test_an_input_that_gives_nothing_is_an_error_alone_and_a_failure_beside_others(given: str, message: str) -> None:
    for call in (open_pages, count_pages):
        with pytest.raises(DocumentError) as caught:
            call([given])  # at once: nothing is iterated
        assert message in str(caught.value)
    found = read(given, "in/page2.PNG")
    assert [type(item) for item in found] == [PageFailure, Page]
    assert isinstance(found[0], PageFailure)
    assert found[0].number is None
    assert message in str(found[0].error)


def test_several_inputs_that_give_nothing_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").write_text("x")
    with pytest.raises(DocumentError) as caught:
        open_pages([tmp_path / "empty", "gone.png", "*.none"])
    message = str(caught.value)
    assert "empty' holds nothing to read; expected PNG, JPEG, WebP, TIFF, BMP, GIF or PDF, by their usual" in message
    assert "there is no file or directory 'gone.png'." in message
    assert "no file matches '*.none'" in message
    with pytest.raises(DocumentError, match="nothing to read; give files, directories or globs, or '-'"):
        open_pages([])


@pytest.fixture
def no_root() -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")


@pytest.mark.usefixtures("no_root")
def test_files_and_directories_without_permission_are_failures(folder: Path) -> None:
    (folder / "page2.PNG").chmod(0)
    (folder / "sub").chmod(0)
    try:
        errors = [str(item.error) for item in read("in") if isinstance(item, PageFailure)]
        assert any("the directory 'in/sub' cannot be read: Permission denied." in error for error in errors)
        assert any("'in/page2.PNG' cannot be read: Permission denied." in error for error in errors)
    finally:
        (folder / "sub").chmod(0o700)


def test_errors_of_the_disk_are_failures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "page2.PNG":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    def walk(top: str, onerror: Any) -> Iterator[Any]:
        onerror(PermissionError(13, "Permission denied", f"{top}/locked"))
        yield top, [], ["page2.PNG", "page10.png"]

    opened = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(os, "walk", walk)
    found = [str(item.error) if isinstance(item, PageFailure) else item.source for item in read(folder.name)]
    assert found == [
        "the directory 'in/locked' cannot be read: Permission denied.",
        "'in/page2.PNG' cannot be read: Permission denied.",
        "in/page10.png",
    ]


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["png", "pdf", "tiff"])
def test_standard_input_is_recognised_by_its_content(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise_picture((40, 30))
    data = pdf_bytes(scan_pdf(image, image)) if kind == "pdf" else encoded(image, kind)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert count_pages(["-"]) == count_pages(["-", "-"])
    assert (count_pages(["-"]).documents, count_pages(["-"]).pages) == (1, None)
    pages = read("-", "-", view=VIEW)
    assert [(page.source, page.number) for page in pages] == [("-", i) for i in range(1, 3 if kind == "pdf" else 2)]
    for page in pages:
        assert isinstance(page, Page)
        same(page.image, image)


def test_standard_input_that_holds_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert str(failure("-").error) == "standard input is empty (0 bytes)."
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"")))
    assert "standard input is a terminal; pipe a picture or PDF into it" in str(failure("-").error)
    assert str(failure("/dev/null").error) == "'/dev/null' is a device or a socket; give a file, a directory or a pipe."


# --- pictures ---


def png(width: int, height: int, rows: int = 0, data: bytes = b"", interlaced: int = 0) -> bytes:
    """A PNG that claims width x height grey pixels and has `rows` black rows of them, or `data`."""
    return png_of(width, height, idat=zlib.compress(data or bytes(rows * (width + 1))), interlaced=interlaced)


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
    assert (page.image.mode, page.number, page.n_pages, page.dpi, page.warnings) == ("RGB", 1, 1, None, ())
    assert page.size_px == (150, 100)
    assert page.digest == image_digest(load_image(path)).hex()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_stand_upright(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = tmp_path / "picture"
    path.write_bytes(encoded(text_picture((60, 40)), kind, exif=exif))
    with Image.open(path) as opened:
        opened.load()
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    same(one(path).image, expected)


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
    assert "the crop 0,0,41,60 reaches to 41 x 60, but 'a.png' has 40 x 60 pixels; give x,y,width,height inside" in str(
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


TIFF_PAGES = [
    noise_picture((50, 30), 1),
    text_picture((40, 60)).convert("L"),
    text_picture((64, 64), 2).convert("1"),
    noise_picture((10, 90), 3),
]


def tiff(*pages: Image.Image, **options: Any) -> bytes:
    return encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:], **options)


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
    kinds = [0, 1, 4, 2]  # page, smaller copy, mask, page of several
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
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[5, 256, 65535]], dtype=np.uint16)).save(path)
    (warning,) = one(path).warnings
    assert "deep.png' is greyscale with values up to 65535" in warning


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_ends_too_soon_is_read_with_a_warning(progressive: bool, tmp_path: Path) -> None:
    """Its decoder makes up the rest in silence."""
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_that_lies(progressive=progressive))
    assert "has an edge of one even grey, as where a JPEG's data ends too soon" in one(path).warnings[0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (64, 48)])
def test_whole_pngs_are_not_taken_for_liars(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise_picture(size).convert("L" if mode == "I;16" else mode).convert(mode).save(path)
    same(one(path).image, load_image(path))


def test_interlaced_pngs_are_measured_pass_by_pass(tmp_path: Path) -> None:
    """By hand, since Pillow writes none: 3 x 5 grey pixels in six of the seven passes of Adam7."""
    path = tmp_path / "a.png"
    passes = [(1, 1), (1, 1), (1, 2), (2, 1), (1, 3), (3, 2)]  # columns, rows of those that are not empty
    rows = b"".join(bytes([0, *[90] * columns]) * n for columns, n in passes)
    path.write_bytes(png(3, 5, data=rows, interlaced=1))
    same(one(path).image, np.full((5, 3, 3), 90, np.uint8))
    path.write_bytes(png(3, 5, data=rows[:-4], interlaced=1))
    assert "but holds 21 of 25 bytes of them" in str(failure(path).error)


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


# --- how large a PDF page is drawn ---


def shapes() -> list[tuple[float, float]]:
    rng = random.Random(4)
    found = [LETTER, (595.276, 841.89), (842, 595), (30, 3), (200, 1.5), (100, 100)]
    return found + [(rng.uniform(10, 2000), rng.uniform(10, 2000)) for _ in range(400)]


@VIEWS
def test_the_useful_size_is_what_the_model_shrinks_larger_pages_to_and_no_less(view: VisionConfig) -> None:
    pinpoints = view.tiling.image_grid_pinpoints
    for width, height in shapes():
        size = useful_size((width, height), view.tiling)
        scales = [min(w / width, h / height) for h, w in pinpoints]
        assert size[0] / width >= max(scales) * 0.999  # no grid would show more
        assert fit_size(size, best_resolution(size, pinpoints)) == size  # and this one is not resized again
        twice = render_size((width, height), None, view.tiling)
        if twice == (2 * size[0], 2 * size[1]):  # all but pages that are drawn at the limits
            assert fit_size(twice, best_resolution(twice, pinpoints)) == size
        else:
            assert min(width, height) < 50


def test_the_sizes_of_ordinary_pages() -> None:
    assert useful_size(LETTER, VIEW.tiling) == (891, 1152)  # 3 x 3 tiles, as the page at 200 dpi
    assert useful_size((792, 612), VIEW.tiling) == (1152, 891)
    assert useful_size((100, 1000), VIEW.tiling) == (384, 3840)
    assert render_size(LETTER, None, None) == (1700, 2200)


@pytest.mark.parametrize("tiling", [None, VIEW.tiling])
@pytest.mark.parametrize("scan", [None, (1000.0, 1000.0)])
def test_pages_of_any_size_are_drawn_within_limits(tiling: Any, scan: Any) -> None:
    for shape in ((14400, 14400), (14400, 0.01), (0.01, 0.01), *shapes()):
        width, height = render_size(shape, scan, tiling)
        assert width * height <= MAX_PIXELS * 1.001
        assert min(width, height) >= 1


# --- PDF pages ---


def colour_at(image: Image.Image, x: float, y: float, size: tuple[float, float] = LETTER) -> Any:
    """The pixel at (x, y) points from the top left of a page of `size`."""
    return image.getpixel((int(x / size[0] * image.width), int(y / size[1] * image.height)))


def colours(image: Image.Image) -> set[Any]:
    return {colour for _, colour in image.getcolors(1 << 24) or []}


RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def corner_page() -> pikepdf.Pdf:
    """Red top left, green top right, blue bottom left; squares of an inch, an inch from the edges of a letter page."""
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
        scale = np.array([page.image.width / 612, page.image.height / 792] * 2)
        np.testing.assert_allclose(found, np.array([left, top, left + 72, top + 72]) * scale, atol=1)
    assert colour_at(page.image, 300, 300) == WHITE
    assert page.dpi == pytest.approx(page.image.width / 8.5, abs=0.05)


@pytest.mark.parametrize(("turn", "corner"), [(0, (108, 108)), (90, (684, 108)), (180, (504, 684)), (270, (108, 504))])
def test_a_turned_page_stands_upright(turn: int, corner: tuple[int, int], tmp_path: Path) -> None:
    pdf = corner_page()
    pdf.pages[0].Rotate = turn
    page = one(write(tmp_path / "a.pdf", pdf), view=VIEW)
    shown = LETTER if turn % 180 == 0 else (792, 612)
    assert page.size_px == useful_size(shown, VIEW.tiling)
    assert colour_at(page.image, *corner, shown) == RED


def test_only_what_the_crop_box_shows_is_drawn(tmp_path: Path) -> None:
    pdf = corner_page()
    pdf.pages[0].CropBox = [36, 576, 336, 776]  # around the red square, which is now 36 points from its left
    page = one(write(tmp_path / "a.pdf", pdf), view=VIEW)
    assert page.size_px == useful_size((300, 200), VIEW.tiling)
    assert colour_at(page.image, 40, 60, (300, 200)) == RED
    assert colour_at(page.image, 30, 60, (300, 200)) == WHITE
    assert GREEN not in colours(page.image)


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
    dark = np.asarray(page.image.convert("L")) < 128
    rows, columns = np.nonzero(dark)
    with pypdfium2.PdfDocument(path) as pdf:
        text = pdf[0].get_textpage()
        boxes = np.array([text.get_charbox(i) for i in range(3)])  # left, bottom, right, top
    scale = page.image.width / 612
    expected = (boxes[:, 0].min(), 792 - boxes[:, 3].max(), boxes[:, 2].max(), 792 - boxes[:, 1].min())
    np.testing.assert_allclose(
        [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.array(expected) * scale, atol=1.5
    )


def test_hairlines_stay_as_light_as_they_are_thin(tmp_path: Path) -> None:
    """At the final size PDFium would draw them a whole pixel wide."""
    pdf = pikepdf.new()
    add_page(pdf, "0.2 w 0 400 m 612 400 l S")
    column = np.asarray(one(write(tmp_path / "a.pdf", pdf), view=VIEW).image.convert("L"))[:, 400].astype(float)
    ink_px = (255 - column).sum() / 255
    assert ink_px == pytest.approx(0.5, abs=0.1)  # the least that twice the size allows; it should be 0.29


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
    image = one(path, view=VIEW).image
    assert colour_at(image, 325, 267) == pytest.approx(GREY, abs=1)
    field = np.asarray(image.convert("L"))[int(452 * 1.4545) : int(492 * 1.4545), int(200 * 1.4545) : int(400 * 1.4545)]
    assert (field < 100).sum() > 100  # letters
    assert np.median(field) == 255  # and no highlight behind them
    part = one(path, view=VIEW, crop="200,452,200,40").image  # the field alone, and not one pixel of the squares
    assert (np.asarray(part.convert("L")) < 100).mean() == pytest.approx((field < 100).mean(), rel=0.25)
    assert RED not in colours(part)


def test_transparency_falls_on_white(tmp_path: Path) -> None:
    pdf = pikepdf.new()
    page = add_page(pdf, "/G gs " + square(72, 648, "1 0 0"))
    page.Resources.ExtGState = pikepdf.Dictionary(G=pikepdf.Dictionary(ca=0.5))
    image = one(write(tmp_path / "a.pdf", pdf), view=VIEW).image
    assert image.mode == "RGB"
    assert colour_at(image, 108, 108) == pytest.approx((255, 127, 127), abs=1)


@pytest.mark.parametrize("view", [VIEW, None])
@pytest.mark.parametrize("crop", ["306,39.6,306,198", "50%,5%,50%,25%", "50%,39.6,306,25%"])
def test_a_crop_of_a_page_gets_the_whole_resolution(view: VisionConfig | None, crop: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", corner_page())
    whole, part = one(path, view=view), one(path, view=view, crop=crop)
    assert part.size_px == (useful_size((306, 198), VIEW.tiling) if view else (850, 550))
    for x, y, colour in ((164, 34, GREEN), (232, 102, GREEN), (160, 34, WHITE), (236, 102, WHITE)):
        assert colour_at(part.image, x, y, (306, 198)) == colour
    if view:
        assert whole.dpi and part.dpi and part.dpi > 1.9 * whole.dpi


def test_a_crop_of_a_turned_page_counts_from_the_corner_that_is_seen(tmp_path: Path) -> None:
    pdf = corner_page()
    pdf.pages[0].Rotate = 90
    path = write(tmp_path / "a.pdf", pdf)
    part = one(path, view=VIEW, crop="600,36,150,150").image
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
    assert colours(part.image) == {RED}


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
    expected, found = cut(picture, view.tiling), cut(page.image, view.tiling)
    np.testing.assert_array_equal(found[1:], expected[1:])
    assert np.abs(found[0].astype(int) - expected[0]).mean() < 2  # the overview is shrunk twice


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
    """As compressed scans have it: text as a mask of 150 dpi over one black pixel."""
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
    shown = np.asarray(page.image.convert("L").resize(picture.size)).astype(float)
    assert np.abs(shown - np.asarray(picture)).mean() < 12
    assert capfd.readouterr().err == ""


def test_a_fax_keeps_the_shape_of_its_page(tmp_path: Path) -> None:
    pdf = pikepdf.new()
    page = add_page(pdf, "q 612 0 0 792 0 0 cm /I Do Q")
    add_image(pdf, page, noise_picture((867, 561)))  # 102 dpi across, 51 down
    assert one(write(tmp_path / "a.pdf", pdf), view=VIEW).size_px == (867, 1122)


# --- what cannot be read ---


def bmp_that_lies() -> bytes:
    data = bytearray(encoded(noise_picture((20, 20)), "BMP"))
    data[18:26] = struct.pack("<ii", 2000, 2000)
    return bytes(data)


def tiff_that_lies() -> bytes:
    """Twice as high as its one strip."""
    data = bytearray(encoded(noise_picture((20, 20)), "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0] + 2
    for entry in range(start, len(data) - 12, 12):
        if struct.unpack_from("<H", data, entry)[0] == 257:
            struct.pack_into("<I", data, entry + 8, 40)
            return bytes(data)
    raise AssertionError


def jpeg_that_lies(**options: Any) -> bytes:
    """Twice as high as its data."""
    data = bytearray(encoded(noise_picture((64, 64)), "JPEG", **options))
    start = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    struct.pack_into(">H", data, start + 5, 128)
    return bytes(data)


def jpeg2000_pdf(size: tuple[int, int]) -> bytes:
    """A page with a JPEG 2000 picture whose header says another size than the page."""
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
PDF_IS_DAMAGED = "'bad.pdf' is damaged: PDFium finds no document in it; get a whole copy of it."
LIES = "'bad.png' says that it has {} pixels, but holds {} of them; get a whole copy of it."
BOMB = "has more than 89,478,485 pixels, which may be a decompression bomb"
BAD = [
    pytest.param("bad.png", b"", "'bad.png' is empty (0 bytes).", id="empty"),
    pytest.param("bad.pdf", b"", "'bad.pdf' is empty (0 bytes).", id="empty PDF"),
    pytest.param("bad.png", bytes(500), "'bad.png' holds zero bytes alone; expected PNG", id="zeros"),
    pytest.param("bad.pdf", b"<!DOCTYPE html><p>404", "'bad.pdf' holds a web page; expected PNG", id="web page"),
    pytest.param("bad.jpg", b"PK\x03\x04" + bytes(99), "holds an office document or a ZIP archive", id="office"),
    pytest.param("bad.jpg", b"\0\0\0\x18ftypheic" + bytes(9), "holds a HEIF or AVIF picture", id="HEIF"),
    pytest.param("bad.tif", "Zwölf Bücher".encode(), "'bad.tif' holds text; expected", id="text"),
    pytest.param("bad.tif", b"\x89\x01\xfe" * 99, "neither a picture nor a document that we know", id="noise"),
    pytest.param("bad.png", png(300, 200, 10), LIES.format("300 x 200", "3,010 of 60,200 bytes"), id="PNG lies"),
    pytest.param(
        "bad.tif", tiff_that_lies(), "high, but holds 1 of 2 strips of them; get a whole copy", id="TIFF lies"
    ),
    pytest.param(
        "bad.bmp", bmp_that_lies(), "'bad.bmp' cannot be read as a picture: image file is trunc", id="BMP lies"
    ),
    pytest.param("bad.png", png(30_000, 30_000, 1), f"'bad.png' {BOMB}", id="PNG bomb"),
    pytest.param("bad.png", png(10_000, 10_000, 1), f"'bad.png' {BOMB}", id="smaller bomb"),
    pytest.param(
        "bad.jpg", encoded(noise_picture((99, 99)), "JPEG")[:2000], "image file is truncated", id="JPEG cut short"
    ),
    pytest.param("bad.webp", encoded(noise_picture((99, 99)), "WEBP")[:900], "'bad.webp' ", id="WebP cut short"),
    pytest.param(
        "bad.tif", b"II*\0\x08\0\0\0", "'bad.tif' is not a picture that Pillow can read", id="TIFF without pages"
    ),
    pytest.param("bad.pdf", b"%PDF-1.7\nand nothing more", "'bad.pdf' is cut short: PDFium finds no", id="bare PDF"),
    pytest.param("bad.pdf", PDF[: len(PDF) // 2], "'bad.pdf' is cut short: PDFium finds no", id="half a PDF"),
    pytest.param("bad.pdf", b"%PDF-1.7\n" + b"junk " * 99 + b"\n%%EOF\n", PDF_IS_DAMAGED, id="damaged PDF"),
    pytest.param("bad.pdf", pdf_bytes(pikepdf.new()), "'bad.pdf' has no pages.", id="PDF without pages"),
    pytest.param(
        "bad.pdf", locked(user="u", owner="o"), "is encrypted; give its password with '--password'.", id="locked"
    ),
    pytest.param("bad.pdf", strange_encryption(), "is encrypted in a way that PDFium does not know", id="strange lock"),
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
    opened = isinstance(bad.error, ImageError) and "not a picture" not in message
    assert bad.number == (1 if opened else None)
    assert message in str(bad.error)
    assert count_pages([name, GOOD]) == count_pages([GOOD, name])
    assert count_pages([name, GOOD]).pages == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(
            jpeg2000_pdf((30_000, 30_000)),
            "page 1 of 'bad.pdf' holds a picture of 30,000 x 30,000 pixels, more than 89,478,485 together",
            id="JPEG 2000",
        ),
        pytest.param(huge_image_pdf(), "holds a picture of 100,000 x 100,000 pixels, more than 4,000,", id="Flate"),
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
    assert "a.pdf' is encrypted, and not with the password that was given." in str(failure(path, password="no").error)
    assert one(tmp_path / "plain.pdf", view=VIEW, password="hush").digest == plain.digest


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
        assert f"the crop 600,0,20,20 reaches to 620 x 20, but page {item.number} of '" in str(item.error)
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


def test_a_pdf_without_its_end_is_read_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(PDF.replace(b"%%EOF", b""))
    for page in read(path, view=VIEW):
        assert isinstance(page, Page)
        assert "has no end mark: it may be cut short" in page.warnings[0]


def test_a_form_that_only_adobe_can_draw_is_read_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pdf = text_pdf("Please wait...")
    template = pikepdf.Stream(pdf, b"<xdp:xdp xmlns:xdp='http://ns.adobe.com/xdp/'></xdp:xdp>")
    pdf.Root.AcroForm = pikepdf.Dictionary(Fields=[], XFA=template)
    pdf.Root.NeedsRendering = True
    page = one(write(tmp_path / "a.pdf", pdf), view=VIEW)
    assert "is an XFA form, of which only the placeholder can be drawn" in page.warnings[0]
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
    assert str(found[1].error).startswith(f"page 2 of '{path}' cannot be read as a picture:")


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
    """Every outcome is a page or a failure with a message, whatever the bytes."""
    rng = random.Random(7)
    files = {
        "a.tif": tiff(*TIFF_PAGES[:3], compression="tiff_lzw"),
        "b.png": encoded(noise_picture((20, 20))),
        "c.gif": encoded(noise_picture((20, 20)).quantize(16), "GIF"),
        "d.pdf": PDF,
    }
    for name, whole in files.items():
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 3, 10))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            (tmp_path / name).write_bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data)
            for item in read(tmp_path / name, view=SMALL_VIEW):
                assert isinstance(item, Page) or (isinstance(item.error, Granite4vError) and str(item.error))


# --- how it behaves over time ---


def test_documents_are_opened_one_at_a_time_and_closed(tmp_path: Path) -> None:
    write(tmp_path / "a.pdf", text_pdf("1", "2"))
    write(tmp_path / "b.pdf", text_pdf("3"))
    (tmp_path / "c.tif").write_bytes(tiff(*TIFF_PAGES))

    def opened() -> set[str]:
        return {Path(file.path).name for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))}

    pages = open_pages([tmp_path], view=SMALL_VIEW)
    assert opened() == set()
    seen = [(page.source[-5:], opened()) for page in pages]
    assert seen == [("a.pdf", {"a.pdf"})] * 2 + [("b.pdf", {"b.pdf"})] + [("c.tif", {"c.tif"})] * 4
    assert opened() == set()
    pages = open_pages([tmp_path], view=SMALL_VIEW)
    next(pages)
    pages.close()
    assert opened() == set()


def test_a_document_that_vanishes_on_the_way_is_a_failure(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(GOOD.read_bytes())
    write(tmp_path / "c.pdf", text_pdf(*map(str, range(12))))
    pages = open_pages([tmp_path], view=SMALL_VIEW)
    next(pages)
    (tmp_path / "b.png").unlink()
    gone = next(pages)
    assert isinstance(gone, PageFailure)
    assert "b.png' cannot be read: No such file or directory." in str(gone.error)
    next(pages)
    (tmp_path / "c.pdf").unlink()
    assert "c.pdf' cannot be read; is it still there?" in str(list(pages)[-1].error)  # type: ignore[union-attr]


def test_importing_loads_no_library() -> None:
    code = "import sys, granite4v.runtime.pages; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pypdfium2", "PIL", "numpy", "llama_cpp"} & set(loaded)


MEMORY = """
import sys, psutil
from test_pages import SMALL_VIEW
from granite4v.runtime.pages import Page, open_pages

seen = []
for page in open_pages(sys.argv[1:], view=SMALL_VIEW):
    assert isinstance(page, Page)
    seen.append(psutil.Process().memory_info().rss >> 20)
print(max(seen[:20]), max(seen[20:]), len(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scans", "text", "tiff"])
def test_memory_stays_flat_over_hundreds_of_pages(kind: str, tmp_path: Path) -> None:
    """PDFium keeps what it has read of a document until that is closed: 200 scans of 1.2 MB would show."""
    if kind == "scans":
        pdf = scan_pdf(*(noise_picture((700, 600), seed) for seed in range(200)))
        path = write(tmp_path / "a.pdf", pdf, compress_streams=False)
        assert path.stat().st_size > 200 << 20
    elif kind == "text":
        path = write(tmp_path / "a.pdf", text_pdf(*(f"page {i}" for i in range(200))))
    else:
        path = tmp_path / "a.tif"
        path.write_bytes(tiff(*(noise_picture((400, 300), seed) for seed in range(200))))
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here}
    command = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    early, late, n_pages = map(int, done.stdout.split())
    assert n_pages == 200
    assert late <= early + 20, f"{early} MB in the first 20 pages, then up to {late} MB"
