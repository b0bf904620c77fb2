"""Records on disk which page is being processed, so that it is known after a crash.

A page whose process died (a signal, no memory, an abort in native code, a power cut) `MAX_DEATHS` times is skipped
by later runs. Pages are identified by their pixels, so a copy of such a page is skipped as well. An end that Python
sees, such as Ctrl-C, does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from granite4v.paths import OWN_PREFIX, disk_errors
from granite4v.runtime.extract.own_files import open_own

MAX_DEATHS = 2
FILE = f"{OWN_PREFIX}-attempts.json"


class Attempts:
    """How often each page, by digest, was begun and never finished; only numbers above zero are kept."""

    def __init__(self, path: Path | None) -> None:
        """`path`: None to keep nothing. Raises OutputError for a file that cannot be opened."""
        self._path = path or Path(FILE)
        self._file = None if path is None else open_own(path)
        self._begun = {} if self._file is None else _read(self._file.read())

    def exhausted(self, digest: str) -> bool:
        """Whether the page was begun so often that it is not tried again."""
        return self._begun.get(digest, 0) >= MAX_DEATHS

    def forget(self, digest: str) -> None:
        """Lets the page be tried as if it were new."""
        if self._begun.pop(digest, 0):
            self._write()

    @contextlib.contextmanager
    def begin(self, digest: str) -> Iterator[None]:
        """Counts an attempt that the block, if it ends at all, takes back. Raises OutputError."""
        if self._file is None:
            yield
            return
        before = self._begun.get(digest, 0)
        self._begun[digest] = before + 1
        self._write(lasting=True)
        try:
            yield
        except BaseException:
            self._begun[digest] = before
            raise
        else:
            self._begun[digest] = 0
        finally:
            self._write()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, *, lasting: bool = False) -> None:
        """`lasting`: survives a power cut. That a page was finished may be lost, since its record is on the disk."""
        if self._file is None:
            return
        self._begun = {digest: n for digest, n in self._begun.items() if n}
        with disk_errors(self._path):
            self._file.seek(0)
            self._file.write(json.dumps(self._begun).encode() if self._begun else b"")
            self._file.truncate()
            if lasting:
                os.fsync(self._file.fileno())


def _read(content: bytes) -> dict[str, int]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):  # empty, or cut off by a power cut: nothing is known
        return {}
    if not isinstance(found, dict):
        return {}
    return {digest: n for digest, n in found.items() if isinstance(n, int) and n > 0}
