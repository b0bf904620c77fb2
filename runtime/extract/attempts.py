"""Records on disk which pages are in flight, so that the next run knows which of them may have killed the process.

A page that was in flight alone when the process died (a signal, out of memory, an abort in native code, a power cut)
gets one death; later runs skip a page with `MAX_DEATHS`. If several pages were in flight, any of them may be at fault:
all become suspects, and the next run reads each of them alone. Pages are identified by their pixels, so a copy of a
skipped page is skipped as well. An exit that Python can handle, such as Ctrl-C, does not count.

What the file says is what the next run finds if the process dies at that moment. For new pages A and B:

    begin(A)   {"A": 1}                   A is alone: a death now would be its fault
    begin(B)   {"suspects": ["A", "B"]}   two pages: the cause would be unknown
    finish(B)  {"suspects": ["A"]}        A was not alone from its beginning, so it stays a suspect
    finish(A)  empty
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from granite4v.paths import OWN_PREFIX, disk_errors
from granite4v.runtime.extract.own_files import open_own

MAX_DEATHS = 2
FILE = f"{OWN_PREFIX}-attempts.json"
_SUSPECTS = "suspects"  # a key next to the digests


class Attempts:
    """Tracks, by digest, which pages were in flight when a process died, and how often a page was the cause."""

    def __init__(self, path: Path | None) -> None:
        """`path`: None to write no file. Raises OutputError for a file that cannot be opened."""
        self._path = path or Path(FILE)
        self._file = None if path is None else open_own(path)
        self._deaths, self._suspects = ({}, set()) if self._file is None else _read(self._file.read())
        self._in_flight: dict[str, bool] = {}  # digest: whether the page has been the only one since it began

    def exhausted(self, digest: str) -> bool:
        """Whether the process died on the page `MAX_DEATHS` times, so that it is not tried again."""
        return self._deaths.get(digest, 0) >= MAX_DEATHS

    def is_suspect(self, digest: str) -> bool:
        """Whether the page must be read alone."""
        return digest in self._suspects or digest in self._deaths

    def forget(self, digest: str) -> None:
        """Clears the page's history, so that it is tried like a new one."""
        if self.is_suspect(digest):
            self._deaths.pop(digest, None)
            self._suspects.discard(digest)
            self._write()

    def begin(self, digest: str) -> None:
        """Records that a page is in flight from now on. Raises OutputError."""
        for other in self._in_flight:
            self._in_flight[other] = False
        self._in_flight[digest] = not self._in_flight
        self._write(lasting=True)

    def finish(self, digest: str) -> None:
        """Clears a page after the last answer about it: it did not kill the process."""
        self._in_flight.pop(digest, None)
        self._deaths.pop(digest, None)
        self._suspects.discard(digest)
        self._write()

    def end(self) -> None:
        """Records at an exit that Python handles that no page is in flight, so none gets a death."""
        if self._in_flight:
            self._in_flight.clear()
            self._write()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, *, lasting: bool = False) -> None:
        """Writes what the next run must find if this process dies now.

        `lasting`: fsync, to survive a power cut. Not needed after a page was finished: its record is on disk, so losing
        that update does no harm.
        """
        if self._file is None:
            return
        content: dict[str, Any] = dict(self._deaths)
        for digest, is_alone in self._in_flight.items():
            if is_alone:
                content[digest] = self._deaths.get(digest, 0) + 1
        suspects = self._suspects.union(digest for digest, is_alone in self._in_flight.items() if not is_alone)
        if suspects:
            content[_SUSPECTS] = sorted(suspects)
        with disk_errors(self._path):
            self._file.seek(0)
            self._file.write(json.dumps(content).encode() if content else b"")
            self._file.truncate()
            if lasting:
                os.fsync(self._file.fileno())


def _read(content: bytes) -> tuple[dict[str, int], set[str]]:
    """Returns the deaths by digest, in the format of all versions, and the suspects."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):  # empty, or truncated by a power cut: nothing is known
        return {}, set()
    if not isinstance(found, dict):
        return {}, set()
    suspects = found.get(_SUSPECTS)
    deaths = {digest: n for digest, n in found.items() if isinstance(n, int) and n > 0}
    return deaths, {digest for digest in suspects if isinstance(digest, str)} if isinstance(suspects, list) else set()
