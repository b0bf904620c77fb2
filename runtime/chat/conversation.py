"""The turns and attached pages of a conversation as data, and the messages for the model that are made from them.

Knows no model. A page belongs to the turn that asked the first question about it; until then it waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from granite4v.errors import Granite4vError
from granite4v.runtime.chat.pages import ChatPage
from granite4v.runtime.formats.tasks import QUESTION, Task, find_task
from granite4v.runtime.grammar.grammar import Grammar


class ChatError(Granite4vError):
    """Raised for a command that is unknown, incomplete or not possible now."""


@dataclass(frozen=True)
class Question:
    """What is asked: `text` as the model gets it (words, a task's tag, or a prompt with a schema).

    `task`: its name in the table of tasks. `schema`: the JSON Schema of the answer, for a task that takes one.
    `constraint`: the grammar that constrains the answer.
    """

    text: str
    task: str = QUESTION.name
    schema: dict[str, Any] | None = None
    constraint: Grammar | None = field(default=None, compare=False)

    @property
    def kind(self) -> Task:
        return find_task(self.task)

    @property
    def is_task(self) -> bool:
        """Whether it is a task, which is about one page, and not the user's own question."""
        return self.kind is not QUESTION

    @property
    def label(self) -> str:
        """The question as a user would write it: the words, the tag, or the task's name."""
        return self.text if not self.is_task else self.kind.tag or self.task


@dataclass(frozen=True)
class Stats:
    """The tokens and times of one answer.

    The prompt had `n_prompt` tokens, `n_image` of them image tokens; `n_reused` of them came from the prefix cache and
    `n_stored` from the page store. `n_encoded` images had to be encoded. Times are in seconds, from the question on.
    """

    n_prompt: int = 0
    n_image: int = 0
    n_reused: int = 0
    n_stored: int = 0
    n_encoded: int = 0
    n_generated: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0
    tokens_per_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True)
class Turn:
    """A question and its answer. `pages`: those that came with the question; `about`: the page that a task read.
    `finish_reason`: see `Answer`."""

    question: Question
    pages: tuple[ChatPage, ...]
    answer: str
    finish_reason: str = "stop"
    about: ChatPage | None = None
    stats: Stats | None = field(default=None, compare=False)


@dataclass
class Conversation:
    """A conversation. `waiting`: pages that go with the next question. `chosen`: the page for tasks, if the user chose
    one."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    waiting: list[ChatPage] = field(default_factory=list)
    chosen: ChatPage | None = None

    @property
    def pages(self) -> list[ChatPage]:
        """All attached pages, in the order in which the model sees them."""
        return [*(page for turn in self.turns for page in turn.pages), *self.waiting]

    @property
    def current(self) -> ChatPage | None:
        """The page that tasks read: the chosen one, or the last one attached."""
        pages = self.pages
        return self.chosen if self.chosen in pages else pages[-1] if pages else None

    def find(self, page: ChatPage) -> ChatPage | None:
        """The attached page that is the same page of the same file, with the same pixels."""
        same = (other for other in self.pages if (other.path, other.number) == (page.path, page.number))
        return next((other for other in same if other.digest == page.digest), None)

    # --- what the model is asked ---

    def messages(self, question: str | None = None) -> tuple[list[dict[str, Any]], list[ChatPage]]:
        """The messages of all turns, then of a question with the waiting pages; and all these pages, in order."""
        messages = self._beginning()
        for turn in self.turns:
            messages.append(_user(turn.question.text, turn.pages))
            messages.append({"role": "assistant", "content": turn.answer})
        if question is not None:
            messages.append(_user(question, self.waiting))
        return messages, self.pages if question is not None else [page for turn in self.turns for page in turn.pages]

    def messages_about(self, question: str, page: ChatPage) -> tuple[list[dict[str, Any]], list[ChatPage]]:
        """The messages of a question about a single page, as in `ask` and `extract`: without earlier turns."""
        return [*self._beginning(), _user(question, [page])], [page]

    def _beginning(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    # --- changes ---

    def attach(self, page: ChatPage) -> None:
        self.waiting.append(page)
        self.chosen = None

    def add(self, turn: Turn) -> None:
        """Appends a turn; its pages no longer wait."""
        self.waiting = [page for page in self.waiting if page not in turn.pages]
        self.turns.append(turn)

    def detach(self, page: ChatPage) -> None:
        """Removes a page; the turns about it are kept, as text."""
        self.waiting = [other for other in self.waiting if other is not page]
        self.turns = [
            replace(turn, pages=tuple(other for other in turn.pages if other is not page)) for turn in self.turns
        ]

    def undo(self) -> Turn:
        """Removes the last turn and returns it; its pages wait again. Raises ChatError without turns."""
        if not self.turns:
            raise ChatError("there is no question to take back.")
        turn = self.turns.pop()
        self.waiting = [*turn.pages, *self.waiting]
        return turn

    def clear(self) -> None:
        """Removes all turns; all pages stay attached."""
        self.waiting, self.turns = self.pages, []


def _user(text: str, pages: Sequence[ChatPage]) -> dict[str, Any]:
    kinds = ("image" if page.n_frames is None else "video" for page in pages)
    return {"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}
