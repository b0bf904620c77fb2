"""Opens and creates our files and folders in the output directory. Others may write there too, so symbolic links are
never followed."""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path
from typing import BinaryIO

from granite4v.errors import OutputError
from granite4v.paths import FileOutputError, disk_errors, open_in_place, sync_folder


def open_own(path: Path) -> BinaryIO:
    """Opens a file of ours unbuffered for reading and writing; creates it if necessary.

    Raises OutputError for anything that is not a regular file, symbolic links included.
    """
    check_own(path)
    with disk_errors(path):
        return open_in_place(path)


def check_own(path: Path) -> None:
    """Raises OutputError if there is something at `path` that we would not have created: a link, a folder, a pipe."""
    with disk_errors(path):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return
    if stat.S_ISREG(mode):
        return
    what = "a symbolic link" if stat.S_ISLNK(mode) else "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    raise OutputError(
        f"'{path}' is {what}, which 'granite4v extract' did not make and does not write through; remove it, or give "
        "another directory."
    )


def make_folders(root: Path, relative: str) -> Path:
    """Returns the folder `relative` below `root`, creating it if necessary. Raises FileOutputError if a link or a file
    is in the way."""
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
