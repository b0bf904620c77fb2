"""Files that survive a full disk, a kill and a power cut: complete or absent, and on the disk before anyone is told.

Nothing here follows a symbolic link at the end of a path, so nothing outside the output directory is written.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from granite4v.errors import OutputError

OWN = ".granite4v"  # what is called so in an output directory is ours: the lock, unfinished files, images
_PARTIAL = f"{OWN}-partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# after these every other file would fail, too
_FATAL = (*_FULL, errno.EROFS, errno.EIO)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class FileOutputError(OutputError):
    """One file that cannot be written where others can."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name, over an older one, when the block ends well; else nothing stays of it.

    A file with the same content is left as it is. Raises OutputError for a disk that is full or cannot be written,
    and FileOutputError where that concerns this file alone.
    """
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    with disk_errors(path):
        try:
            descriptor = new_file(partial)
            # a lone surrogate, which JSON can spell, is written as the escape it came from
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield file
                file.flush()
                same = is_regular_file(path) and filecmp.cmp(partial, path, shallow=False)
                if not same:
                    os.fsync(file.fileno())
            if same:
                partial.unlink()
                return
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong first is what matters
                partial.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that may be lost in a power cut, but is never half there. Raises OSError."""
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    try:
        with open(new_file(partial), "wb") as file:
            file.write(content)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def open_own(path: Path) -> BinaryIO:
    """A file of ours, opened unbuffered for reading and writing and made if need be.

    Raises OutputError for anything that is not a regular file, symbolic links included.
    """
    check_own(path)
    with disk_errors(path):
        fresh = not path.exists()
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o666), "r+b", buffering=0)  # noqa: SIM115
        if fresh:
            sync_folder(path.parent)
        return file


def check_own(path: Path) -> None:
    """Raises OutputError when there is something at `path` that we would not have made: a link, a folder, a pipe."""
    with disk_errors(path):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return
    if stat.S_ISREG(mode):
        return
    what = "a symbolic link" if stat.S_ISLNK(mode) else "a directory" if stat.S_ISDIR(mode) else "no regular file"
    raise OutputError(
        f"'{path}' is {what}, which 'granite4v extract' did not make and does not write through; remove it, or give "
        "another directory."
    )


def is_regular_file(path: Path) -> bool:
    """Whether this is a file itself, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def make_folders(root: Path, relative: str) -> Path:
    """The folder `relative` below `root`, made if need be. Raises FileOutputError where a link would lead elsewhere."""
    folder = root
    for part in Path(relative).parts:
        folder = folder / part
        with disk_errors(folder):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                sync_folder(folder.parent)
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise FileOutputError(
                    f"'{folder}' is a symbolic link or a file; expected a directory for results. Remove it, and go on "
                    "with --resume."
                )
    return folder


def remove_partial_files(folder: Path) -> None:
    """Removes what a killed process left of its unfinished files."""
    for where, _, names in os.walk(folder):
        for name in names:
            if name.startswith(_PARTIAL):
                Path(where, name).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes new names in a folder last."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path, advice: str = "") -> Iterator[None]:
    """Turns what the disk says into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise output_error(error, path, advice) from None


def output_error(error: OSError, path: Path, advice: str = "") -> OutputError:
    """The same failure as a message; `advice` is a sentence for its end."""
    if error.errno in _FULL:
        text = f"no space left for '{path}' ({error.strerror}); make room and try again."
    else:
        text = f"cannot write '{path}': {error.strerror or error}; choose a directory that can be written."
    return (OutputError if error.errno in _FATAL else FileOutputError)(f"{text} {advice}".rstrip())


def new_file(path: Path) -> int:
    """A descriptor of a file that was not there before, so that no link of this name is followed."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666)
