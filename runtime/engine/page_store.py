"""Stores states of pages on disk: a folder of files, each named by its key, bounded in size.

Several processes may share a folder. A reader needs no lock: files appear complete and are never changed, and one that
is removed while it is read stays readable. Writers take turns, so that leftovers of killed writers can be told from
files that are being written. Nothing here may fail a request: a state that cannot be read or written costs only time,
and a warning.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from filelock import BaseFileLock, FileLock, Timeout

from granite4v.errors import PageStoreWarning
from granite4v.paths import cache_folder, is_private, is_regular_file, new_file, partial_path, remove_partial_files
from granite4v.runtime.engine import state_file
from granite4v.runtime.engine.state_file import DamagedState, Description, Stopped

FOLDER = "pages"  # in the cache folder
SUFFIX = ".state"
MAX_BYTES = 4 << 30  # about forty pages of a 4B model
DISK_SHARE = 0.2  # fraction of the disk space that would be free without the store
SPARE_BYTES = 1 << 20  # left free on a disk that the store may fill, for the file system itself
CLOCK_S = 60.0  # tolerance between the clocks of a file server and this machine
LOCK = "lock"
LOCK_TIMEOUT_S = 10.0  # long enough for another process to write a few hundred megabytes
_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")


@dataclass(frozen=True)
class Entry:
    """A file of the store. `last_used`: seconds since the epoch; `description`: None if it cannot be read."""

    path: Path
    n_bytes: int
    last_used: float
    description: Description | None = None

    @property
    def key(self) -> str:
        return self.path.name.removesuffix(SUFFIX)


class PageStore:
    """A folder of states. May be shared between threads and models."""

    def __init__(self, folder: str | Path | None = None, max_bytes: int | None = None) -> None:
        """`folder`: the user's own by default. `max_bytes`: limit for all files together; by default 4 GiB, or a fifth
        of the disk's free space if that is less. Nothing is written before the first state."""
        self.folder = cache_folder() / FOLDER if folder is None else Path(folder)
        self._max_bytes = max_bytes
        self._warned: set[str] = set()

    def path_of(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    # --- for engines ---

    def holds(self, key: str) -> bool:
        """Whether there is a regular file for this key; a link does not count."""
        return is_regular_file(self.path_of(key))

    def load(self, key: str) -> np.ndarray | None:
        """Returns the state, uint8 `(n,)`; None if it is missing or damaged. A damaged file is
        removed, with a warning."""
        path = self.path_of(key)
        try:
            self._check_folder()
            state = state_file.read(path, key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._warn("read", f"pages cannot be read from '{self.folder}': {error.strerror or error}.")
            return None
        except MemoryError:
            self._warn("memory", f"there is no memory to read a stored page; it is computed again ('{path}').")
            return None
        except DamagedState as damage:
            self._warn(key, f"a stored page is ignored, and computed again: {damage} ('{path}').")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # fails in a read-only store
            os.utime(path)
        return state

    def save(self, description: Description, state: np.ndarray, is_stopped: Callable[[], bool] = lambda: False) -> bool:
        """Writes a state, after evicting the least recently used ones if there is no room. Returns False if that fails,
        with a warning the first time, or without one once `is_stopped` returns true."""
        try:
            with self._locked(is_stopped):
                remove_partial_files(self.folder)  # left by killed processes: nobody else is writing now
                self._make_room(description, state)
                self._write(description, state, is_stopped)
            return True
        except Stopped:
            return False
        except (OSError, NotImplementedError, _NoRoom) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            self._warn("write", f"pages cannot be stored in '{self.folder}', and are computed again later: {reason}.")
            return False

    def _write(self, description: Description, state: np.ndarray, is_stopped: Callable[[], bool]) -> None:
        path = self.path_of(description.key)
        partial = partial_path(path)
        try:
            with FileIO(new_file(partial, 0o600), "wb") as file:
                state_file.write(file, description, state, is_stopped)
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def _make_room(self, description: Description, state: np.ndarray) -> None:
        entries = [entry for entry in self._files() if entry.key != description.key]
        n_bytes, n_needed = sum(entry.n_bytes for entry in entries), state_file.size(description, state)
        limit = self._limit(n_bytes)
        if n_needed > limit:
            raise _NoRoom(f"a page takes {n_needed:,} bytes, and the store may have {max(0, limit):,}")
        latest = time.time() + CLOCK_S

        def order(entry: Entry) -> float:
            # after a clock was set back, files may have times in the future, and would outlive every page used from now
            # on
            return entry.last_used if entry.last_used <= latest else 0.0

        for entry in sorted(entries, key=order):
            if n_bytes + n_needed <= limit:
                break
            entry.path.unlink(missing_ok=True)
            n_bytes -= entry.n_bytes

    def _limit(self, n_stored: int) -> int:
        room = shutil.disk_usage(self.folder).free + n_stored
        if self._max_bytes is not None:
            return min(self._max_bytes, room - SPARE_BYTES)
        return min(MAX_BYTES, int(DISK_SHARE * room))

    @contextlib.contextmanager
    def _locked(self, is_stopped: Callable[[], bool]) -> Iterator[None]:
        """Makes this the only writer of the folder, which is created if need be. Raises OSError, NotImplementedError,
        Stopped."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_folder()
        lock = self._lock()
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while not is_stopped():
            try:
                lock.acquire(timeout=0.2)
            except Timeout:
                if time.monotonic() < deadline:
                    continue
                raise OSError(errno.EAGAIN, "another process does not finish writing to it") from None
            try:
                yield
            finally:
                lock.release()
            return
        raise Stopped

    def _lock(self) -> BaseFileLock:
        return FileLock(self.folder / LOCK, mode=0o600)

    def _check_folder(self) -> None:
        """Closes the folder to other users, who could otherwise read pages or plant files in it. Raises OSError."""
        folder = Path(os.path.realpath(self.folder, strict=True))  # `Path.resolve` raises an error of its own for loops
        if not is_private(folder):
            folder.chmod(0o700)
            if not is_private(folder):
                raise PermissionError(errno.EPERM, "it belongs to another user")

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(text, PageStoreWarning, stacklevel=3)

    # --- for users ---

    def entries(self) -> list[Entry]:
        """Lists the files, most recently used first. Raises OSError."""
        found = []
        for entry in self._files():
            try:
                description = state_file.describe(entry.path)
            except (DamagedState, OSError):
                description = None
            found.append(Entry(entry.path, entry.n_bytes, entry.last_used, description))
        return sorted(found, key=lambda entry: -entry.last_used)

    def clear(self, older_than_s: float = 0.0) -> tuple[int, int]:
        """Removes files that were not used for this long. Returns how many files and bytes were removed. Raises
        OSError."""
        if self.folder.is_dir():
            with contextlib.suppress(Timeout, OSError, NotImplementedError), self._lock().acquire(blocking=False):
                remove_partial_files(self.folder)  # left by killed processes; skipped while a process is writing
        limit = time.time() - older_than_s
        removed = [entry for entry in self._files() if not older_than_s or entry.last_used < limit]
        for entry in removed:
            entry.path.unlink(missing_ok=True)
        return len(removed), sum(entry.n_bytes for entry in removed)

    def verify(self) -> Iterator[tuple[Entry, str | None]]:
        """Yields every file and what is wrong with it, None if nothing is. Damaged files are removed, unless the store
        is read-only. Raises OSError."""
        for entry in self._files():
            try:
                state_file.read(entry.path, entry.key)
            except FileNotFoundError:
                continue
            except DamagedState as damage:
                with contextlib.suppress(OSError):
                    entry.path.unlink(missing_ok=True)
                yield entry, str(damage)
            except OSError as error:
                yield entry, f"it cannot be read: {error.strerror or error}"
            except MemoryError:
                yield entry, "there is no memory to read it"
            else:
                yield entry, None

    def _files(self) -> list[Entry]:
        """The files that belong to the store by their names; none if there is no folder."""
        found = []
        try:
            with os.scandir(self.folder) as names:
                for name in names:
                    if _NAME.fullmatch(name.name) and name.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            status = name.stat(follow_symlinks=False)
                            found.append(Entry(Path(name.path), status.st_size, status.st_mtime))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return found


class _NoRoom(Exception):
    """A state is larger than the store may be."""
