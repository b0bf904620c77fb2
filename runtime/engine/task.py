"""A request inside the engine: the chunks of its prompt, and what it needs from the model."""

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
    """The decoder rows of an image span, assembled on access."""

    def __getitem__(self, part: slice) -> np.ndarray:
        """float32 `(n, n_embd_inp)`"""
        ...


class Resources(Protocol):
    """What the scheduler needs from a loaded model."""

    def find_stored(self, task: Task, n_known: int) -> StoredPrefix | None:
        """Looks up a prompt in the page store. Returns a prefix only if it is longer than `n_known` positions. May
        raise Aborted and any error of a model's files."""
        ...

    def prepare(self, task: Task, n_stored: int) -> None:
        """Called before a request is admitted. Opens what it needs after the first `n_stored` positions of its prompt.
        May raise Aborted and any error of a model's files."""
        ...

    def store(self, task: Task) -> None:
        """Called after the last row of an image: the state of the sequence may be stored now."""
        ...

    def look(self, tasks: SequenceOf[Task]) -> None:
        """Called before rows of these tasks are computed, which follow what their sequences hold: sets the images that
        the rows attend to, in a decoder with cross-attention. May raise Aborted and any error of a model's files."""
        ...

    def rows(self, task: Task, span: ImageSpan) -> Rows:
        """Returns the rows of an image, computing its embeddings if need be. May raise Aborted, ModelFileError."""
        ...

    def n_arriving(self) -> int:
        """Number of requests that will be added before the next step."""
        ...

    def prefilled(self, task: Task) -> None:
        """Called after the last row of a prompt."""
        ...

    def computing(self, tasks: SequenceOf[Task]) -> contextlib.AbstractContextManager[None]:
        """Wraps a computation for these tasks, which is aborted once all of them are cancelled."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Positions of one span that are computed in one call. `start` is their offset in the span."""

    batch: Batch
    span: Span
    start: int


def plan_prefill(spans: SequenceOf[Span], n_ubatch: int) -> list[Chunk]:
    """Cuts a prompt into chunks of at most `n_ubatch` rows. Text and image rows never share one: a llama_batch holds
    either."""
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
    """A request in progress: what it asks for, how far it has got, and where its answer goes."""

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
        """`images`: the images of the prompt, indexed by `ImageSpan.index`."""
        self.spans, self.advances, self.channel, self.images = tuple(spans), advances, channel, tuple(images)
        self.max_tokens, self.adapter = max_tokens, adapter
        self.tokens: list[int] = []  # of the answer, including those not decoded yet
        self.n_pending = 0  # the last tokens of `tokens`, not decoded yet
        self.sequence: CachedSequence | None = None
        self.planned: list[Chunk] = []  # chunks of the prompt
        self.chunks: deque[Chunk] = deque()  # chunks still to compute, once it runs
        self.logits: np.ndarray | None = None  # logits after the prompt, if known without computing
        self.rows: tuple[bytes, Rows] | None = None  # digest and rows of the image being prefilled
        self.last_step = 0
        self.was_started = False  # stays true when its sequence is lost or given to another

    @property
    def answer(self) -> Answer:
        return self.channel.answer

    def plan(self) -> tuple[Batch, ...]:
        """The batches of the prompt."""
        return tuple(chunk.batch for chunk in self.planned)

    @property
    def held(self) -> CachedSequence:
        """The sequence of an admitted task."""
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
        """Number of tokens of the prompt."""
        return sum(span.n_tokens for span in self.spans)


def n_alike(plan: SequenceOf[Batch], other: SequenceOf[Batch]) -> int:
    """Number of tokens in the batches that two plans have in common at their beginning."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(plan, other, strict=False))
    return sum(batch.n_tokens for batch, _ in pairs)


def chunks_after(chunks: SequenceOf[Chunk], n_known: int) -> list[Chunk]:
    """The chunks that remain after the first `n_known` positions; a chunk that is partly known is shortened."""
    left, position = [], 0
    for chunk in chunks:
        skip = max(0, n_known - position)
        position += chunk.batch.n_tokens
        if skip < chunk.batch.n_tokens:
            left.append(Chunk(Batch(chunk.batch.keys[skip:]), chunk.span, chunk.start + skip))
    return left
