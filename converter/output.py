"""Atomic output: files are written to a working directory, then moved into place."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from granite4v.errors import OutputError
from granite4v.paths import DISK_FULL

LOCK = "lock"
MODEL_FILES = ("text-*.gguf", "mmproj-*.gguf", "lora-*.gguf")


def check_target(target: Path, force: bool) -> None:
    """Raises OutputError when the model directory cannot be created, or when it is not empty and `force` is False."""
    if "\0" in str(target):
        raise OutputError(f"cannot write {str(target)!r}: it holds a zero byte.")
    with _output_errors(target):
        if not target.exists():
            return
        if not target.is_dir():
            raise OutputError(f"'{target}' exists and is a file; give a directory that does not exist yet.")
        remove_leftovers(target, target.name)
        # the target itself may be a working directory of `files_in_place`, which contains the caller's lock
        held = sorted(path.name for path in target.iterdir() if path.name != LOCK)
    if held and not force:
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise OutputError(
            f"'{target}' exists and holds {', '.join(held[:3])}{more}; give another directory, or --force to replace "
            "the model in it."
        )


@contextlib.contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    """Converts OSErrors to OutputErrors that name the target."""
    try:
        yield
    except OSError as error:
        raise _as_output_error(error, target) from None


@contextlib.contextmanager
def files_in_place(target: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yields a working directory. When the block ends without an error, the files in it are moved into place.

    For a new target, the working directory is next to it, and the target appears with all its files at once. For an
    existing target, it is inside, and the files replace those of an earlier model one by one. On an error or interrupt
    everything written is removed. Raises OutputError for errors of the file system, such as a full disk.
    """
    fresh = not target.exists()
    made: list[Path] = []
    work, lock = None, None
    try:
        if fresh:
            _make_parents(target.parent, made)
        place = target.parent if fresh else target
        remove_leftovers(place, target.name)
        work = Path(tempfile.mkdtemp(prefix=_prefix(target.name), dir=place))
        lock = _lock(work)
        yield work
        if lock is not None:
            (work / LOCK).unlink()
        _move(work, target, names, fresh)
    except OSError as error:
        raise _as_output_error(error, target) from None
    finally:
        if lock is not None:
            os.close(lock)
        if work is not None and work.exists():
            shutil.rmtree(work, ignore_errors=True)
        if not os.path.exists(target):
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # not empty: another process has written there
                    folder.rmdir()


def remove_leftovers(place: Path, name: str) -> None:
    """Removes working directories for the target `name` whose process was killed. Those of live processes are locked
    and stay."""
    for work in place.glob(f"{glob.escape(_prefix(name))}*"):
        lock = _lock(work, existing=True)
        if lock is not None:
            shutil.rmtree(work, ignore_errors=True)
            os.close(lock)


def _prefix(name: str) -> str:
    return f".{name}-partial-"


def _lock(work: Path, *, existing: bool = False) -> int | None:
    """Locks a working directory. Returns the file descriptor that holds the lock until it is closed or the process
    ends; None if the lock is not available.

    `existing`: do not create the lock file, only lock one that another process has left.
    """
    try:
        descriptor = os.open(work / LOCK, os.O_RDWR | (0 if existing else os.O_CREAT), 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, or the file system does not support locks
        os.close(descriptor)
        return None
    return descriptor


def _move(work: Path, target: Path, names: Sequence[str], fresh: bool) -> None:
    if fresh:
        os.chmod(work, 0o777 & ~_umask())  # mkdtemp creates directories that only the owner can read
        work.rename(target)
        return
    for name in names:
        (work / name).replace(target / name)
    for pattern in MODEL_FILES:
        for path in target.glob(pattern):
            if path.name not in names:
                path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Creates a directory and its parents. The created ones are appended to `made`, even if a later one fails."""
    for path in reversed((folder, *folder.parents)):
        if not path.exists():
            path.mkdir(exist_ok=True)
            made.append(path)


def _as_output_error(error: OSError, target: Path) -> OutputError:
    if error.errno in DISK_FULL:
        return OutputError(f"no space left on the disk of '{target}'; nothing was kept. Make room and try again.")
    return OutputError(f"cannot write '{target}': {error.strerror or error}.")
