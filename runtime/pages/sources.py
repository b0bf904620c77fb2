"""What a person names (files, directories, globs, '-') -> the documents to read, and what a file holds.

Knows nothing of pages.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from granite4v.errors import DocumentError

STDIN = "-"
# what is taken from a directory; elsewhere the content decides
SUFFIXES = (".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pdf", ".png", ".tif", ".tiff", ".webp")
EXPECTED = "expected PNG, JPEG, WebP, TIFF, BMP, GIF or PDF"
HEAD_BYTES = 1024  # a PDF's header may have as much before it


@dataclass(frozen=True)
class Document:
    """One thing to open. `source` is what records call it: its path as given, or '-'. `path`: None for stdin."""

    source: str
    path: Path | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return "standard input" if self.path is None else f"'{self.source}'"


@dataclass(frozen=True)
class NotFound:
    """An input that gives nothing to read, and why."""

    source: str
    error: DocumentError


class Kind(Enum):
    PICTURE = "picture"
    TIFF = "TIFF"
    PDF = "PDF"


def find_documents(inputs: Sequence[str | os.PathLike[str]]) -> list[Document | NotFound]:
    """The documents that `inputs` stand for, in order, each once.

    A directory stands for the files with a known suffix in it and below it, in natural order (page2 before page10);
    hidden ones are left out and links to directories not followed. A name with `*`, `?` or `[` that is no file is a
    glob (`**` for directories in between). An input that gives nothing is a NotFound in its place; raises DocumentError
    when no input gives anything.
    """
    if not inputs:
        raise DocumentError("nothing to read; give files, directories or globs, or '-' for standard input.")
    found: list[Document | NotFound] = []
    seen: set[str] = set()
    for given in inputs:
        for item in _expand(os.fspath(given)):
            path = item.path if isinstance(item, Document) else None
            key = item.source if path is None else os.path.abspath(path)
            if key not in seen:
                seen.add(key)
                found.append(item)
    missing = [item for item in found if isinstance(item, NotFound)]
    if len(missing) == len(found):
        raise missing[0].error if len(missing) == 1 else DocumentError(" ".join(str(item.error) for item in missing))
    return found


def _expand(given: str) -> Iterator[Document | NotFound]:
    if given == STDIN:
        yield Document(STDIN, None)
    elif not given:
        yield _not_found(given, "an input is empty text; give a file, a directory, a glob, or '-'.")
    elif os.path.isdir(given):
        yield from _in_directory(given)
    elif os.path.lexists(given):
        yield _document(given)
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True), key=_natural)
        if not matches:
            yield _not_found(given, f"no file matches '{_printable(given)}'; is it the right directory?")
        for match in matches:
            yield from _in_directory(match) if os.path.isdir(match) else [_document(match)]
    else:
        yield _not_found(given, f"there is no file or directory '{_printable(given)}'.")


def _in_directory(directory: str) -> Iterator[Document | NotFound]:
    errors: list[OSError] = []
    found: list[str] = []
    for folder, folders, files in os.walk(directory, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [os.path.join(folder, name) for name in files if not name.startswith(".")]
        found += [path for path in paths if _suffix(path) in SUFFIXES and not _is_special(path)]
    for error in errors:
        folder = str(error.filename or directory)
        reason = error.strerror or str(error)
        yield _not_found(folder, f"the directory '{_printable(folder)}' cannot be read: {reason}.")
    if not found and not errors:
        yield _not_found(
            directory,
            f"the directory '{_printable(directory)}' holds nothing to read; {EXPECTED}, by their usual suffixes "
            f"({' '.join(SUFFIXES)}).",
        )
    for path in sorted(found, key=_natural):
        yield _document(path)


def _document(path: str) -> Document:
    return Document(_printable(path), Path(path))


def _not_found(source: str, message: str) -> NotFound:
    return NotFound(_printable(source), DocumentError(message))


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_special(path: str) -> bool:
    """A pipe or a device, which reading might wait for without end; a dangling link is not."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # reported when it is opened
        return False


def _natural(path: str) -> tuple[list[list[tuple[int, int, str]]], str]:
    """Sorts numbers in names by value and letters whatever their case, folder by folder."""
    parts = [re.split(r"(\d+)", part) for part in Path(path).parts]
    return [[(0, int(s), "") if s.isdecimal() else (1, 0, s.casefold()) for s in part] for part in parts], path


def _printable(path: str) -> str:
    """The path as text that can be written anywhere; bytes that are no UTF-8 become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_content(document: Document) -> Path | bytes:
    """The document's path, or its bytes where it can be read only once. Raises DocumentError when it cannot."""
    path = document.path
    if path is None:
        if sys.stdin.isatty():
            raise DocumentError("standard input is a terminal; pipe a picture or PDF into it, or name a file.")
        return _not_empty(sys.stdin.buffer.read(), document)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                _not_empty(file.read(1), document)
            return path
        if stat.S_ISFIFO(mode):
            return _not_empty(path.read_bytes(), document)
    except OSError as error:
        if os.path.islink(path) and not os.path.exists(path):
            target = _printable(os.readlink(path))
            raise DocumentError(f"{document.name} is a link to '{target}', which is not there.") from None
        raise DocumentError(f"{document.name} cannot be read: {error.strerror or error}.") from None
    raise DocumentError(f"{document.name} is a device or a socket; give a file, a directory or a pipe.")


def file_state(document: Document) -> str | None:
    """'size:mtime_ns' of the document's file; None for what is not a file, or not there."""
    if document.path is None:
        return None
    try:
        found = os.stat(document.path)
    except (OSError, ValueError):
        return None
    return f"{found.st_size}:{found.st_mtime_ns}" if stat.S_ISREG(found.st_mode) else None


def is_read_once(document: Document) -> bool:
    """Whether looking into it takes its content away: standard input or a pipe."""
    if document.path is None:
        return True
    try:
        return stat.S_ISFIFO(os.stat(document.path).st_mode)
    except OSError:
        return False


def _not_empty(data: bytes, document: Document) -> bytes:
    if not data:
        raise DocumentError(f"{document.name} is empty (0 bytes).")
    return data


_PICTURES = (
    re.compile(rb"\x89PNG\r\n\x1a\n"),
    re.compile(rb"\xff\xd8\xff"),  # JPEG
    re.compile(rb"GIF8[79]a"),
    re.compile(rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),  # with the size of its header
    re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
)
_TIFF = re.compile(rb"II[*+]\0|MM\0[*+]")
_OTHERS = (
    (re.compile(rb"\s*(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body)", re.IGNORECASE), "a web page"),
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "an office document or a ZIP archive"),
    (re.compile(rb"\xd0\xcf\x11\xe0"), "an old office document"),
    (re.compile(rb"(\x1f\x8b|7z\xbc\xaf|BZh|\xfd7zXZ|Rar!)"), "an archive"),
    (re.compile(rb".{4}ftyp(heic|heix|mif1|msf1|avif|avis)", re.DOTALL), "a HEIF or AVIF picture"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 picture"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "PostScript"),
    (re.compile(rb"AT&TFORM"), "a DjVu document"),
)


def recognize(content: Path | bytes, name: str) -> Kind:
    """What a file holds, by its content: names say it wrongly too often.

    Raises DocumentError, which calls it `name`, for everything that is neither a picture of a kind we read nor a PDF.
    """
    if isinstance(content, bytes):
        head = content[:HEAD_BYTES]
    else:
        try:
            with content.open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError as error:
            raise DocumentError(f"{name} cannot be read: {error.strerror or error}.") from None
    if any(pattern.match(head) for pattern in _PICTURES):
        return Kind.PICTURE
    if _TIFF.match(head):
        return Kind.TIFF
    if b"%PDF-" in head:
        return Kind.PDF
    raise DocumentError(f"{name} holds {_describe(head)}; {EXPECTED}.")


def _describe(head: bytes) -> str:
    for pattern, what in _OTHERS:
        if pattern.match(head):
            return what
    if not head.strip(b"\0"):
        return "zero bytes alone"
    text = head.decode("utf-8", "ignore")
    is_text = len(text.encode()) > len(head) - 4 and all(char.isprintable() or char.isspace() for char in text)
    return "text" if is_text else "neither a picture nor a document that we know, or its beginning is damaged"
