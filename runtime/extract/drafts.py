"""Makes draft tokens from finished answers: for the same page in another format, and for similar pages.

For instance, the project's own writer turns a table that was read as JSON into HTML, and the model's HTML will be much
the same. Drafts change no answer, only the time it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite4v.errors import AnswerError
from granite4v.runtime.engine.draft import DraftSource
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.formats import write
from granite4v.runtime.formats.table import Table
from granite4v.runtime.formats.tasks import task_or_question
from granite4v.runtime.model import Model

_MOST_OF_TASK = 1 << 13  # tokens that are kept of each remembered answer to a task
_MOST_OF_PAGE = 1 << 14  # tokens of cell texts that are kept of a page


def chains(questions: Sequence[Question]) -> tuple[tuple[int, ...], ...]:
    """Groups the questions about a page, given by their indices. Those of a group are best asked one after another,
    since one answer predicts the next; groups are independent of each other."""
    groups: dict[object, list[int]] = {}
    for place, question in enumerate(questions):
        key = "tables" if _is_predictable(question) else place
        groups.setdefault(key, []).append(place)
    return tuple(map(tuple, groups.values()))


class Drafts:
    """The draft sources of one run. Not thread-safe."""

    def __init__(self, model: Model) -> None:
        self._tokenizer = model.prompts.tokenizer()
        self._of_task: dict[str, DraftSource] = {}
        self._pieces: dict[str, DraftSource] = {}  # by page: its cell texts
        self._tables: dict[str, Any] = {}  # by page: the latest value of a table task

    def sources(self, page: str, question: Question) -> tuple[DraftSource, ...]:
        """Returns the draft sources for `Model.submit`: everything known so far that the answer may repeat.

        `page`: identifies the page, for instance the digest of its pixels.
        """
        found = [self._of_task.setdefault(_key(question), DraftSource(_MOST_OF_TASK))]
        found.append(self._pieces.setdefault(page, DraftSource(_MOST_OF_PAGE)))
        if _is_predictable(question) and page in self._tables:
            predicted = DraftSource(_MOST_OF_PAGE)
            predicted.predict(self._written(self._tables[page], question))
            found.append(predicted)
        return tuple(found)

    def add(self, page: str, question: Question, tokens: Sequence[int], value: Any) -> None:
        """Adds a finished answer: its tokens and its parsed value, None if parsing failed."""
        self._of_task.setdefault(_key(question), DraftSource(_MOST_OF_TASK)).add_answer(tokens)
        tables = (
            [value] if isinstance(value, Table) else value if task_or_question(question.task).gives_tables else None
        )
        if not tables:
            return
        if _is_predictable(question):
            self._tables[page] = tables
        pieces = self._pieces.setdefault(page, DraftSource(_MOST_OF_PAGE))
        for text in dict.fromkeys(cell.text for table in tables for cell in table.cells if cell.text):
            pieces.add(self._tokenizer.encode_plain(text))

    def forget(self, page: str) -> None:
        """Drops what is kept for a page, after the last answer about it."""
        self._pieces.pop(page, None)
        self._tables.pop(page, None)

    def _written(self, tables: list[Table], question: Question) -> list[int]:
        """Returns the tokens of the tables as an answer to `question`; none if its format cannot represent them."""
        try:
            text = write(tables[0] if len(tables) == 1 else tables, task_or_question(question.task).suffix)
        except AnswerError:
            return []
        return self._tokenizer.encode_plain(text)


def _is_predictable(question: Question) -> bool:
    """Whether the tables of another task on the page predict the answer."""
    return task_or_question(question.task).kind == "tables"


def _key(question: Question) -> str:
    return f"{question.task} {question.prompt_sha256}"
