"""Opens the images of a question: image files, standard input, and pages of PDFs and of other multi-page files."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from granite4v.cli.progress import plural
from granite4v.errors import ContextOverflowError, DocumentError, ImageError

if TYPE_CHECKING:
    from granite4v.runtime import Model
    from granite4v.runtime.chat.pages import FileSpec

_HEAD_BYTES = 1024


def open_images(given: Sequence[str]) -> list[Any]:
    """Decodes the images in a child process, because a damaged file may crash the decoder.

    PDFs and arguments that name pages become a FileSpec, for `render_pages`. Raises BadParameter, ImageError,
    ReaderEnded, DeviceError.
    """
    if given.count("-") > 1:
        raise typer.BadParameter("'-' means standard input and may be given only once.", param_hint="IMAGE")
    if not given:
        return []
    from granite4v.clip_projector import Image
    from granite4v.runtime.documents.reader import load_apart

    found: list[Any] = [_pages_named(text) for text in given]
    alone = [at for at, pages in enumerate(found) if pages is None]
    sources = [_from_stdin() if given[at] == "-" else given[at] for at in alone]
    for at, loaded in zip(alone, load_apart(sources) if sources else [], strict=True):
        _tell(loaded.warnings)
        found[at] = Image.from_pixels(loaded.size, loaded.pixels)
    return found


def render_pages(given: Sequence[Any], model: Model, password: str | None) -> list[Any]:
    """Renders the pages in the result of `open_images`, at the size that the model uses; images stay as they are.

    Raises DocumentError for a page that cannot be read, and for a PDF of several pages without page numbers. Raises
    ContextOverflowError as soon as the images exceed the context, so that the remaining pages are not rendered.
    """
    from granite4v.runtime.chat.pages import FileSpec

    pictures: list[Any] = []
    for one in given:
        if not isinstance(one, FileSpec):
            pictures.append(one)
            continue
        for picture in _rendered(one, model, password):
            pictures.append(picture)
            _check_room(pictures, model)
    return pictures


def _check_room(pictures: Sequence[Any], model: Model) -> None:
    from granite4v.clip_projector.views import views_of

    config = model.files.vision_config
    n_tokens = 0 if config is None else sum(view.layout(config).n_tokens for view in views_of(pictures, config))
    if n_tokens > model.n_ctx:
        raise ContextOverflowError(
            f"{n_tokens:,} tokens for {plural(len(pictures), 'picture')} already, but the context size is "
            f"{model.n_ctx:,}; name fewer pages, or raise it (--ctx-size)."
        )


def _pages_named(text: str) -> FileSpec | None:
    """Parses an argument that names a PDF or pages of a file; None for an image."""
    from granite4v.runtime.chat.pages import file_spec

    if text == "-" or ("#" not in text and not _is_pdf(text)):
        return None
    spec = file_spec(text)
    return None if spec.pages is None and not _is_pdf(text) else spec


def _is_pdf(path: str) -> bool:
    from granite4v.clip_projector.files import is_pdf

    if not os.path.isfile(path):  # reading from a pipe would consume its data
        return False
    try:
        with open(path, "rb") as file:
            return is_pdf(file.read(_HEAD_BYTES))
    except OSError:  # reported when it is opened
        return False


def _rendered(spec: FileSpec, model: Model, password: str | None) -> Iterator[Any]:
    from granite4v.clip_projector.files import shown
    from granite4v.runtime.documents import Page, PageFailure, open_pages

    view = model.files.vision_config
    with contextlib.closing(open_pages([spec.path], pages=spec.pages or "1", password=password, view=view)) as pages:
        for page in pages:
            if isinstance(page, PageFailure):
                raise page.error
            assert isinstance(page, Page)
            if spec.pages is None and page.n_pages > 1:
                name = shown(spec.path.name)
                raise DocumentError(
                    f"'{shown(str(spec.path))}' has {page.n_pages:,} pages; name those that are meant, such as "
                    f"'{name}#1' or '{name}#2-3'."
                )
            _tell(page.warnings)
            yield page.image


def _tell(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _from_stdin() -> bytes:
    if sys.stdin.isatty():
        raise ImageError("'-' reads an image from standard input, but that is a terminal; pipe an image into it.")
    from granite4v.clip_projector.files import MAX_FILE_BYTES

    try:
        data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ImageError(f"standard input cannot be read: {error.strerror or error}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"standard input holds more than {MAX_FILE_BYTES:,} bytes; save it again as PNG or JPEG.")
    if not data:
        raise ImageError("'-' reads an image from standard input, but that is empty or closed; pipe an image into it.")
    return data
