"""Finds the documents to read from the given inputs (files, directories, globs, URLs, '-').

Knows nothing about pages or file contents.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
import sys
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import features

from granite4v.clip_projector.files import printable, read_whole, shown, url_in
from granite4v.errors import DocumentError
from granite4v.runtime.documents.limits import Limits
from granite4v.runtime.documents.urls import RemoteFile, find_remote

STDIN = "-"
# of files that are taken from a directory; a file that is given itself may have any suffix, and its content decides
SUFFIXES = (".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pdf", ".png", ".tif", ".tiff", ".webp")
_BY_FEATURE = {"avif": (".avif",), "jpg_2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc")}  # Pillow's features
# of files that a person may expect to be read: a note says that they are left out
_LOOKS_READABLE = (
    *(".heic", ".heif", ".hif", ".jxl", ".svg", ".psd", ".tga", ".pcx", ".pbm", ".pgm", ".ppm", ".pnm", ".wmf", ".emf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".djvu", ".djv", ".xps", ".oxps", ".ps", ".eps"),
)
_FILE_URL = re.compile("file:/*(?:localhost)?(?=/)", re.IGNORECASE)
_MOST_NAMES = 3  # of left-out files in a note
_NOT_THERE = (FileNotFoundError, NotADirectoryError)
EXPECTED = "expected PNG, JPEG, WebP, TIFF, BMP, GIF or PDF"


@dataclass(frozen=True)
class Document:
    """One document to open.

    `source`: its name in records: the path or URL as given, or '-'. `path`: None for stdin, for a `remote` file until
    it is fetched, and for a document that was sent to a server, whose `source` is a description for messages.
    """

    source: str
    path: Path | None
    remote: RemoteFile | None = None

    @property
    def name(self) -> str:
        """The name in messages: a path or URL in quotes, without characters that would move a terminal's cursor."""
        if self.path is not None or self.remote is not None:
            return f"'{shown(self.source)}'"
        return "standard input" if self.source == "-" else self.source


@dataclass(frozen=True)
class NotFound:
    """An input with nothing to read, and why."""

    source: str
    error: DocumentError


def find_documents(
    inputs: Sequence[str | os.PathLike[str]], note: Callable[[str], None] | None = None
) -> list[Document | NotFound]:
    """Returns the documents that `inputs` stand for, in order, each once.

    A directory stands for the files with a known suffix in it and below it, in natural order (page2 before page10);
    hidden ones are left out, and links to directories are not followed. A name with `*`, `?` or `[` that is not a file
    is a glob (`**` for directories in between, links not followed). An input without documents becomes a NotFound in
    its place; raises DocumentError if no input has any.

    A file that occurs again, by any path or symbolic link, is the same document, under the path that came first; a hard
    link is a file of its own. Paths are written without './', double slashes or trailing slashes. `note` gets a line
    about files of a directory that are left out although they look like images or documents.
    """
    if not inputs:
        raise DocumentError("no input; give files, directories or globs, or '-' for standard input.")
    found: list[Document | NotFound] = []
    seen: set[str] = set()
    for given in inputs:
        for item in _expand(_local(os.fspath(given)), note or _no_note):
            path = item.path if isinstance(item, Document) else None
            key = item.source if path is None else os.path.realpath(path)
            if key not in seen:
                seen.add(key)
                found.append(item)
    missing = [item for item in found if isinstance(item, NotFound)]
    if len(missing) == len(found):
        raise missing[0].error if len(missing) == 1 else DocumentError(" ".join(str(item.error) for item in missing))
    return found


def _no_note(line: str) -> None:
    pass


def _local(given: str) -> str:
    """The path of a file:// URL of this machine; other texts as they are."""
    match = _FILE_URL.match(given)
    return given if match is None else urllib.parse.unquote(given[match.end() :])


def _expand(given: str, note: Callable[[str], None]) -> Iterator[Document | NotFound]:
    errors: list[OSError] = []
    if given == STDIN:
        yield Document(STDIN, None)
    elif not given:
        yield _not_found(given, "an input is an empty string; give a file, a directory, a glob, or '-'.")
    elif "\0" in given:
        yield _not_found(given, f"'{shown(given)}' holds a zero byte, which no file name can.")
    elif os.path.isdir(given):
        yield from _in_directory(given, note)
    elif _is_there(given, errors):
        yield _document(given)
    elif errors:
        yield _unreadable(errors[0], given)
    elif (url := url_in(given)) is not None:
        yield from _at_url(url)
    elif glob.has_magic(given):
        matches = sorted(set(glob_matches(given, errors)), key=_natural)
        errors = [error for error in errors if not isinstance(error, _NOT_THERE)]
        yield from (_unreadable(error, given) for error in errors)
        if not matches and not errors:
            yield _not_found(given, f"no file matches '{shown(given)}'; is it the right directory?")
        for match in matches:
            yield from _in_directory(match, note) if os.path.isdir(match) else [_document(match)]
    else:
        name, _, pages = given.rpartition("#")
        hint = f" To read pages of '{shown(name)}', add --pages {shown(pages)}." if os.path.isfile(name) else ""
        yield _not_found(given, f"there is no file or directory '{shown(given)}'.{hint}")


def _at_url(url: str) -> Iterator[Document | NotFound]:
    try:
        found = find_remote(url, _suffixes())
    except DocumentError as error:
        yield NotFound(printable(url), error)
        return
    for file in sorted(found, key=lambda file: _natural(file.url)):
        yield Document(printable(file.url), None, file)


def _is_there(path: str, errors: list[OSError]) -> bool:
    """Whether there is a file, a directory or a link; `errors` gets the error if that cannot be known."""
    try:
        os.lstat(path)
    except _NOT_THERE:
        return False
    except OSError as error:
        errors.append(error)
        return False
    return True


def glob_matches(pattern: str, errors: list[OSError]) -> Iterator[str]:
    """Yields what a glob matches, like `glob.glob(..., recursive=True)`, except that `**` follows no links.

    `errors` gets the errors of directories that could not be read.
    """
    absolute = os.path.isabs(pattern)
    return _match(os.sep if absolute else "", [part for part in pattern.split(os.sep) if part not in ("", ".")], errors)


def _match(base: str, parts: list[str], errors: list[OSError]) -> Iterator[str]:
    if not parts:
        yield base or "."
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        while rest[:1] == ["**"]:
            rest = rest[1:]
        if not rest:
            yield base or "."  # a directory stands for everything in it
            return
        for folder, _ in _walk(base or ".", errors):
            yield from _match(folder if base else folder[2:], rest, errors)
    elif glob.has_magic(first):
        try:
            names = os.listdir(base or ".")
        except OSError as error:
            errors.append(error)
            return
        for name in names:
            path = os.path.join(base, name)
            hidden = name.startswith(".") and not first.startswith(".")
            if not hidden and fnmatch.fnmatchcase(name, first) and (not rest or os.path.isdir(path)):
                yield from _match(path, rest, errors)
    elif _is_there(path := os.path.join(base, first), errors):
        yield from _match(path, rest, errors)


def _in_directory(directory: str, note: Callable[[str], None]) -> Iterator[Document | NotFound]:
    errors: list[OSError] = []
    found: list[str] = []
    left_out: list[str] = []
    suffixes = _suffixes()
    for folder, files in _walk(directory, errors):
        paths = [os.path.join(folder, name) for name in files]
        found += [path for path in paths if _suffix(path) in suffixes and not _is_special(path)]
        left_out += [path for path in paths if _suffix(path) not in suffixes and _looks_readable(path)]
    yield from (_unreadable(error, directory) for error in errors)
    if left_out:
        note(_left_out(directory, sorted(left_out, key=_natural)))
    if not found and not errors:
        yield _not_found(
            directory,
            f"the directory '{shown(directory)}' contains no supported files; {EXPECTED}, by their usual suffixes "
            + f"({' '.join(suffixes)})."
            + (f" {_left_out(directory, left_out)}" if left_out else ""),
        )
    for path in sorted(found, key=_natural):
        yield _document(path)


def _walk(top: str, errors: list[OSError]) -> Iterator[tuple[str, list[str]]]:
    """Yields (directory, names in it that are not directories) for `top` and everything below it. Leaves out hidden
    entries and follows no links.

    Not `os.walk`, which is recursive before Python 3.12, and so fails at about a thousand levels.
    """
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            errors.append(error)
            continue
        waiting += [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
        yield folder, [entry.name for entry in found if not os.path.isdir(entry.path)]


def _unreadable(error: OSError, otherwise: str) -> NotFound:
    path = str(error.filename or otherwise)
    what = "the directory " if os.path.isdir(path) else ""
    return _not_found(path, f"{what}'{shown(path)}' cannot be read: {error.strerror or error}.")


def _suffixes() -> tuple[str, ...]:
    """Returns the suffixes of readable files, some of which depend on the installed Pillow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from versions that do not know a feature
        more = [suffix for feature, known in _BY_FEATURE.items() if features.check(feature) for suffix in known]
    return (*SUFFIXES, *more)


def _looks_readable(path: str) -> bool:
    return _suffix(path) in _LOOKS_READABLE or any(_suffix(path) in known for known in _BY_FEATURE.values())


def _left_out(directory: str, paths: list[str]) -> str:
    names = ", ".join(shown(os.path.relpath(path, directory)) for path in paths[:_MOST_NAMES])
    more = f" and {len(paths) - _MOST_NAMES:,} more" if len(paths) > _MOST_NAMES else ""
    files = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    return (
        f"skipped in '{shown(str(Path(directory)))}': {files} of unsupported types ({names}{more}); convert "
        "them to PNG, JPEG or PDF."
    )


def _document(path: str) -> Document:
    return Document(printable(str(Path(path))), Path(path))


def _not_found(source: str, message: str) -> NotFound:
    return NotFound(printable(source), DocumentError(message))


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_special(path: str) -> bool:
    """Whether this is something like a pipe or a device, whose reader might block forever. A dangling link is not."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # reported when it is opened
        return False


def _natural(path: str) -> tuple[list[list[tuple[int, int, str]]], str]:
    """Returns a sort key: numbers in names by value, letters regardless of case, folder by folder."""
    parts = [re.split(r"(\d+)", part) for part in Path(path).parts]
    return [[(0, int(s), "") if s.isdecimal() else (1, 0, s.casefold()) for s in part] for part in parts], path


def read_once(document: Document, limits: Limits) -> bytes:
    """Returns everything that standard input or a pipe holds. Raises DocumentError."""
    try:
        data = (
            _standard_input(limits.file_bytes)
            if document.path is None
            else read_whole(document.path, limits.file_bytes, limits.pipe_s)
        )
    except OSError as error:
        raise why_missing(document, error) from None
    if not data:
        raise DocumentError(f"{document.name} is empty (0 bytes).")
    return data


def _standard_input(limit_bytes: int) -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise DocumentError("standard input is closed; pipe an image or PDF into it, or name a file.")
    if sys.stdin.isatty():
        raise DocumentError("standard input is a terminal; pipe an image or PDF into it, or name a file.")
    data = sys.stdin.buffer.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise DocumentError(f"standard input holds more than {limit_bytes:,} bytes; save them to a file and give that.")
    return data


def why_missing(document: Document, error: OSError) -> DocumentError:
    """Returns the error to report for a document that cannot be opened."""
    path = document.path
    if path is not None and os.path.islink(path) and error.errno == errno.ENOENT:
        target = shown(os.readlink(path))
        return DocumentError(f"{document.name} is a link to '{target}', which does not exist.")
    return DocumentError(f"{document.name} cannot be read: {error.strerror or error}.")


def file_state(document: Document) -> str | None:
    """Returns 'size:mtime_ns' of the document's file, or `RemoteFile.state` of a remote one; None for anything that is
    not a file or does not exist."""
    if document.remote is not None:
        return document.remote.state
    return None if document.path is None else state_of(document.path)


def state_of(path: Path) -> str | None:
    """Like `file_state`, for a path."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return f"{found.st_size}:{found.st_mtime_ns}" if stat.S_ISREG(found.st_mode) else None


def is_read_once(document: Document) -> bool:
    """Whether reading the document consumes it: standard input or a pipe."""
    if document.path is None:
        return document.remote is None
    try:
        return stat.S_ISFIFO(os.stat(document.path).st_mode)
    except OSError:
        return False
