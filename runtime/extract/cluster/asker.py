"""Sends questions to workers, and sends them again if their worker dies."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from granite4v.errors import DeviceError, ModelFileError
from granite4v.runtime.documents import Page
from granite4v.runtime.engine.stream import Progress
from granite4v.runtime.extract.cluster.connection import room_bytes
from granite4v.runtime.extract.cluster.crew import Crew, Hand, Say, last_line
from granite4v.runtime.extract.cluster.worker import PageFields
from granite4v.runtime.extract.document_files import described
from granite4v.runtime.extract.page_records import begun
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.extract.record import Record

MOST_DEATHS = 3  # workers that may die while they read one page and nothing else
_LOOK_S = 1.0  # between steps without news: a cluster reports a new node only when it is asked
_NODE_DIED = "its node has died"  # in Ray's message: then no page is at fault


@dataclass(eq=False)
class SentPage:
    """A page's pixels in the object store, and what happened to the workers that read it."""

    reference: Any
    n_bytes: int
    hand: Hand | None = None  # the last worker that got it: further questions find its prefix in that worker's cache
    n_deaths: int = 0
    is_suspect: bool = False  # was in flight when its worker died, so it must be read alone


class RemoteQuestion:
    """One question about one page, like `PageQuestion`, but answered by a worker."""

    n_tokens = 0  # unknown until the record arrives

    def __init__(self, asker: RayAsker, page: Page, question: Question, i_question: int) -> None:
        self._asker, self.i_question = asker, i_question
        self.fields, self.begun = PageFields.of(page), begun(page, question, asker.hashes)
        self._page: Page | None = page
        self.sent: SentPage | None = None
        self.record: Record | None = None
        self.was_cancelled = False

    def ask(self, *, progress: Progress | None, listener: Callable[[], None]) -> Record | None:
        assert self._page is not None
        self.sent, self._page = self._asker.sent(self._page), None
        self._asker.add(self, listener)
        return None

    def poll(self) -> Record | None:
        """Returns the record once there is one. Raises ModelFileError and DeviceError, which would fail any other page
        too."""
        self._asker.step()
        return self.record

    @property
    def is_done(self) -> bool:
        return self.record is not None

    def cancel(self) -> None:
        self.was_cancelled = True

    def close(self) -> None:
        """Does nothing: workers end with the run."""


class RayAsker:
    """Distributes questions to the workers of a crew. For use by one thread."""

    def __init__(
        self,
        ray: Any,
        crew: Crew,
        questions: tuple[Question, ...],
        hashes: Mapping[str, str],
        say: Say,
        *,
        drafting: bool,
        n_questions: int | None,
    ) -> None:
        """`n_questions`: of the run; None if unknown. `crew` must have a worker whose model is loaded."""
        self._ray, self._crew, self._say, self.hashes = ray, crew, say, hashes
        self._places = {question.task: place for place, question in enumerate(questions)}
        self._n_questions = n_questions
        assert crew.loaded is not None
        self.n_each = crew.loaded.n_parallel
        self.is_drafting = drafting and self.n_each > 1
        self._queue: deque[RemoteQuestion] = deque()
        self._pages: dict[str, SentPage] = {}
        self._has_news = True
        self._stepped_at = 0.0

    @property
    def n_parallel(self) -> int:
        n = max(1, len(self._crew.hands)) * self.n_each
        return n if self._n_questions is None else max(1, min(n, self._n_questions))

    @property
    def has_room(self) -> bool:
        held = sum(page.n_bytes for page in self._pages.values())
        return not self._pages or held < room_bytes(self._crew.nodes)

    def question(self, page: Page, question: Question) -> RemoteQuestion:
        return RemoteQuestion(self, page, question, self._places[question.task])

    def forget(self, digest: str) -> None:
        page = self._pages.pop(digest, None)
        if page is not None and page.hand in self._crew.hands:
            page.hand.actor.forget.remote(digest)

    def sent(self, page: Page) -> SentPage:
        """Returns the page in the object store, where the first call puts it."""
        found = self._pages.get(page.digest)
        if found is None:
            pixels = np.asarray(page.image)
            found = self._pages[page.digest] = SentPage(self._ray.put(pixels), pixels.nbytes)
        return found

    def add(self, question: RemoteQuestion, listener: Callable[[], None]) -> None:
        def wake() -> None:
            self._has_news = True
            listener()

        self._crew.wake = wake
        self._queue.append(question)
        self._send()

    def step(self) -> None:
        """Collects finished calls, replaces missing workers, and sends the queued questions that a worker can take.

        Without news, does so only every `_LOOK_S`.
        """
        if not self._has_news and time.monotonic() - self._stepped_at < _LOOK_S:
            return
        self._has_news, self._stepped_at = False, time.monotonic()
        for hand, question, done in self._crew.take():
            if question in hand.in_flight:
                self._ended(hand, question, done)
        self._crew.look()
        self._send()

    def _ended(self, hand: Hand, question: RemoteQuestion, done: Future[Any]) -> None:
        errors = self._ray.exceptions
        try:
            record = done.result()
        except errors.RayTaskError as error:  # raised by the worker's own code
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, ModelFileError | DeviceError):
                raise type(cause)(f"on node '{hand.node.host}': {cause}") from None
            record = replace(question.begun, error=described(cause), error_type=type(cause).__name__)
        except errors.RayError as error:
            self._died(hand, error)
            return
        hand.in_flight.remove(question)
        question.record = record

    def _died(self, hand: Hand, error: Exception) -> None:
        """Puts a dead worker's questions back at the head of the queue.

        Unless its node died, any page of the worker may be at fault: all become suspects, and each is read alone from
        now on. A death counts only against a page that was alone. A page with `MOST_DEATHS` is given up.
        """
        self._crew.dismiss(hand)
        lost, hand.in_flight = hand.in_flight, []
        pages = list({id(question.sent): question.sent for question in lost}.values())
        if _NODE_DIED not in str(error):
            for page in pages:
                page.is_suspect = True
                page.n_deaths += len(pages) == 1
        for question in reversed(lost):
            if question.sent.n_deaths >= MOST_DEATHS:
                question.record = _abandoned(question, error)
            else:
                self._queue.appendleft(question)
        n = len(pages)
        what = "its page is" if n == 1 else f"its {n} pages are"
        self._say(f"a worker on node '{hand.node.host}' died ({last_line(error)}); {what} read again")
        self._crew.look(now=True)

    def _send(self) -> None:
        reserved = self._reserved()
        for question in list(self._queue):
            assert question.sent is not None
            hand = self._hand_for(question.sent, reserved)
            if hand is None:
                continue
            self._queue.remove(question)
            question.sent.hand = hand
            hand.in_flight.append(question)
            reference = hand.actor.read.remote(question.fields, question.sent.reference, question.i_question)
            self._crew.follow(hand, question, reference)

    def _reserved(self) -> list[Hand]:
        """Returns the workers that take no more pages until a suspect can be read there alone: one for each queued
        suspect, those with the fewest questions in flight first."""
        pages = {id(q.sent) for q in self._queue if q.sent is not None and q.sent.is_suspect}
        ready = [hand for hand in self._crew.hands if hand.loaded is not None]
        return sorted(ready, key=lambda hand: len(hand.in_flight))[: len(pages)]

    def _hand_for(self, page: SentPage, reserved: list[Hand]) -> Hand | None:
        """Returns the worker to send a question about a page to; None if it has to wait.

        A suspect waits for a reserved worker with no other page. Other pages stay with the worker that has them in its
        prefix cache, even if another one is free; a new page goes to the worker with the fewest questions.
        """
        if page.is_suspect:
            mine = [hand for hand in reserved if all(other.sent is page for other in hand.in_flight)]
            return mine[0] if mine and mine[0].is_free else None
        hands = [hand for hand in self._crew.hands if hand.is_free and hand not in reserved and not _is_alone(hand)]
        if page.hand in self._crew.hands:
            return page.hand if page.hand in hands else None
        return min(hands, key=lambda hand: len(hand.in_flight), default=None)


def _is_alone(hand: Hand) -> bool:
    """Whether a worker reads a page that must be read alone."""
    return any(question.sent.is_suspect for question in hand.in_flight)


def _abandoned(question: RemoteQuestion, error: Exception) -> Record:
    why = (
        f"the worker that read this page, and no other, died {MOST_DEATHS} times (killed, out of memory, or a crash in "
        f"native code: {last_line(error)}), so it is skipped; try it again with --resume --retry-failed."
    )
    return replace(question.begun, error=why, error_type="ProcessDied")
