"""Starts the workers of a run on every node, replaces those that die, and collects their finished calls."""

from __future__ import annotations

import contextlib
import queue
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from granite4v.errors import DeviceError, Granite4vError
from granite4v.runtime.extract.cluster.connection import Node, Share, nodes, shares
from granite4v.runtime.extract.cluster.worker import Assignment, Loaded, Worker

LOOK_S = 2.0  # between two requests for the list of nodes
MOST_STARTS = 3  # failed starts in a row before a node is left alone
Say = Callable[[str], None]
Event = tuple["Hand", Any, "Future[Any]"]


@dataclass(eq=False)
class Hand:
    """One worker. `loaded`: None until its model is loaded; `in_flight`: the questions it is answering."""

    node: Node
    share: Share
    actor: Any
    loaded: Loaded | None = None
    in_flight: list[Any] = field(default_factory=list)

    @property
    def is_free(self) -> bool:
        return self.loaded is not None and len(self.in_flight) < self.loaded.n_parallel


class Crew:
    """Starts and ends workers. For use by one thread.

    `wake` may be replaced: it is called, from other threads, when there is something to `take`.
    """

    def __init__(self, ray: Any, assignment: Assignment, say: Say) -> None:
        self._ray, self._assignment, self._say = ray, assignment, say
        self._sent = ray.put(assignment)
        self.wake: Callable[[], None] = lambda: None
        self.hands: list[Hand] = []
        self.loaded: Loaded | None = None  # from the first worker that is ready; the others are alike
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._failures: Counter[str] = Counter()  # by node: failed starts in a row
        self._left_alone: dict[str, Granite4vError] = {}  # by node: why no worker is started there any more
        self._looked_at = 0.0
        self.nodes: list[Node] = []

    def look(self, *, now: bool = False) -> None:
        """Starts missing workers, at most every `LOOK_S` unless `now`. If there are none and none can be started,
        raises the error of the first node that was left alone."""
        if not now and time.monotonic() - self._looked_at < LOOK_S:
            return
        self._looked_at = time.monotonic()
        self.nodes = nodes(self._ray)
        options = self._assignment.options
        for node in self.nodes:
            if node.id in self._left_alone:
                continue
            missing = Counter(shares(node, options.n_threads, options.device))
            missing.subtract(hand.share for hand in self.hands if hand.node.id == node.id)
            for share in missing.elements():
                self._start(node, share)
        if not self.hands and self._left_alone:
            raise next(iter(self._left_alone.values()))

    def _start(self, node: Node, share: Share) -> None:
        place = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)
        actor = (
            self._ray.remote(Worker)
            .options(num_cpus=share.n_cpus, num_gpus=share.n_gpus, scheduling_strategy=place, max_restarts=0)
            .remote(share.n_cpus)
        )
        hand = Hand(node, share, actor)
        self.hands.append(hand)
        self.follow(hand, None, actor.load.remote(self._sent))

    def follow(self, hand: Hand, item: Any, reference: Any) -> None:
        """Makes `take` return the call behind `reference` once it has ended. `item`: what it is about; None for the
        start of a worker."""
        future: Future[Any] = reference.future()
        future.add_done_callback(lambda done: self._note((hand, item, done)))

    def _note(self, event: Event) -> None:
        self._events.put(event)
        self.wake()

    def take(self) -> list[Event]:
        """Returns the calls that have ended since the last time, except starts, which are handled here.

        Raises the error of a node on which no worker can be started, as long as no other worker is ready.
        """
        found: list[Event] = []
        while True:
            try:
                hand, item, done = self._events.get_nowait()
            except queue.Empty:
                return found
            if item is not None:
                found.append((hand, item, done))
            elif hand in self.hands:
                self._started(hand, done)

    def _started(self, hand: Hand, done: Future[Any]) -> None:
        try:
            hand.loaded = done.result()
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            self.dismiss(hand)
            if isinstance(cause, Granite4vError):
                self._leave_alone(hand.node, type(cause)(f"on node '{hand.node.host}': {cause}"))
                return
            self._failures[hand.node.id] += 1
            if self._failures[hand.node.id] >= MOST_STARTS:
                why = DeviceError(f"on node '{hand.node.host}', no worker starts: {last_line(error)}.")
                self._leave_alone(hand.node, why)
            return
        self._failures.pop(hand.node.id, None)
        self.loaded = self.loaded or hand.loaded

    def _leave_alone(self, node: Node, why: Granite4vError) -> None:
        if self.loaded is None:  # nothing has been read yet: better to fail than to run on half a cluster
            raise why
        self._left_alone[node.id] = why
        self._say(f"warning: {str(why).rstrip('.')}; the run goes on without that node.")
        for hand in [hand for hand in self.hands if hand.node.id == node.id and hand.loaded is None]:
            self.dismiss(hand)

    def dismiss(self, hand: Hand) -> None:
        """Ends a worker, which may already be dead."""
        self.hands.remove(hand)
        with contextlib.suppress(Exception):  # whatever Ray says, the worker is not used any more
            self._ray.kill(hand.actor)

    def close(self) -> None:
        for hand in list(self.hands):
            self.dismiss(hand)


def divided(assignment: Assignment, n_workers: int) -> Assignment:
    """Returns the assignment of one of `n_workers` workers, with its share of the questions, rounded up."""
    n = assignment.n_questions
    return assignment if n is None else replace(assignment, n_questions=-(-n // max(1, n_workers)))


def on_hosts(hands: list[Hand]) -> str:
    """Describes workers, for instance '3 workers on 2 nodes, with 4 cores each'."""
    cores = sorted({hand.share.n_cpus for hand in hands})
    each = f"{' or '.join(map(str, cores))} core{'s' if cores != [1] else ''} each"
    return f"{_counted(len(hands), 'worker')} on {_counted(len({hand.node.id for hand in hands}), 'node')}, with {each}"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


def last_line(error: BaseException) -> str:
    """Returns the reason in an error of Ray, which comes after a traceback or a list of facts and before advice."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    found = lines[-1] if lines else type(error).__name__
    found = found.partition("Worker exit detail: ")[2] or found
    return re.split(r"\. (?=Some common causes|The task may)", found)[0].rstrip(".")[:300]
