"""Pages, one after another, of whatever a person names. What cannot be read is a failure in its place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from granite4v.errors import DocumentError, Granite4vError
from granite4v.runtime.pages.book import Book, Drawn
from granite4v.runtime.pages.selection import Crop, PageRanges, SelectionError, parse_crop, parse_pages
from granite4v.runtime.pages.sources import (
    Document,
    Kind,
    NotFound,
    file_state,
    find_documents,
    is_read_once,
    read_content,
    recognize,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from granite4v.families.base import TilingConfig, VisionConfig

Inputs = Sequence[str | os.PathLike[str]]
Wanted = Callable[[str, int, str | None], bool]  # (source, number, file_state): whether to render the page
Waiting = Callable[[str, int | None, float], None]  # (source, number or None while opening, seconds so far)
ALL_PAGES = PageRanges(((1, None),))


@dataclass(frozen=True, eq=False)
class Page:
    """One page to read.

    `source`: the document's path as it was given, '-' for standard input. `number` counts from 1, of `n_pages`.
    `image`: upright Pillow RGB, transparency on white, cropped. `digest` stands for its pixels: SHA-256 in hexadecimal
    digits, equal for equal pixels whatever file they came from. `dpi`: pixels an inch of a PDF's page, rounded to a
    tenth; None for pictures. `warnings`: what a person should know of the page. `file_state` changes when the
    document's file does; None for what is not a file (standard input, pipes).
    """

    source: str
    number: int
    n_pages: int
    image: Image = field(repr=False)
    digest: str
    dpi: float | None = None
    warnings: tuple[str, ...] = ()
    file_state: str | None = None

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height)"""
        return self.image.size


@dataclass(frozen=True)
class PageFailure:
    """A page, or with `number` None a document, that cannot be read, and why; `file_state` as in Page."""

    source: str
    number: int | None
    error: Granite4vError
    file_state: str | None = None


@dataclass(frozen=True)
class PageSkipped:
    """A page that was not rendered, because `wanted` returned False for it; fields as in Page."""

    source: str
    number: int
    n_pages: int
    file_state: str | None


@dataclass(frozen=True)
class Totals:
    """How much there is to read.

    `pages` is None when that cannot be known beforehand (standard input, pipes). `notes`: lines for a person, for
    instance about files of a folder that were left out.
    """

    documents: int
    pages: int | None
    notes: tuple[str, ...] = ()


def open_pages(
    inputs: Inputs,
    *,
    pages: str | PageRanges | None = None,
    password: str | None = None,
    crop: str | Sequence[float | str] | Crop | None = None,
    view: VisionConfig | None = None,
    wanted: Wanted | None = None,
    waiting: Waiting | None = None,
    counted: Totals | None = None,
) -> Generator[Page | PageFailure | PageSkipped, None, None]:
    """The pages of `inputs`, each opened when it is asked for, and not kept.

    `inputs`: files (PNG, JPEG, WebP, BMP, GIF, TIFF, PDF), directories, globs, '-' for standard input; see
    `find_documents`. `pages`: which of each document, for instance '1-3,7,10-'. `password`: for encrypted PDFs.
    `crop`: 'x,y,width,height' of a part of each page, see `Crop`. `view`: the model that will look at the pages, which
    decides how large those of a PDF are drawn (see `resolution`); without one at 200 dpi. `wanted`: called before a
    page is rendered; where it returns False, the page comes as PageSkipped. `waiting`: called about twice a second
    while a document or page takes its time. `counted`: what `count_pages` returned for these inputs, so that nothing
    is searched for or counted twice.

    Raises at once SelectionError for pages, a crop or a password that cannot be meant so, and DocumentError when there
    is nothing at all to read. Everything after that is a PageFailure: a page that is missing or damaged, or, with
    `number` None, a document. No two have the same source and number. Close it to close the document it is at.
    """
    _check_password(password)
    ranges, area = _ranges(pages), None if crop is None else parse_crop(crop)
    tiling = None if view is None else view.tiling
    return _pages(find_documents(inputs), ranges, password, area, tiling, wanted or _all)


def count_pages(inputs: Inputs, *, pages: str | PageRanges | None = None, password: str | None = None) -> Totals:
    """How much `open_pages` will yield, failures included, without drawing a page. Raises what it raises at once."""
    _check_password(password)
    ranges, documents = _ranges(pages), find_documents(inputs)
    counts = [_count(item, ranges, password) for item in documents]
    known = [count for count in counts if count is not None]
    return Totals(len(documents), sum(known) if len(known) == len(counts) else None)


def _all(source: str, number: int, state: str | None) -> bool:
    return True


def _ranges(pages: str | PageRanges | None) -> PageRanges:
    if pages is None:
        return ALL_PAGES
    return pages if isinstance(pages, PageRanges) else parse_pages(pages)


def _check_password(password: str | None) -> None:
    try:
        fits = password is None or "\0" not in password.encode().decode()
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise SelectionError("the password holds a character that no password can have.")


def _count(item: Document | NotFound, ranges: PageRanges, password: str | None) -> int | None:
    """None for what can be read only once."""
    if isinstance(item, NotFound):
        return 1
    if is_read_once(item):
        return None
    try:
        with contextlib.closing(_open(item, password)) as book:
            return ranges.count(book.n_pages) + (book.damage is not None)
    except Exception:  # reported as what it is when the document is read
        return 1


def _pages(
    documents: Sequence[Document | NotFound],
    ranges: PageRanges,
    password: str | None,
    crop: Crop | None,
    tiling: TilingConfig | None,
    wanted: Wanted,
) -> Generator[Page | PageFailure | PageSkipped, None, None]:
    for item in documents:
        if isinstance(item, NotFound):
            yield PageFailure(item.source, None, item.error)
            continue
        state = file_state(item)
        try:
            book = _open(item, password)
        except Exception as error:
            yield PageFailure(item.source, None, readable(error, item.name), state)
            continue
        with contextlib.closing(book):
            yield from _pages_of(book, item, state, ranges, crop, tiling, wanted)


def _pages_of(
    book: Book,
    document: Document,
    state: str | None,
    ranges: PageRanges,
    crop: Crop | None,
    tiling: TilingConfig | None,
    wanted: Wanted,
) -> Iterator[Page | PageFailure | PageSkipped]:
    n_pages = book.n_pages
    for first, last in ranges.of(n_pages):
        if first > n_pages:
            yield PageFailure(document.source, first, _no_such_page(document.name, n_pages, first, last), state)
            continue
        if not wanted(document.source, first, state):
            yield PageSkipped(document.source, first, n_pages, state)
            continue
        try:
            drawn = book.draw(first, crop, tiling)
            page = _page(document.source, first, n_pages, drawn, state)
        except Exception as error:
            name = f"page {first} of {document.name}" if n_pages > 1 else document.name
            yield PageFailure(document.source, first, readable(error, name), state)
            continue
        del drawn
        yield page
        del page  # its pixels are the caller's alone while the next page is drawn
    if book.damage is not None:
        yield PageFailure(document.source, None, DocumentError(book.damage), state)


def readable(error: Exception, name: str) -> Granite4vError:
    """The error as one that a person can use. Whatever a library raises on a file is about that file, never a bug."""
    if isinstance(error, Granite4vError):
        return error
    if isinstance(error, MemoryError):
        return DocumentError(f"{name} needs more memory than there is; scale it down, or split it.")
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return DocumentError(
        f"{name} cannot be read ({what:.200}); it is probably damaged. Open it in another program and save it again."
    )


def _page(source: str, number: int, n_pages: int, drawn: Drawn, state: str | None) -> Page:
    from granite4v.runtime.prompt import image_digest

    digest = image_digest(drawn.image).hex()
    return Page(source, number, n_pages, drawn.image, digest, drawn.dpi, drawn.warnings, state)


def _no_such_page(name: str, n_pages: int, first: int, last: int | None) -> DocumentError:
    has = f"{n_pages} pages" if n_pages > 1 else "1 page"
    is_no = f"is no page {first}" if last in (first, None) else f"are no pages {first} to {last}"
    return DocumentError(f"{name} has {has}; there {is_no}.")


def _open(document: Document, password: str | None) -> Book:
    """Raises DocumentError, ImageError."""
    content = read_content(document)
    kind = recognize(content, document.name)
    try:
        if kind is Kind.PDF:
            from granite4v.runtime.pages.pdf import PdfBook

            return PdfBook(content, document.name, password)
        from granite4v.runtime.pages.pictures import PictureBook, TiffBook

        return (TiffBook if kind is Kind.TIFF else PictureBook)(content, document.name)
    except OSError as error:
        raise DocumentError(f"{document.name} cannot be read: {error.strerror or error}.") from None
