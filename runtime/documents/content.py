"""Detects the type of a file and opens it. File names are often wrong, so the content decides."""

from __future__ import annotations

import io
import re
import stat
import warnings
from enum import Enum
from pathlib import Path

import PIL
import PIL.Image

from granite4v.clip_projector.files import what_it_holds
from granite4v.errors import DocumentError, Granite4vError
from granite4v.runtime.documents.image_files import ImageFile, TiffFile
from granite4v.runtime.documents.limits import Limits
from granite4v.runtime.documents.page_source import PageSource
from granite4v.runtime.documents.sources import EXPECTED, Document, file_state, why_missing

HEAD_BYTES = 1024  # a PDF's header must begin within these


class Kind(Enum):
    IMAGE = "image"
    TIFF = "TIFF"
    PDF = "PDF"


def open_page_source(
    document: Document,
    content: bytes | None,
    state: str | None,
    password: str | None,
    index: list[int] | None,
    limits: Limits,
) -> PageSource:
    """Opens a document. `content`: its bytes if they are not in a file. `state`: of its file when it was listed.

    `index`: an earlier `PageSource.index` of the same document. Raises DocumentError, ImageError.
    """
    held: Path | bytes
    try:
        if content is not None:
            held = content
        else:
            assert document.path is not None
            held = document.path
            if not stat.S_ISREG(held.stat().st_mode):
                raise DocumentError(f"{document.name} is a device or a socket; give a file, a directory or a pipe.")
            if state is not None and file_state(document) != state:
                raise DocumentError(f"{document.name} was changed while it was being read; read it again.")
        kind = recognize(held, document.name)
        if kind is Kind.PDF:
            from granite4v.runtime.documents.pdf import PdfFile  # loads PDFium, which images do not need

            return PdfFile(held, document.name, password, state, limits)
        if kind is Kind.TIFF:
            return TiffFile(held, document.name, limits, index)
        return ImageFile(held, document.name, limits)
    except OSError as error:
        raise why_missing(document, error) from None


def readable(error: Exception, name: str) -> Granite4vError:
    """Returns the error with a message for a person. What a library raises is blamed on the file, not on our code."""
    if isinstance(error, Granite4vError):
        return error
    if isinstance(error, MemoryError):
        return DocumentError(f"{name} needs more memory than is available; scale it down, or split it.")
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return DocumentError(
        f"{name} cannot be read ({what:.200}); it is probably damaged. Open it in another program and save a new copy."
    )


_IMAGES = (
    re.compile(rb"\x89PNG\r\n\x1a\n"),
    re.compile(rb"\xff\xd8\xff"),  # JPEG
    re.compile(rb"GIF8[79]a"),
    re.compile(rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),  # with the size of its header
    re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
)
_TIFF = re.compile(rb"II[*+]\0|MM\0[*+]")
# Pillow's names of other formats that are read if it can: none that needs another program or has no signature
_FORMATS = ("AVIF", "JPEG2000", "PPM", "PCX", "DIB", "ICO", "ICNS", "PSD", "SGI", "QOI")


def recognize(content: Path | bytes, name: str) -> Kind:
    """Returns what kind of document a file is, judging by its content.

    Raises DocumentError, which calls it `name`, for anything but a PDF or an image in a format that we read, and
    OSError.
    """
    if isinstance(content, bytes):
        head = content[:HEAD_BYTES]
    else:
        with content.open("rb") as file:
            head = file.read(HEAD_BYTES)
    if not head:
        raise DocumentError(f"{name} is empty (0 bytes).")
    if any(pattern.match(head) for pattern in _IMAGES):
        return Kind.IMAGE
    if _TIFF.match(head):
        return Kind.TIFF
    if b"%PDF-" in head:
        return Kind.PDF
    if _is_image_of_another_kind(content):
        return Kind.IMAGE
    held = what_it_holds(head) or "neither an image nor a document of a known format, or its beginning is damaged"
    raise DocumentError(f"{name} holds {held}; {EXPECTED}.")


def _is_image_of_another_kind(content: Path | bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            held = io.BytesIO(content) if isinstance(content, bytes) else content
            PIL.Image.open(held, formats=_known_formats()).close()
        except PIL.UnidentifiedImageError:
            return False
        except OSError:
            raise
        except Exception:  # a decompression bomb, or damage: reported when the page is rendered
            return True
    return True


def _known_formats() -> list[str]:
    """Returns those of `_FORMATS` that the installed Pillow supports."""
    PIL.Image.init()
    return [name for name in _FORMATS if name in PIL.Image.OPEN]
