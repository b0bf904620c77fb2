"""Schedules the questions about the pages in flight and collects their answers.

One thread follows all answers: the engine calls a listener, which wakes the thread. There are never more questions in
flight than the model answers in parallel, so nothing is queued in the engine, and a page's prefix is still in its
prefix cache when the next question about the page follows.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from granite4v.runtime.documents import Page
from granite4v.runtime.engine.stream import Progress
from granite4v.runtime.extract.asking import Asked, Asker
from granite4v.runtime.extract.attempts import Attempts
from granite4v.runtime.extract.drafts import chains
from granite4v.runtime.extract.earlier import Seen
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.page_records import abandoned_page, copied_page
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.results_log import ResultsLog
from granite4v.runtime.extract.state import State, Watch
from granite4v.runtime.model import Model

_WAIT_S = 1.0  # bounded because Ctrl-C does not interrupt a wait on Windows
# pages in the window for each parallel answer: failed pages, and pages without questions, pile up behind a slow one
_PAGES_EACH = 16


@dataclass(eq=False)
class Slot:
    """One question about a page, and its record once there is one."""

    question: Question
    after: Slot | None = None  # must be answered first, since its answer predicts this one
    asked: Asked | None = None
    record: Record | None = None


@dataclass(eq=False)
class PageWork:
    """A page in the window and its remaining questions, in order; no slots if nothing is left to ask."""

    source: str
    number: int | None
    n_pages: int | None
    seen: Seen
    slots: list[Slot] = field(default_factory=list)
    digest: str = ""
    page: Page | None = None  # with its pixels, until all questions are asked
    is_skipped: bool = False
    is_begun: bool = False  # at least one question was asked
    is_computed: bool = False  # at least one question was asked and answered without an error

    @property
    def is_complete(self) -> bool:
        return all(slot.record is not None for slot in self.slots)


def in_chains(slots: list[Slot]) -> None:
    """Makes each question wait for the one about the same page whose answer predicts its own."""
    for places in chains([slot.question for slot in slots]):
        for before, place in itertools.pairwise(places):
            slots[place].after = slots[before]


class Window:
    """The pages that are being read, in the order of their records. For use by one thread."""

    def __init__(
        self,
        asker: Asker,
        hashes: Mapping[str, str],
        options: ExtractOptions,
        log: ResultsLog,
        attempts: Attempts,
        state: State,
        watch: Watch,
    ) -> None:
        self._asker, self._hashes, self._options, self._log = asker, hashes, options, log
        self._attempts, self._state, self._watch = attempts, state, watch
        self._works: deque[PageWork] = deque()
        self._active: list[tuple[PageWork, Slot]] = []
        # (digest, task): the question whose answer is copied to pages with the same pixels
        self._owners: dict[tuple[str, str], tuple[Slot, PageWork]] = {}
        self._is_held = False  # a page has to wait, so no page behind it begins in this call of `ask`
        self._news = threading.Event()
        self._polled_at = time.perf_counter()

    @property
    def head(self) -> PageWork | None:
        """The page whose records come next."""
        return self._works[0] if self._works else None

    @property
    def is_active(self) -> bool:
        """Whether an answer is being generated."""
        return bool(self._active)

    @property
    def head_is_ready(self) -> bool:
        head = self.head
        return head is not None and (not head.slots or head.slots[0].record is not None)

    @property
    def has_room(self) -> bool:
        """Whether another page would begin soon. Waiting pages hold their pixels, so there are few of them."""
        n_parallel = self._asker.n_parallel
        n_waiting = sum(work.page is not None for work in self._works if not work.is_begun)
        is_free = len(self._active) < n_parallel and n_waiting < n_parallel and self._asker.has_room
        return is_free and len(self._works) < _PAGES_EACH * n_parallel

    def add(self, work: PageWork) -> None:
        if self._asker.is_drafting:
            in_chains(work.slots)
        self._works.append(work)

    def pop(self) -> None:
        """Removes the first page, after its last record was written."""
        work = self._works.popleft()
        for key in [key for key, (_, owner) in self._owners.items() if owner is work]:
            del self._owners[key]

    def finished(self) -> Iterator[Record]:
        """Yields the records of answered questions that are not written yet, in order.

        Leaves out copies and pages that failed without being asked: making them again costs nothing.
        """
        asked = (slot for work in self._works for slot in work.slots if slot.asked is not None)
        return (slot.record for slot in asked if slot.record is not None)

    def ask(self, progress: Progress | None) -> None:
        """Asks as many questions as there is room for, beginning with the first pages."""
        self._is_held = False
        for work in self._works:
            for slot in work.slots:
                if slot.record is None and slot.asked is None:
                    self._try(work, slot, progress)
            if work.page is not None and not any(s.record is None and s.asked is None for s in work.slots):
                work.page = None

    def _try(self, work: PageWork, slot: Slot, progress: Progress | None) -> None:
        """Asks one question, or gives it a record without asking, or leaves it for a later call.

        The first case that applies counts: the same question about the same pixels is in flight (wait for its answer);
        it has an answer without an error (copy it); the slot before it in its chain has no record yet (wait); the
        process died on the page too often (give the page up); the model is busy or the page may not begin (wait); else
        ask.
        """
        page, question = work.page, slot.question
        assert page is not None
        owner, _ = self._owners.get((work.digest, question.task), (None, None))
        if owner is not None and owner.record is None:
            return  # its answer will be copied
        like = self._log.answer_to(work.digest, question.task) if owner is None else owner.record
        if like is not None and like.error is None:
            slot.record = copied_page(page, question, self._hashes, like)
            return
        if slot.after is not None and slot.after.record is None:
            return
        if self._options.retry_failed and not work.is_begun:
            self._attempts.forget(work.digest)
        if not work.is_begun and self._attempts.exhausted(work.digest):
            slot.record = abandoned_page(page, question, self._hashes)
        elif len(self._active) < self._asker.n_parallel:
            if work.is_begun or self._may_begin(work):
                self._ask(work, slot, page, progress)
            else:
                self._is_held = True

    def _may_begin(self, work: PageWork) -> bool:
        """Whether a page may begin. A page that may have killed its process is read alone; pages behind it wait."""
        if self._is_held:
            return False
        begun = [other for other in self._works if other.is_begun and not other.is_complete]
        return not begun or not any(self._attempts.is_suspect(other.digest) for other in (work, *begun))

    def _ask(self, work: PageWork, slot: Slot, page: Page, progress: Progress | None) -> None:
        if not work.is_begun:
            self._attempts.begin(work.digest)
            work.is_begun = True
        self._owners[work.digest, slot.question.task] = slot, work
        self._state.n_in_flight = len(self._active) + 1
        self.show()
        slot.asked = self._asker.question(page, slot.question)
        self._active.append((work, slot))
        failed = slot.asked.ask(progress=progress, listener=self._news.set)
        if failed is not None:
            self._settle(work, slot, failed)

    def poll(self) -> None:
        """Collects the answers that have arrived since the last call."""
        now = time.perf_counter()
        if any(slot.asked is not None and slot.asked.n_tokens for _, slot in self._active):
            self._state.decode_s += now - self._polled_at
        self._polled_at = now
        for work, slot in list(self._active):
            assert slot.asked is not None
            record = slot.asked.poll()
            if record is not None:
                self._settle(work, slot, record)
        if self._active:
            self.show()

    def wait(self) -> None:
        """Waits until there may be something to poll, for at most `_WAIT_S`."""
        self._news.wait(_WAIT_S)
        self._news.clear()

    def stop(self) -> None:
        """Cancels what is in flight; complete answers still become records."""
        for _, slot in self._active:
            if slot.asked is not None and not slot.asked.is_done:
                slot.asked.cancel()
        for work, slot in list(self._active):
            assert slot.asked is not None
            if slot.asked.is_done and not slot.asked.was_cancelled:
                with contextlib.suppress(Exception):  # must not replace the error that ends the run
                    slot.record = slot.asked.poll() or slot.asked.poll()  # the first may deliver only progress
                work.is_computed |= slot.record is not None and slot.record.error is None
            slot.asked.close()
        self._active.clear()
        self._state.n_in_flight = self._state.n_answer_tokens = 0
        self._attempts.end()

    def _settle(self, work: PageWork, slot: Slot, record: Record) -> None:
        slot.record = record
        self._active.remove((work, slot))
        self._state.n_tokens += int(record.timings.get("n_generated", 0))
        if record.error is None:
            work.is_computed = True
        if work.is_complete:
            self._attempts.finish(work.digest)
            self._asker.forget(work.digest)
        self.show()

    def show(self) -> None:
        """Reports the run's position: the page whose record comes next, whatever else is in flight."""
        state, head = self._state, self.head
        if head is not None:
            open_slots = (slot.question.task for slot in head.slots if slot.record is None)
            state.source, state.page, state.n_pages = head.source, head.number, head.n_pages
            state.task, state.waited_s = next(open_slots, ""), 0.0
        state.n_in_flight = len(self._active)
        state.n_answer_tokens = sum(slot.asked.n_tokens for _, slot in self._active if slot.asked is not None)
        self._watch(state)


Say = Callable[[str], None]


def how_many(model: Model, options: ExtractOptions, n_questions: int | None, say: Say) -> int:
    """Returns the most answers in parallel, and says so once. `n_questions`: of the complete run; None if unknown."""
    asked = options.parallel or model.n_parallel
    n = min(asked, model.n_parallel)
    if n_questions is not None:
        n = min(n, max(1, n_questions))
    if n == model.n_parallel < min(asked, n_questions or asked):
        say(f"{model.n_parallel} answers at once, not {asked}: the model was loaded for that many")
    elif n > 1:
        why = "as asked for" if options.parallel else model.parallel_note or "the model was loaded for that many"
        say(f"up to {n} answers at once ({why})")
    return n
