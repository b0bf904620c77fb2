"""The progress of a run, for display."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from granite4v.runtime.extract.results_log import Counts

MAX_PATHS = 100_000


@dataclass
class State:
    """The progress of a run; the same object for the complete run.

    `source`, `page` and `task` are those of the record that comes next; pages behind it may be in flight, too.
    """

    source: str = ""
    page: int | None = None
    n_pages: int | None = None
    task: str = ""
    n_in_flight: int = 0  # answers that are being generated
    n_answer_tokens: int = 0  # of these answers
    waited_s: float = 0.0  # so far, while a document is opened or a page is rendered
    n_documents: int = 0  # begun; 0 while pages are counted
    n_documents_total: int | None = None  # None if unknown
    n_pages_total: int | None = None
    n_pages_read: int = 0  # by this process: the pages that `left_s` extrapolates from
    n_pages_known: int = 0  # not read by this process: read by an earlier run, copied, or failed
    n_tokens: int = 0  # of finished answers
    decode_s: float = 0.0  # while at least one answer was being generated
    began: float = field(default_factory=time.monotonic)
    counts: Counts = field(default_factory=Counts)  # of all records, including an earlier run's
    left_out: Counts = field(default_factory=Counts)  # of documents that this run was not given; known at the end
    n_resumed: int = 0  # records of an earlier run
    n_replaced: int = 0  # records of an earlier run that were replaced, or dropped with nothing in their place
    n_unwritten: int = 0  # files that could not be written
    paths: list[Path] = field(default_factory=list)  # files written, the first MAX_PATHS
    n_paths: int = 0

    @property
    def incomplete(self) -> bool:
        """Whether anything that was requested is missing, invalid or truncated."""
        missing = self.counts.n_incomplete - self.left_out.n_incomplete
        return bool(missing or self.n_unwritten)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers per second of the time in which any was generated; 0 before the first."""
        return (self.n_tokens + self.n_answer_tokens) / self.decode_s if self.decode_s > 0 else 0.0

    def left_s(self, now: float) -> float | None:
        """Returns the seconds to the end, if the other pages take as long as those that were read; None if unknown.

        `now`: from `time.monotonic`.
        """
        if self.n_pages_total is None or not self.n_pages_read:
            return None
        n_left = self.n_pages_total - self.n_pages_read - self.n_pages_known
        return max(0.0, (now - self.began) / self.n_pages_read * n_left)

    def wrote(self, paths: Sequence[Path]) -> None:
        self.n_paths += len(paths)
        self.paths += paths[: MAX_PATHS - len(self.paths)]


Watch = Callable[[State], None]


def waiting(state: State, watch: Watch) -> Callable[[str, int | None, float], None]:
    """Returns a callback for `documents.open_pages` that reports to `watch` how long a document or page takes."""

    def wait(source: str, number: int | None, waited_s: float) -> None:
        state.source, state.page, state.n_pages = source, number, None
        state.task, state.n_answer_tokens, state.waited_s = "", 0, waited_s
        watch(state)

    return wait
