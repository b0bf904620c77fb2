"""What a person names (files, directories, globs, '-') -> the documents to read.

Knows nothing of pages, nor of what a file holds.
"""

from __future__ import annotations

import glob
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from granite4v.errors import DocumentError
from granite4v.runtime.pages.limits import Limits

STDIN = "-"
# what is taken from a directory; elsewhere the content decides
SUFFIXES = (".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pdf", ".png", ".tif", ".tiff", ".webp")
_NO_WRITER_S = 0.02  # between two looks at a pipe that nobody has opened for writing
EXPECTED = "expected PNG, JPEG, WebP, TIFF, BMP, GIF or PDF"


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


def find_documents(
    inputs: Sequence[str | os.PathLike[str]], note: Callable[[str], None] | None = None
) -> list[Document | NotFound]:
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


def read_once(document: Document, limits: Limits) -> bytes:
    """All that standard input or a pipe holds. Raises DocumentError."""
    try:
        if document.path is not None:
            return _not_empty(_from_pipe(document, document.path, limits), document, limits)
        if sys.stdin is None or sys.stdin.closed:
            raise DocumentError("standard input is closed; pipe an image or PDF into it, or name a file.")
        if sys.stdin.isatty():
            raise DocumentError("standard input is a terminal; pipe an image or PDF into it, or name a file.")
        return _not_empty(sys.stdin.buffer.read(limits.file_bytes + 1), document, limits)
    except OSError as error:
        raise why_missing(document, error) from None


def _from_pipe(document: Document, path: Path, limits: Limits) -> bytes:
    """What comes until the writer closes it; opened without waiting for one, which might never come."""
    data = bytearray()
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(handle, "rb", buffering=0) as pipe:
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        deadline = time.monotonic() + limits.pipe_s
        while len(data) <= limits.file_bytes:
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise DocumentError(f"{document.name} is a pipe into which nothing came for {limits.pipe_s:g} s.")
            piece = pipe.read(1 << 20)
            if piece is None or (not piece and not data and time.monotonic() < deadline):
                time.sleep(_NO_WRITER_S)  # no writer yet: macOS says at once that there is no more
                continue
            if not piece:
                break
            data += piece
            deadline = time.monotonic() + limits.pipe_s
    return bytes(data)


def _not_empty(data: bytes, document: Document, limits: Limits) -> bytes:
    if not data:
        raise DocumentError(f"{document.name} is empty (0 bytes).")
    if len(data) > limits.file_bytes:
        raise DocumentError(
            f"{document.name} holds more than {limits.file_bytes:,} bytes; save it to a file and read that."
        )
    return data


def why_missing(document: Document, error: OSError) -> DocumentError:
    """What to tell of a document that cannot be opened."""
    path = document.path
    if path is not None and os.path.islink(path) and not os.path.exists(path):
        target = _printable(os.readlink(path))
        return DocumentError(f"{document.name} is a link to '{target}', which is not there.")
    return DocumentError(f"{document.name} cannot be read: {error.strerror or error}.")


def file_state(document: Document) -> str | None:
    """'size:mtime_ns' of the document's file; None for what is not a file, or not there."""
    return None if document.path is None else state_of(document.path)


def state_of(path: Path) -> str | None:
    """As `file_state`, of a path."""
    try:
        found = os.stat(path)
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
