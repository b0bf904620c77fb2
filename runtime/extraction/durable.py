"""Files that survive a full disk, a kill and a power cut: whole or not there, and on the disk before anyone is told."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from granite4v.errors import OutputError

OWN = ".granite4v"  # what is called so in an output directory is ours: the lock, unfinished files, pictures
_PARTIAL = f"{OWN}-partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name, over an older one, when the block ends well; else nothing stays of it.

    Raises OutputError for a disk that is full or cannot be written.
    """
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    with disk_errors(path):
        try:
            # a lone surrogate, which JSON can spell, is written as the escape it came from
            with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong first is what matters
                partial.unlink(missing_ok=True)
            raise


def remove_partial_files(folder: Path) -> None:
    """What a process that was killed left of its unfinished files."""
    for path in folder.glob(f"{_PARTIAL}*"):
        path.unlink(missing_ok=True)


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
    return OutputError(f"{text} {advice}".rstrip())
