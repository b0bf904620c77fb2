"""Finds the cache folder, config file and private temporary folder; reads and writes JSON caches; writes files
atomically.

Every file is written under a temporary name next to its target and renamed over it, so a reader, and the next process
after a kill or a power cut, finds either the old or the new content. Nothing here follows a symbolic link in the last
component of a path that it writes.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import filecmp
import functools
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import platformdirs

from granite4v.errors import OutputError

OWN_PREFIX = ".granite4v"  # of every file of ours in a directory shared with other programs
PARTIAL_PREFIX = f"{OWN_PREFIX}-partial-"
MAX_CACHE_BYTES = 1 << 24  # our cache files have a few kilobytes
SPARE_BYTES = 64 << 20  # for headers and vocabulary, and for the file system itself
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# errors after which every other file on the same disk would fail, too
_FATAL = (*DISK_FULL, errno.EROFS, errno.EIO)
_OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class FileOutputError(OutputError):
    """A file that cannot be written although others on the same disk can."""


# --- the cache: failures here never stop a command, since a cache that cannot be read or written only costs time ---


def cache_folder() -> Path:
    """GRANITE4V_CACHE, or the user's cache folder, or for a user without a home a private folder below the temporary
    folder."""
    named = os.environ.get("GRANITE4V_CACHE")
    if named:
        return Path(named)
    try:
        return Path(platformdirs.user_cache_dir("granite4v"))
    except RuntimeError:  # no HOME and no password database entry, as in containers and services
        return _shared_temporary_folder()


def config_file() -> Path | None:
    """The file with defaults for command-line options: GRANITE4V_CONFIG, or a file in the user's config folder. It need
    not exist. None for a user without a home."""
    named = os.environ.get("GRANITE4V_CONFIG")
    if named:
        return Path(named).absolute()
    try:
        return Path(platformdirs.user_config_dir("granite4v"), "config.toml")
    except RuntimeError:
        return None


def read_json_cache(name: str) -> dict[str, Any]:
    """Reads the JSON object in a cache file; {} when the file is missing or damaged. Does not check the values."""
    try:
        path = cache_folder() / name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CACHE_BYTES:  # reading a FIFO could block forever
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json_cache(name: str, content: dict[str, Any]) -> None:
    """Replaces a cache file; leaves it unchanged if that fails."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the folder's name
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, json.dumps(content, indent=1).encode(), mode=0o600)


def _shared_temporary_folder() -> Path:
    """A folder below the temporary folder, shared by all processes of this user. Its name can be guessed, so a folder
    that is not private to this user is not used; this process then gets a folder of its own."""
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"granite4v-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if is_private(folder):
            return folder
    try:
        return temporary_folder()
    except OSError:  # nowhere to write: cache writes fail below /dev/null, and their callers continue without a cache
        return Path(os.devnull) / "granite4v"


def is_private(folder: Path) -> bool:
    """Whether a folder is a real folder, not a link, owned by this user and closed to all others."""
    status = folder.lstat()
    if not hasattr(os, "getuid"):
        return stat.S_ISDIR(status.st_mode)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


@functools.cache
def temporary_folder() -> Path:
    """The private temporary folder of this process, removed when it ends. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix="granite4v-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# --- files that are complete or absent ---


@contextlib.contextmanager
def atomic_text_file(path: Path) -> Iterator[TextIO]:
    """Opens a text file that replaces `path`, synced to disk, when the block succeeds; after an error or an interrupt,
    removes it.

    An existing file with the same content is left untouched. Raises OutputError for a disk that is full or cannot be
    written, and FileOutputError if only this file is affected.
    """
    partial = partial_path(path)
    with disk_errors(path):
        try:
            # a lone surrogate, which JSON can contain, is written as a backslash escape
            with open(new_file(partial), "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield file
                file.flush()
                unchanged = is_regular_file(path) and filecmp.cmp(partial, path, shallow=False)
                if not unchanged:
                    os.fsync(file.fileno())  # before the rename, which could otherwise reach the disk first
            if unchanged:
                partial.unlink()
                return
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            _remove(partial)
            raise


@contextlib.contextmanager
def atomic_binary_file(path: Path) -> Iterator[BinaryIO]:
    """Like `atomic_text_file`, but unbuffered and for bytes; always replaces an existing file, and leaves the file open
    for reading and writing when the block succeeds. Raises OSError."""
    partial = partial_path(path)
    file = open(new_file(partial), "r+b", buffering=0)  # noqa: SIM115  # the caller closes it, once it is in place
    try:
        yield file
        os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        file.close()
        _remove(partial)
        raise


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields the temporary path to write a large file to; renames it to `path` when the block succeeds, and removes it
    after an error or an interrupt. Raises OutputError when the system refuses."""
    partial = partial_path(path)
    with disk_errors(path):
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            _remove(partial)
            raise


def write_bytes(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Writes a file atomically, without syncing it to disk: a power cut may lose it. Raises OSError."""
    partial = partial_path(path)
    try:
        with open(new_file(partial, mode), "wb") as file:
            file.write(content)
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise


def partial_path(path: Path) -> Path:
    """The temporary path of a file that is being written. It differs for each process and thread, so that two writers
    of the same cache file do not mix."""
    return path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{threading.get_native_id()}-{path.name}")


def remove_partial_files(folder: Path) -> None:
    """Removes the partial files of killed processes from a folder and the folders below it. No other process may be
    writing there. Raises OSError."""
    for where, _, names in os.walk(folder):
        for name in names:
            if name.startswith(PARTIAL_PREFIX):
                Path(where, name).unlink(missing_ok=True)


def new_file(path: Path, mode: int = 0o666) -> int:
    """Creates a new file, in place of an existing one, and returns a descriptor for reading and writing. Does not
    follow a link of this name."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, mode)


def open_in_place(path: Path) -> BinaryIO:
    """Opens a file unbuffered for reading and writing; creates it if needed. Refuses a symbolic link. Raises
    OSError."""
    is_new = not path.exists()
    file = open(os.open(path, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o666), "r+b", buffering=0)  # noqa: SIM115
    if is_new:
        sync_folder(path.parent)
    return file


def is_regular_file(path: Path) -> bool:
    """Whether this is a regular file, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def sync_folder(folder: Path) -> None:
    """Makes new names in a folder survive a power cut: fsync of a file does not cover its directory entry."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError, ValueError):  # the earlier error is the one to report
        partial.unlink(missing_ok=True)


def check_space(
    target: Path, needed_bytes: int, advice: str = "Free up space, or choose a smaller type or another directory."
) -> None:
    """Raises OutputError when the disk of `target` has less than `needed_bytes` plus SPARE_BYTES free. `target` need
    not exist."""
    needed_bytes += SPARE_BYTES
    with disk_errors(target):
        place = target.absolute()
        while not place.exists():
            place = place.parent
        free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"'{target}' needs {needed_bytes / 1e9:.2f} GB and its disk has {free_bytes / 1e9:.2f} GB free. {advice}"
        )


# --- disk errors as messages ---


@contextlib.contextmanager
def disk_errors(path: Path, advice: str = "") -> Iterator[None]:
    """Turns an OSError into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise output_error(error, path, advice) from None


def output_error(error: OSError, path: Path, advice: str = "") -> OutputError:
    """Converts an OSError to an OutputError about `path`; `advice` is a sentence added to the message."""
    if error.errno in DISK_FULL:
        text = f"no space left for '{path}' ({error.strerror}); make room and try again."
    else:
        text = f"cannot write '{path}': {error.strerror or error}; choose a directory that can be written."
    return (OutputError if error.errno in _FATAL else FileOutputError)(f"{text} {advice}".rstrip())
