"""A request in the engine: the chunks of its prompt, and the parts of the model that it needs."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.cached_sequence import Batch, CachedSequence
from granite4v.runtime.engine.sequence import Advances
from granite4v.runtime.engine.stored_pages import StoredPrefix
from granite4v.runtime.engine.stream import Channel
from granite4v.runtime.prompt.spans import ImageSpan, Span

if TYPE_CHECKING:
    from granite4v.clip_projector import View


class Rows(Protocol):
    """The rows of an image's span, put together when they are asked for."""

    def __getitem__(self, part: slice) -> np.ndarray:
        """float32 `(n, n_embd_inp)`"""
        ...


class Resources(Protocol):
    """What the scheduler needs of a loaded model."""

    def find_stored(self, task: Task, n_known: int) -> StoredPrefix | None:
        """What the page store has of a prompt, if that is more than `n_known` positions. May raise Aborted and every
        error of a model's files."""
        ...

    def prepare(self, task: Task, n_stored: int) -> None:
        """Before a request is admitted: opens what it needs behind the first `n_stored` positions of its prompt. May
        raise Aborted and every error of a model's files."""
        ...

    def store(self, task: Task) -> None:
        """After the last row of an image: the sequence may be stored as it is."""
        ...

    def look(self, tasks: SequenceOf[Task]) -> None:
        """Before rows of these tasks are computed, which follow what their sequences hold: a decoder that attends to
        images sees those of the rows. May raise Aborted and every error of a model's files."""
        ...

    def rows(self, task: Task, span: ImageSpan) -> Rows:
        """The rows of an image, its embeddings computed if need be. May raise Aborted, ModelFileError."""
        ...

    def n_arriving(self) -> int:
        """Requests that will be added before the next step."""
        ...

    def prefilled(self, task: Task) -> None:
        """After the last row of a prompt."""
        ...

    def computing(self, tasks: SequenceOf[Task]) -> contextlib.AbstractContextManager[None]:
        """Around a call that computes for these tasks, which is aborted once none of them is wanted."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Positions of one span that are computed in one call, from `start` within the span on."""

    batch: Batch
    span: Span
    start: int


def plan_prefill(spans: SequenceOf[Span], n_ubatch: int) -> list[Chunk]:
    """The chunks of a prompt. Text and image rows never share one: a llama_batch carries either."""
    chunks = []
    for span in spans:
        for start in range(0, span.n_tokens, n_ubatch):
            stop = min(start + n_ubatch, span.n_tokens)
            if isinstance(span, ImageSpan):
                batch = Batch(tuple((span.digest, i) for i in range(start, stop)))
            else:
                batch = Batch(span.tokens[start:stop])
            chunks.append(Chunk(batch, span, start))
    return chunks


class Task:
    """A request on its way: what it asks for, how far it is, and where its answer goes."""

    def __init__(
        self,
        spans: SequenceOf[Span],
        advances: Advances,
        channel: Channel,
        *,
        max_tokens: int,
        adapter: bool = False,
        images: SequenceOf[View] = (),
    ) -> None:
        """`images` are those that `ImageSpan.index` counts."""
        self.spans, self.advances, self.channel, self.images = tuple(spans), advances, channel, tuple(images)
        self.max_tokens, self.adapter = max_tokens, adapter
        self.tokens: list[int] = []  # of the answer, those that are not decoded yet included
        self.n_pending = 0  # of `tokens`, at the end: not decoded yet
        self.sequence: CachedSequence | None = None
        self.planned: list[Chunk] = []  # of the prompt
        self.chunks: deque[Chunk] = deque()  # those that are not computed yet, once it runs
        self.logits: np.ndarray | None = None  # those after the prompt, where they are known without computing
        self.rows: tuple[bytes, Rows] | None = None  # of the image that is being prefilled, by its digest
        self.last_step = 0
        self.was_started = False  # perhaps more than once, where its sequence was lost or given to another

    @property
    def answer(self) -> Answer:
        return self.channel.answer

    def plan(self) -> tuple[Batch, ...]:
        """The batches of the prompt."""
        return tuple(chunk.batch for chunk in self.planned)

    @property
    def held(self) -> CachedSequence:
        """The sequence of a task that was admitted."""
        assert self.sequence is not None
        return self.sequence

    @property
    def is_prefilling(self) -> bool:
        return bool(self.chunks) or self.logits is not None

    @property
    def pending(self) -> list[int]:
        return self.tokens[len(self.tokens) - self.n_pending :]

    @property
    def n_tokens(self) -> int:
        """Of the prompt."""
        return sum(span.n_tokens for span in self.spans)


def n_alike(plan: SequenceOf[Batch], other: SequenceOf[Batch]) -> int:
    """Tokens of the batches that two plans begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(plan, other, strict=False))
    return sum(batch.n_tokens for batch, _ in pairs)


def chunks_after(chunks: SequenceOf[Chunk], n_known: int) -> list[Chunk]:
    """What is left of the chunks behind the first `n_known` positions."""
    left, position = [], 0
    for chunk in chunks:
        skip = max(0, n_known - position)
        position += chunk.batch.n_tokens
        if skip < chunk.batch.n_tokens:
            left.append(Chunk(Batch(chunk.batch.keys[skip:]), chunk.span, chunk.start + skip))
    return left
