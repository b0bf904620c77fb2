"""Records on disk which pages are being processed, so that it is known after a crash.

A page that was in flight alone when its process died (a signal, no memory, an abort in native code, a power cut) has a
death; one with `MAX_DEATHS` is skipped by later runs. Of pages in flight together nobody knows which one it was: they
are suspects, and the next run reads each of them alone. Pages are identified by their pixels, so a copy of such a page
is skipped as well. An end that Python sees, such as Ctrl-C, does not count.
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
_SUSPECTS = "suspects"  # beside the deaths by digest


class Attempts:
    """Which pages, by digest, were in flight when a process died, and how often that was the page's fault."""

    def __init__(self, path: Path | None) -> None:
        """`path`: None to keep nothing. Raises OutputError for a file that cannot be opened."""
        self._path = path or Path(FILE)
        self._file = None if path is None else open_own(path)
        self._deaths, self._suspects = ({}, set()) if self._file is None else _read(self._file.read())
        self._in_flight: dict[str, bool] = {}  # whether it is alone, and was from its beginning

    def exhausted(self, digest: str) -> bool:
        """Whether the process died on the page so often that it is not tried again."""
        return self._deaths.get(digest, 0) >= MAX_DEATHS

    def is_suspect(self, digest: str) -> bool:
        """Whether the page should be read while nothing else is in flight."""
        return digest in self._suspects or digest in self._deaths

    def forget(self, digest: str) -> None:
        """Lets the page be tried as if it were new."""
        if self.is_suspect(digest):
            self._deaths.pop(digest, None)
            self._suspects.discard(digest)
            self._write()

    def begin(self, digest: str) -> None:
        """Notes that a page is in flight from now on. Raises OutputError."""
        for other in self._in_flight:
            self._in_flight[other] = False
        self._in_flight[digest] = not self._in_flight
        self._write(lasting=True)

    def finish(self, digest: str) -> None:
        """After the last answer about a page: whatever it was suspected of, it did not do."""
        self._in_flight.pop(digest, None)
        self._deaths.pop(digest, None)
        self._suspects.discard(digest)
        self._write()

    def end(self) -> None:
        """At an end that Python sees: no page is in flight, and none is to blame."""
        if self._in_flight:
            self._in_flight.clear()
            self._write()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, *, lasting: bool = False) -> None:
        """What the next run shall find if this process dies now. `lasting`: survives a power cut. That a page was
        finished may be lost, since its record is on the disk."""
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
    """Deaths by digest, as all versions write them, and suspects."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):  # empty, or cut off by a power cut: nothing is known
        return {}, set()
    if not isinstance(found, dict):
        return {}, set()
    suspects = found.get(_SUSPECTS)
    deaths = {digest: n for digest, n in found.items() if isinstance(n, int) and n > 0}
    return deaths, {digest for digest in suspects if isinstance(digest, str)} if isinstance(suspects, list) else set()
