"""The pictures of a question: image files, standard input, and pages of PDFs and of other files with several."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from granite4v.errors import DocumentError, ImageError

if TYPE_CHECKING:
    from granite4v.runtime import Model
    from granite4v.runtime.chat.pages import FileSpec

_HEAD_BYTES = 1024


def open_images(given: Sequence[str]) -> list[Any]:
    """Images, decoded in a separate process: a damaged file may end its decoder. In place of a PDF, and of pages that
    are named, what `render_pages` takes."""
    if given.count("-") > 1:
        raise typer.BadParameter("'-' means standard input and may be given only once.", param_hint="IMAGE")
    if not given:
        return []
    from PIL import Image

    from granite4v.runtime.documents.reader import load_apart

    found: list[Any] = [_pages_named(text) for text in given]
    alone = [at for at, pages in enumerate(found) if pages is None]
    sources = [_from_stdin() if given[at] == "-" else given[at] for at in alone]
    for at, loaded in zip(alone, load_apart(sources) if sources else [], strict=True):
        _tell(loaded.warnings)
        found[at] = Image.frombytes("RGB", loaded.size, bytes(loaded.pixels))
    return found


def render_pages(given: Sequence[Any], model: Model, password: str | None) -> list[Any]:
    """What `open_images` found, with pages as large as the model looks at them in place of their names.

    Raises DocumentError for a page that cannot be read, and for a PDF of several without a word about which is meant.
    """
    from granite4v.runtime.chat.pages import FileSpec

    return [
        picture
        for one in given
        for picture in (_rendered(one, model, password) if isinstance(one, FileSpec) else [one])
    ]


def _pages_named(text: str) -> FileSpec | None:
    """The file and pages that an argument names; None for an image."""
    from granite4v.runtime.chat.pages import file_spec

    if text == "-" or ("#" not in text and not _is_pdf(text)):
        return None
    spec = file_spec(text)
    return None if spec.pages is None and not _is_pdf(text) else spec


def _is_pdf(path: str) -> bool:
    from granite4v.clip_projector.files import is_pdf

    if not os.path.isfile(path):  # nothing is taken out of a pipe
        return False
    try:
        with open(path, "rb") as file:
            return is_pdf(file.read(_HEAD_BYTES))
    except OSError:  # told when it is opened
        return False


def _rendered(spec: FileSpec, model: Model, password: str | None) -> Iterator[Any]:
    from granite4v.runtime.documents import Page, PageFailure, open_pages

    view = model.files.vision_config
    with contextlib.closing(open_pages([spec.path], pages=spec.pages or "1", password=password, view=view)) as pages:
        for page in pages:
            if isinstance(page, PageFailure):
                raise page.error
            assert isinstance(page, Page)
            if spec.pages is None and page.n_pages > 1:
                raise DocumentError(
                    f"'{spec.path}' has {page.n_pages:,} pages; name those that are meant, such as "
                    f"'{spec.path.name}#1' or '{spec.path.name}#2-3'."
                )
            _tell(page.warnings)
            yield page.image


def _tell(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _from_stdin() -> bytes:
    if sys.stdin.isatty():
        raise ImageError("'-' reads an image from standard input, but that is a terminal; pipe an image into it.")
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise ImageError(f"standard input cannot be read: {error.strerror or error}.") from None
    if not data:
        raise ImageError("'-' reads an image from standard input, but that is empty or closed; pipe an image into it.")
    return data
