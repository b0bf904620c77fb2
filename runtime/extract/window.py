"""The pages in flight: which questions about them are asked next, and what became of those that were asked.

One thread follows all answers: the engine calls a listener, which ends its wait. No more questions are asked at once
than the model answers side by side, so the engine has no queue, and a page's prefix is still in its cache when a
further question about the page follows.
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

_WAIT_S = 1.0  # for the sake of Windows, where a wait does not notice Ctrl-C
_PAGES_EACH = 16  # pages that wait for one before them, for each answer at once: those that failed or need no answer


@dataclass(eq=False)
class Slot:
    """A question about a page, and its record once there is one."""

    question: Question
    after: Slot | None = None  # asked when that one has been answered, which predicts this one
    asked: Asked | None = None
    record: Record | None = None


@dataclass(eq=False)
class PageWork:
    """A page on its way to its records, in order; one without slots has nothing to be asked."""

    source: str
    number: int | None
    n_pages: int | None
    seen: Seen
    slots: list[Slot] = field(default_factory=list)
    digest: str = ""
    page: Page | None = None  # with its pixels, until all questions are asked
    is_skipped: bool = False
    is_begun: bool = False  # in flight
    is_computed: bool = False  # at least one answer

    @property
    def is_complete(self) -> bool:
        return all(slot.record is not None for slot in self.slots)


def in_chains(slots: list[Slot]) -> None:
    """Makes questions wait for those about the same page that predict their answers."""
    for places in chains([slot.question for slot in slots]):
        for before, place in itertools.pairwise(places):
            slots[place].after = slots[before]


class Window:
    """The pages that are being read. For one thread."""

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
        self._owners: dict[
            tuple[str, str], tuple[Slot, PageWork]
        ] = {}  # (digest, task): the question that copies wait for
        self._is_held = False  # no further page is begun
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
        """Whether another page would be begun soon. Pages that wait hold their pixels, so there are few of them."""
        n_parallel = self._asker.n_parallel
        n_waiting = sum(work.page is not None for work in self._works if not work.is_begun)
        is_free = len(self._active) < n_parallel and n_waiting < n_parallel and self._asker.has_room
        return is_free and len(self._works) < _PAGES_EACH * n_parallel

    def add(self, work: PageWork) -> None:
        if self._asker.is_drafting:
            in_chains(work.slots)
        self._works.append(work)

    def pop(self) -> None:
        """After the last record of the first page was written."""
        work = self._works.popleft()
        for key in [key for key, (_, owner) in self._owners.items() if owner is work]:
            del self._owners[key]

    def finished(self) -> Iterator[Record]:
        """The answers that are there by now, in order; failures and copies can be made again at no cost."""
        asked = (slot for work in self._works for slot in work.slots if slot.asked is not None)
        return (slot.record for slot in asked if slot.record is not None)

    def ask(self, progress: Progress | None) -> None:
        """Asks as many questions as there is room for: those about the first pages first."""
        self._is_held = False
        for work in self._works:
            for slot in work.slots:
                if slot.record is None and slot.asked is None:
                    self._try(work, slot, progress)
            if work.page is not None and not any(s.record is None and s.asked is None for s in work.slots):
                work.page = None

    def _try(self, work: PageWork, slot: Slot, progress: Progress | None) -> None:
        page, question = work.page, slot.question
        assert page is not None
        owner, _ = self._owners.get((work.digest, question.task), (None, None))
        if owner is not None and owner.record is None:
            return  # a page with the same pixels is being read
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
        """A page that may have ended its process is read while no other is; those behind it wait, too."""
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
        """Takes what has come since the last time."""
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
        """Until there is something to poll."""
        self._news.wait(_WAIT_S)
        self._news.clear()

    def stop(self) -> None:
        """Ends what is in flight; answers that are complete become records."""
        for _, slot in self._active:
            if slot.asked is not None and not slot.asked.is_done:
                slot.asked.cancel()
        for work, slot in list(self._active):
            assert slot.asked is not None
            if slot.asked.is_done and not slot.asked.was_cancelled:
                with contextlib.suppress(Exception):  # the run ends with an error of its own
                    slot.record = slot.asked.poll() or slot.asked.poll()  # progress comes first
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
        """Tells where the run is: at the page whose record comes next, whatever else is in flight."""
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
    """The most answers at once, and says so once. `n_questions`: all of the run, where that is known."""
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
