"""Who answers the questions of a run: a model in this process, or whatever else answers them in the same way."""

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
    """One question about one page, on its way to a record; `PageQuestion` says what each of these does."""

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
    """Answers questions. `is_drafting`: answers are faster where those about the same page come one after another."""

    is_drafting: bool
    n_each: int  # answers at once of each model

    @property
    def n_parallel(self) -> int:
        """The most answers at once, which may change."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether there is memory for one more page."""
        ...

    def question(self, page: Page, question: Question) -> Asked:
        """Not asked yet."""
        ...

    def forget(self, digest: str) -> None:
        """After the last answer about a page."""
        ...


class ModelAsker:
    """Asks a model in this process."""

    has_room = True  # there is at most one page for each answer at once

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
