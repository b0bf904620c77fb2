"""Yields the pages of the given inputs one after another. Whatever cannot be read yields a failure instead."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from granite4v.clip_projector.images import Image
from granite4v.errors import DocumentError, Granite4vError, ImageError
from granite4v.families.base import Tiling, VisionConfig
from granite4v.runtime.documents.limits import LIMITS, Limits
from granite4v.runtime.documents.reader import RawPage, Reader, ReaderEnded, RemoteDocument, Waiting
from granite4v.runtime.documents.selection import Crop, PageRanges, SelectionError, parse_crop, parse_pages
from granite4v.runtime.documents.sources import (
    Document,
    NotFound,
    file_state,
    find_documents,
    is_read_once,
    read_once,
)
from granite4v.runtime.documents.urls import RemoteFile

Inputs = Sequence[str | os.PathLike[str]]
Wanted = Callable[[str, int, str | None], bool]  # (source, number, file_state): whether to render the page
# (source, number or None, file_state): how an earlier run failed at a page, or at opening a document
EarlierError = Callable[[str, "int | None", "str | None"], "Granite4vError | None"]
EarlierSource = Callable[[Path], "str | None"]
ALL_PAGES = PageRanges(((1, None),))


@dataclass(frozen=True, eq=False)
class Page:
    """One page to read.

    `source`: the document's path as it was given, '-' for standard input. `number` counts from 1, of `n_pages`.
    `image`: upright, transparency on white, cropped. `dpi`: pixels per inch of a PDF page, rounded to a
    tenth; None for images. `warnings`: what a person should know about the page. `file_state`: changes when the
    document's file does; None for anything that is not a file (standard input, pipes).
    """

    source: str
    number: int
    n_pages: int
    image: Image = field(repr=False)
    dpi: float | None = None
    warnings: tuple[str, ...] = ()
    file_state: str | None = None

    @property
    def digest(self) -> str:
        """The digest of the image, in hexadecimal digits."""
        return self.image.digest.hex()

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
    """How much there is to read, as counted by `count_pages`.

    `pages`: None if that cannot be known in advance (standard input, pipes, URLs). `notes`: messages for a person, for
    instance about files of a folder that were left out.
    """

    documents: int
    pages: int | None
    notes: tuple[str, ...] = ()
    found: _Found | None = field(default=None, repr=False, compare=False)  # for `open_pages`

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the documents in records, in order."""
        return () if self.found is None else tuple(document.source for document in self.found.documents)


@dataclass(frozen=True)
class _Counted:
    """What counting found out about a document: its index, or how it crashed its reader, now or in an earlier run.

    `state`: of its file at that time; the rest is void if the file changes.
    """

    state: str | None
    index: list[int] | None
    error: Granite4vError | None


@dataclass(frozen=True)
class _Found:
    inputs: tuple[str, ...]
    documents: tuple[Document | NotFound, ...]
    counted: Mapping[str, _Counted]


@dataclass(frozen=True)
class _Request:
    """What is requested of each document."""

    ranges: PageRanges
    password: str | None = None
    crop: Crop | None = None
    tiling: Tiling | None = None
    wanted: Wanted | None = None
    earlier_error: EarlierError | None = None


def open_pages(
    inputs: Inputs,
    *,
    pages: str | PageRanges | None = None,
    password: str | None = None,
    crop: str | Sequence[float | str] | Crop | None = None,
    view: VisionConfig | None = None,
    wanted: Wanted | None = None,
    earlier_error: EarlierError | None = None,
    waiting: Waiting | None = None,
    counted: Totals | None = None,
    limits: Limits = LIMITS,
) -> Generator[Page | PageFailure | PageSkipped, None, None]:
    """Yields the pages of `inputs`. Each is rendered while the caller works on the one before; none is kept.

    Files are opened and rendered in a separate process (see `worker`), within `limits`. A page that crashes the
    process, or takes too much time or memory, becomes a PageFailure like any other, and the next page follows.

    `inputs`: files (PNG, JPEG, WebP, BMP, GIF, TIFF, PDF), directories, globs, URLs, '-' for standard input; see
    `find_documents`. `pages`: which of each document, for instance '1-3,7,10-'. `password`: for encrypted PDFs.
    `crop`: 'x,y,width,height' of a part of each page, see `Crop`. `view`: the model that will see the pages, which
    decides how large PDF pages are rendered (see `resolution`); 200 dpi without one. `wanted`: called before a page is
    rendered; if it returns False, a PageSkipped is yielded. `earlier_error`: called for skipped pages; a page counts as
    failed if it returns an error, so that every run gives up a document at the same page. `waiting`: called about twice
    a second while a document or page takes time. `counted`: the result of `count_pages` for these inputs, so that
    nothing is searched for or counted twice.

    Raises at once SelectionError for invalid pages, an invalid crop or password, and DocumentError if there is nothing
    at all to read. Everything after that is a PageFailure: a missing or damaged page, or, with `number` None, a
    document. No two have the same source and number. Close the generator to close the document that it is reading.
    """
    _check_password(password)
    area, tiling = None if crop is None else parse_crop(crop), None if view is None else view.tiling
    request = _Request(_ranges(pages), password, area, tiling, wanted, earlier_error)
    known = None if counted is None else counted.found
    if known is None or known.inputs != _texts(inputs):
        known = _Found(_texts(inputs), tuple(find_documents(inputs)), {})
    return _pages(known, request, Reader(limits, waiting))


def count_pages(
    inputs: Inputs,
    *,
    pages: str | PageRanges | None = None,
    password: str | None = None,
    earlier_error: EarlierError | None = None,
    earlier_source: EarlierSource | None = None,
    waiting: Waiting | None = None,
    limits: Limits = LIMITS,
) -> Totals:
    """Counts what `open_pages` will yield, failures included, without rendering a page. Raises what that raises.

    `earlier_error`: called with page number None before a document is opened; if it returns an error, the document is
    not opened, and `open_pages` yields a PageFailure with that error. `earlier_source`: called with the path of a
    document; its result, unless None, replaces the document's `source`.
    """
    _check_password(password)
    ranges = _ranges(pages)
    notes: list[str] = []
    documents = _named(find_documents(inputs, notes.append), earlier_source)
    counted: dict[str, _Counted] = {}
    n_pages: int | None = 0
    with contextlib.closing(Reader(limits, waiting)) as reader:
        for item in documents:
            request = _Request(ranges, password, earlier_error=earlier_error)
            count = _count(item, request, reader, counted)
            n_pages = None if n_pages is None or count is None else n_pages + count
    found = _Found(_texts(inputs), tuple(documents), counted)
    return Totals(len(documents), n_pages, tuple(dict.fromkeys(notes)), found)


def _texts(inputs: Inputs) -> tuple[str, ...]:
    return tuple(os.fspath(item) for item in inputs)


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
        raise SelectionError("the password holds a zero byte or a lone surrogate, which a password cannot contain.")


def _named(documents: list[Document | NotFound], earlier_source: EarlierSource | None) -> list[Document | NotFound]:
    """Renames documents as an earlier run called them, but never to the name of another document of this run."""
    if earlier_source is None:
        return documents
    taken = {item.source for item in documents}
    named: list[Document | NotFound] = []
    for item in documents:
        source = earlier_source(item.path) if isinstance(item, Document) and item.path is not None else None
        named.append(item if source is None or source in taken else replace(item, source=source))
    return named


def _count(item: Document | NotFound, request: _Request, reader: Reader, counted: dict[str, _Counted]) -> int | None:
    """Returns the number of items that one document yields; None for one that can be read, or is fetched, only once.

    `counted` gets what else was found out.
    """
    if isinstance(item, NotFound):
        return 1
    if is_read_once(item) or item.remote is not None:  # fetched once, when it is read
        return None
    state = file_state(item)
    earlier = None if request.earlier_error is None else request.earlier_error(item.source, None, state)
    if earlier is not None:
        counted[item.source] = _Counted(state, None, earlier)
        return 1
    remote = _remote(item, state, None, request, reader, None)
    try:
        remote.begin_open()
        remote.finish_open()
    except ReaderEnded as error:
        counted[item.source] = _Counted(state, None, error)
        return 1
    except (DocumentError, ImageError):  # reported when it is read
        return 1
    counted[item.source] = _Counted(state, remote.index, None)
    return request.ranges.count(remote.n_pages) + (remote.damage is not None)


def _remote(
    document: Document,
    state: str | None,
    content: bytes | None,
    request: _Request,
    reader: Reader,
    index: list[int] | None,
) -> RemoteDocument:
    return RemoteDocument(
        reader,
        document.source,
        document.name,
        path=None if content is not None else os.fspath(document.path or ""),
        content=content,
        state=state,
        password=request.password,
        index=index,
    )


Item = Page | PageFailure | PageSkipped


def _pages(found: _Found, request: _Request, reader: Reader) -> Generator[Item, None, None]:
    """Holds each item back until the next one has been begun, so that the reader works while the caller does.

    For a document of two pages, `_steps` yields None (opening), None (rendering page 1), page 1, None (rendering
    page 2), page 2. Page 1 is yielded at the third None, page 2 at the end.
    """
    ready: Item | None = None
    with contextlib.closing(reader):
        for item in _steps(found, request, reader):
            if ready is not None:
                handed, ready = ready, None
                yield handed
                del handed  # two pages in memory, not three: the caller's, and the one that is being received
            if item is not None:
                ready = item
            del item
        if ready is not None:
            yield ready


def _steps(found: _Found, request: _Request, reader: Reader) -> Iterator[Item | None]:
    """Yields the items, and None at each point where the reader has begun, or this process is about to begin, work that
    takes time."""
    for item in found.documents:
        if isinstance(item, NotFound):
            yield PageFailure(item.source, None, item.error)
            continue
        state, content = file_state(item), None
        known = found.counted.get(item.source)
        if known is not None and known.error is not None and known.state == state:
            yield PageFailure(item.source, None, known.error, state)
            continue
        if item.remote is not None:
            yield from _fetched(item, item.remote, state, request, reader)
            continue
        if is_read_once(item):
            yield None
            try:
                content = read_once(item, reader.limits)
            except DocumentError as error:
                yield PageFailure(item.source, None, error, state)
                continue
        index = known.index if known is not None and known.state == state else None
        remote = _remote(item, state, content, request, reader, index)
        yield from _opened(remote, item, state, request, reader)


def _fetched(
    document: Document, file: RemoteFile, state: str | None, request: _Request, reader: Reader
) -> Iterator[Item | None]:
    """Yields the pages of a remote file from a local copy, which exists as long as the document is read."""
    yield None
    with contextlib.ExitStack() as held:
        try:
            path = held.enter_context(file.fetched(reader.limits.url_bytes))
        except DocumentError as error:
            yield PageFailure(document.source, None, error, state)
            return
        here = replace(document, path=path, remote=None)
        remote = _remote(here, file_state(here), None, request, reader, None)
        yield from _opened(remote, document, state, request, reader)


def _opened(
    remote: RemoteDocument, document: Document, state: str | None, request: _Request, reader: Reader
) -> Iterator[Item | None]:
    remote.begin_open()
    yield None
    try:
        remote.finish_open()
    except (DocumentError, ImageError) as error:
        yield PageFailure(document.source, None, error, state)
        return
    yield from _pages_of(remote, document, state, request, reader.limits)


def _pages_of(
    remote: RemoteDocument, document: Document, state: str | None, request: _Request, limits: Limits
) -> Iterator[Item | None]:
    source, n_pages = document.source, remote.n_pages
    n_failed = n_ended = 0  # in a row
    for first, last in request.ranges.of(n_pages):
        if first > n_pages:
            yield PageFailure(source, first, _no_such_page(document.name, n_pages, first, last), state)
            continue
        if request.wanted is not None and not request.wanted(source, first, state):
            yield PageSkipped(source, first, n_pages, state)
            failed = None if request.earlier_error is None else request.earlier_error(source, first, state)
            n_failed = 0 if failed is None else n_failed + 1
            n_ended = n_ended + 1 if isinstance(failed, ReaderEnded) else 0
            continue
        if n_ended == limits.n_ended or n_failed == limits.n_failed:
            yield PageFailure(source, None, _given_up(document.name, n_pages, first, n_failed), state)
            return
        remote.begin_render(first, request.crop, request.tiling)
        yield None
        try:
            rendered = remote.finish_render()
        except (DocumentError, ImageError) as error:
            n_failed, n_ended = n_failed + 1, n_ended + 1 if isinstance(error, ReaderEnded) else 0
            yield PageFailure(source, first, error, state)
            continue
        n_failed = n_ended = 0
        page = _page(source, first, n_pages, rendered, state)
        del rendered
        yield page
        del page
    if remote.damage is not None:
        yield PageFailure(source, None, DocumentError(remote.damage), state)


def _page(source: str, number: int, n_pages: int, rendered: RawPage, state: str | None) -> Page:
    image = Image.from_pixels(rendered.size, rendered.pixels)
    return Page(source, number, n_pages, image, rendered.dpi, rendered.warnings, state)


def _given_up(name: str, n_pages: int, first: int, n_failed: int) -> DocumentError:
    return DocumentError(
        f"{name} is abandoned at page {first} of {n_pages}: {n_failed} pages in a row before it failed. "
        "Choose others with '--pages', or save the document again."
    )


def _no_such_page(name: str, n_pages: int, first: int, last: int | None) -> DocumentError:
    has = f"{n_pages} pages" if n_pages > 1 else "1 page"
    is_no = f"is no page {first}" if last in (first, None) else f"are no pages {first} to {last}"
    return DocumentError(f"{name} has {has}; there {is_no}.")
