"""Defines what answers a run's questions: a model in this process, or anything else with the same interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from granite4v.runtime.documents import Page
from granite4v.runtime.engine.stream import Progress
from granite4v.runtime.extract.drafts import Drafts
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.page_records import PageQuestion
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.extract.record import Record
from granite4v.runtime.model import Model


class Asked(Protocol):
    """One question about one page, from asking it to its record; `PageQuestion` documents the members."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def is_done(self) -> bool: ...

    was_cancelled: bool

    def ask(self, *, progress: Progress | None, listener: Callable[[], None]) -> Record | None: ...

    def poll(self) -> Record | None: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class Asker(Protocol):
    """Answers questions. `is_drafting`: questions about the same page are answered faster one after another."""

    is_drafting: bool
    n_each: int  # the most answers in parallel of each model

    @property
    def n_parallel(self) -> int:
        """The most answers in parallel; may change during a run."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether there is memory for one more page."""
        ...

    def question(self, page: Page, question: Question) -> Asked:
        """Returns a question that has not been asked yet."""
        ...

    def forget(self, digest: str) -> None:
        """Drops what is kept for a page; called after the last answer about it."""
        ...


class ModelAsker:
    """Asks a model in this process."""

    has_room = True  # there is at most one page in flight for each parallel answer

    def __init__(self, model: Model, hashes: Mapping[str, str], options: ExtractOptions, n_parallel: int) -> None:
        self._model, self._hashes, self._options, self.n_parallel = model, hashes, options, n_parallel
        self.n_each = n_parallel
        self.is_drafting = options.drafting and n_parallel > 1
        self._drafts = Drafts(model) if self.is_drafting else None

    def question(self, page: Page, question: Question) -> PageQuestion:
        return PageQuestion(page, question, self._hashes, self._model, self._options, self._drafts)

    def forget(self, digest: str) -> None:
        if self._drafts is not None:
            self._drafts.forget(digest)
