"""Decides which results of an earlier run are still valid: which pages need not be read again, which records are stale.

A file is recognized by its state (size and modification time), a page by its pixels. Records of an unchanged file stay
valid, failures included, unless a retry may succeed. Every run retries a document that could not be opened, so that a
password, or more memory, helps at once; but not one that crashed the reader process, since it would cost its time
limits in every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from granite4v.errors import DocumentError, Granite4vError
from granite4v.runtime.documents import Page, PageFailure, PageSkipped, ReaderEnded
from granite4v.runtime.documents.sources import state_of
from granite4v.runtime.extract.record import Key
from granite4v.runtime.extract.results_log import Entry, ResultsLog

TRIED_AGAIN = ("MemoryError",)  # failures of a page that every run retries


def earlier_error(log: ResultsLog, source: str, number: int | None, file_state: str | None) -> Granite4vError | None:
    """Returns how an earlier run failed at a page, or at opening a document (`number` None), for
    `documents.open_pages`.

    None for a file that has changed since, and for a failure that is retried.
    """
    for task in log.tasks():
        key = (source, number, task)
        entry = log.get(key)
        if entry is None or not entry.failed or file_state is None or entry.file_state != file_state:
            continue
        ended = entry.error_type == ReaderEnded.__name__
        if ended or (number is not None and entry.error_type not in TRIED_AGAIN):
            return (ReaderEnded if ended else DocumentError)(log.read(key).error)
    return None


def earlier_source(log: ResultsLog) -> Callable[[Path], str | None]:
    """Returns a function for `documents.count_pages` that finds what an earlier run called a file. The file may now be
    given by another path, relative or absolute, or by a link.

    Paths of the earlier run are resolved against the current directory, which may have been another one then. So a
    file counts as the same only if its state is that of a record.
    """
    known = {os.path.realpath(source): source for source in log.sources()}

    def find(path: Path) -> str | None:
        source, state = known.get(os.path.realpath(path)), state_of(path)
        if source is None or state is None:
            return None
        return source if any(log.entry(key).file_state == state for key in log.keys_of(source)) else None

    return find


@dataclass
class Seen:
    """What this run has seen of one document."""

    source: str
    file_state: str | None = None
    n_pages: int | None = None
    keys: set[Key] = field(default_factory=set)  # whose records are up to date
    changed: bool = False  # a record was replaced


class Earlier:
    """Compares pages with the records in a log, without changing it."""

    def __init__(
        self, log: ResultsLog, tasks: Sequence[str], *, retry_failed: bool, has_image: Callable[[str], bool] | None
    ) -> None:
        """`has_image`: whether the report has the image of a page, by digest; None without a report."""
        self._log, self._tasks, self._retry_failed, self._has_image = log, tasks, retry_failed, has_image

    def wanted(self, source: str, number: int, file_state: str | None) -> bool:
        """Whether a page must be rendered; for `documents.open_pages`."""
        entries = [self._log.get((source, number, task)) for task in self._tasks]
        if not all(entry is not None and self._holds(entry, file_state) for entry in entries):
            return True
        shown = next((entry.digest for entry in entries if entry is not None), None)
        return self._has_image is not None and shown is not None and not self._has_image(shown)

    def keeps(self, key: Key, item: Page | PageFailure) -> bool:
        """Whether a record is still valid: its file is unchanged, or it is an answer about the same pixels.

        If the page fails now, an answer stays valid unless the file has changed, and so does the same failure.
        """
        entry = self._log.get(key)
        if entry is None:
            return False
        if isinstance(item, Page):
            return self._holds(entry, item.file_state) or (not entry.failed and entry.digest == item.digest)
        if not entry.failed:
            return entry.file_state in (None, item.file_state)
        return entry.file_state == item.file_state and self._log.read(key).error == str(item.error)

    def saw(self, seen: Seen, item: Page | PageFailure | PageSkipped) -> None:
        """Notes which records are up to date now that this page was seen."""
        seen.file_state = item.file_state
        if isinstance(item, Page | PageSkipped):
            seen.n_pages = item.n_pages
        seen.keys.update((item.source, item.number, task) for task in self._tasks)
        if isinstance(item, Page):  # same pixels: records for tasks that are not asked for now stay valid as well
            keys = [key for key in self._log.keys_of(item.source) if key[1] == item.number]
            seen.keys.update(key for key in keys if self._digest(key) == item.digest)

    def stale(self, seen: Seen) -> list[Key]:
        """Returns the records of a document's earlier state, after all its pages were seen."""
        return [key for key in self._log.keys_of(seen.source) if key not in seen.keys and self._is_stale(key, seen)]

    def _is_stale(self, key: Key, seen: Seen) -> bool:
        entry, page = self._log.get(key), key[1]
        if entry is not None and seen.file_state is not None and entry.file_state not in (None, seen.file_state):
            return True
        return seen.n_pages is not None and (page is None or page > seen.n_pages)

    def _holds(self, entry: Entry, file_state: str | None) -> bool:
        if entry.failed and (self._retry_failed or entry.error_type in TRIED_AGAIN):
            return False
        return file_state is not None and entry.file_state == file_state

    def _digest(self, key: Key) -> str | None:
        entry = self._log.get(key)
        return None if entry is None else entry.digest
