"""Pages, one after another, of whatever a person names. What cannot be read is a failure in its place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from granite4v.errors import DocumentError, Granite4vError
from granite4v.runtime.pages.book import Book, Drawn
from granite4v.runtime.pages.selection import Crop, PageRanges, SelectionError, parse_crop, parse_pages
from granite4v.runtime.pages.sources import (
    Document,
    Kind,
    NotFound,
    find_documents,
    is_read_once,
    read_content,
    recognize,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from granite4v.families.base import TilingConfig, VisionConfig

Inputs = Sequence[str | os.PathLike[str]]
ALL_PAGES = PageRanges(((1, None),))


@dataclass(frozen=True, eq=False)
class Page:
    """One page to read.

    `source`: the document's path as it was given, '-' for standard input. `number` counts from 1, of `n_pages`.
    `image`: upright Pillow RGB, transparency on white, cropped. `digest` stands for its pixels: SHA-256 in hexadecimal
    digits, equal for equal pixels whatever file they came from. `dpi`: pixels an inch of a PDF's page, rounded to a
    tenth; None for pictures. `warnings`: what a person should know of the page.
    """

    source: str
    number: int
    n_pages: int
    image: Image = field(repr=False)
    digest: str
    dpi: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height)"""
        return self.image.size


@dataclass(frozen=True)
class PageFailure:
    """A page, or with `number` None a document, that cannot be read, and why."""

    source: str
    number: int | None
    error: Granite4vError


@dataclass(frozen=True)
class Totals:
    """How much there is to read; `pages` is None when that cannot be known beforehand (standard input, pipes)."""

    documents: int
    pages: int | None


def open_pages(
    inputs: Inputs,
    *,
    pages: str | PageRanges | None = None,
    password: str | None = None,
    crop: str | Sequence[float | str] | Crop | None = None,
    view: VisionConfig | None = None,
) -> Generator[Page | PageFailure, None, None]:
    """The pages of `inputs`, each opened when it is asked for, and not kept.

    `inputs`: files (PNG, JPEG, WebP, BMP, GIF, TIFF, PDF), directories, globs, '-' for standard input; see
    `find_documents`. `pages`: which of each document, for instance '1-3,7,10-'. `password`: for encrypted PDFs.
    `crop`: 'x,y,width,height' of a part of each page, see `Crop`. `view`: the model that will look at the pages, which
    decides how large those of a PDF are drawn (see `resolution`); without one at 200 dpi.

    Raises at once SelectionError for pages, a crop or a password that cannot be meant so, and DocumentError when there
    is nothing at all to read. Everything after that is a PageFailure: a page that is missing or damaged, or, with
    `number` None, a document. No two have the same source and number. Close it to close the document it is at.
    """
    _check_password(password)
    ranges, area = _ranges(pages), None if crop is None else parse_crop(crop)
    return _pages(find_documents(inputs), ranges, password, area, None if view is None else view.tiling)


def count_pages(inputs: Inputs, *, pages: str | PageRanges | None = None, password: str | None = None) -> Totals:
    """How much `open_pages` will yield, failures included, without drawing a page. Raises what it raises at once."""
    _check_password(password)
    ranges, documents = _ranges(pages), find_documents(inputs)
    counts = [_count(item, ranges, password) for item in documents]
    known = [count for count in counts if count is not None]
    return Totals(len(documents), sum(known) if len(known) == len(counts) else None)


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
    except Granite4vError:
        return 1


def _pages(
    documents: Sequence[Document | NotFound],
    ranges: PageRanges,
    password: str | None,
    crop: Crop | None,
    tiling: TilingConfig | None,
) -> Generator[Page | PageFailure, None, None]:
    for item in documents:
        if isinstance(item, NotFound):
            yield PageFailure(item.source, None, item.error)
            continue
        try:
            book = _open(item, password)
        except Granite4vError as error:
            yield PageFailure(item.source, None, error)
            continue
        with contextlib.closing(book):
            yield from _pages_of(book, item, ranges, crop, tiling)


def _pages_of(
    book: Book, document: Document, ranges: PageRanges, crop: Crop | None, tiling: TilingConfig | None
) -> Iterator[Page | PageFailure]:
    n_pages = book.n_pages
    for first, last in ranges.of(n_pages):
        if first > n_pages:
            yield PageFailure(document.source, first, _no_such_page(document.name, n_pages, first, last))
            continue
        try:
            drawn = book.draw(first, crop, tiling)
        except Granite4vError as error:
            yield PageFailure(document.source, first, error)
            continue
        page = _page(document.source, first, n_pages, drawn)
        del drawn
        yield page
        del page  # its pixels are the caller's alone while the next page is drawn
    if book.damage is not None:
        yield PageFailure(document.source, None, DocumentError(book.damage))


def _page(source: str, number: int, n_pages: int, drawn: Drawn) -> Page:
    from granite4v.runtime.prompt import image_digest

    return Page(source, number, n_pages, drawn.image, image_digest(drawn.image).hex(), drawn.dpi, drawn.warnings)


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
