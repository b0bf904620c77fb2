"""Prompts into logits: spans are cut into batches, image batches carry all streams, and what is cached is kept.

Owns the llama.cpp context, which grows with the requests up to `n_ctx`. Not for several threads at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from granite4v.runtime.engine.prefix import Batch, CachedSequence
from granite4v.runtime.llama.context import LlamaContext
from granite4v.runtime.llama.library import Cancel, Worker
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.prompt.spans import ImageSpan, Span

if TYPE_CHECKING:
    import numpy as np

CONTEXT_STEP = 512  # contexts are made in multiples of this many tokens
Progress = Callable[[int, int], None]  # (done, to do)


class Rows(Protocol):
    """A picture's embedding rows, made when they are asked for."""

    def __getitem__(self, part: slice) -> np.ndarray:
        """float32 `(n, n_embd_inp)`"""
        ...


RowsOf = Callable[[ImageSpan], Rows]


@dataclass
class PrefillStats:
    """Seconds and tokens of one prefill; `reused` tokens were in the cache already."""

    image_s: float = 0.0
    text_s: float = 0.0
    reused: int = 0


@dataclass(frozen=True)
class _Work:
    """One batch of the plan and where its data comes from."""

    batch: Batch
    span: Span
    start: int  # within the span


@dataclass
class _Known:
    """The end of the last prefill, so that the same request again costs nothing."""

    plan: list[Batch] = field(default_factory=list)
    logits: np.ndarray | None = None


class Decoder:
    """A model's cache and the ways to extend it."""

    def __init__(
        self, model: LlamaModel, n_ctx: int, n_ubatch: int, n_threads: int, worker: Worker, *, exact: bool = False
    ) -> None:
        self.model, self.n_ctx = model, n_ctx
        self._n_ubatch, self._n_threads, self._exact = min(n_ubatch, n_ctx), n_threads, exact
        self._worker = worker
        self._context: LlamaContext | None = None
        self._cached = CachedSequence()
        self._known = _Known()
        self.epoch = 0  # counts prefills: a caller whose number is old has lost its place

    @property
    def context_size(self) -> int:
        """Tokens the cache has room for now."""
        return self._context.n_ctx if self._context else 0

    def prefill(
        self,
        spans: Sequence[Span],
        rows: RowsOf,
        *,
        adapter: bool,
        room_for: int,
        cancel: Cancel | None = None,
        stats: PrefillStats | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Logits of the token after the spans, float32 `(n_vocab,)`.

        `rows(span)` gives a picture's embedding rows; it is asked only for pictures that are not in the cache.
        `room_for` tokens may follow. `progress` counts tokens. Raises Aborted when cancelled.
        """
        stats = stats or PrefillStats()
        work = self._plan(spans)
        plan = [item.batch for item in work]
        self.epoch += 1
        context = self._open_context(sum(batch.n_tokens for batch in plan) + room_for)
        if context.adapter_on != adapter:
            self.forget()
            context.set_adapter(adapter)
        if self._known.logits is not None and self._known.plan == plan:
            # the cache holds this prompt and the answer to it, since `_known` is always the last prefill's
            stats.reused = sum(batch.n_tokens for batch in plan)
            self._truncate(stats.reused)
            return self._known.logits.copy()
        self._known = _Known()
        stats.reused = self._cached.reusable(plan)
        self._truncate(stats.reused)
        with self._undo_on_failure():
            self._compute(work, stats, rows, cancel, progress)
        self._known = _Known(plan, context.logits())
        assert self._known.logits is not None
        return self._known.logits.copy()

    def extend(self, tokens: Sequence[int], cancel: Cancel | None = None) -> np.ndarray:
        """Logits after these tokens more, computed together, float32 `(n_vocab,)`. Raises Aborted when cancelled."""
        if self._context is None or not tokens:
            raise ValueError("extend needs a prefill before it, and at least one token")
        for start in range(0, len(tokens), self._n_ubatch):
            part = tuple(tokens[start : start + self._n_ubatch])
            n_outputs = 1 if start + len(part) == len(tokens) else 0
            with self._undo_on_failure():
                self._context.decode_tokens(part, self._cached.n_tokens, n_outputs=n_outputs, cancel=cancel)
                self._cached.append(Batch(part))
        return self._context.logits()

    @contextlib.contextmanager
    def _undo_on_failure(self) -> Iterator[None]:
        """An interrupted batch may or may not have reached llama.cpp's cache: takes out what is not recorded."""
        try:
            yield
        except BaseException:
            if self._context is not None:
                self._context.truncate(self._cached.n_tokens)
            raise

    def _plan(self, spans: Sequence[Span]) -> list[_Work]:
        work = []
        for span in spans:
            for start in range(0, span.n_tokens, self._n_ubatch):
                stop = min(start + self._n_ubatch, span.n_tokens)
                keys: tuple[Hashable, ...]
                if isinstance(span, ImageSpan):
                    keys = tuple((span.digest, i) for i in range(start, stop))
                else:
                    keys = span.tokens[start:stop]
                work.append(_Work(Batch(keys), span, start))
        return work

    def _compute(
        self, work: Sequence[_Work], stats: PrefillStats, rows: RowsOf, cancel: Cancel | None, progress: Progress | None
    ) -> None:
        """Decodes what is missing from the cache; only the last token asks for logits."""
        assert self._context is not None
        position, data, n_tokens = 0, None, sum(item.batch.n_tokens for item in work)
        for i, item in enumerate(work):
            stop = position + item.batch.n_tokens
            skip = max(0, self._cached.n_tokens - position)
            position = stop
            if skip >= item.batch.n_tokens:
                continue
            keys = item.batch.keys[skip:]
            n_outputs = 1 if i == len(work) - 1 else 0
            at, first = stop - len(keys), item.start + skip
            if isinstance(item.span, ImageSpan):
                if data is None or data[0] is not item.span:
                    data = (item.span, rows(item.span))
                begin = time.perf_counter()
                self._context.decode_rows(data[1][first : first + len(keys)], at, n_outputs=n_outputs, cancel=cancel)
                stats.image_s += time.perf_counter() - begin
            else:
                tokens = item.span.tokens[first : first + len(keys)]
                begin = time.perf_counter()
                self._context.decode_tokens(tokens, at, n_outputs=n_outputs, cancel=cancel)
                stats.text_s += time.perf_counter() - begin
            self._cached.append(Batch(keys))
            if progress is not None:
                progress(stop, n_tokens)

    def _open_context(self, n_tokens: int) -> LlamaContext:
        """A context with room for `n_tokens`; what is cached moves along when it has to grow."""
        context = self._context
        if context is not None and context.n_ctx >= n_tokens:
            return context
        n_ctx = min(self.n_ctx, -(-n_tokens // CONTEXT_STEP) * CONTEXT_STEP)
        state, adapter, cached, known = None, False, self._cached, self._known
        if context is not None:
            state, adapter = context.state() if cached.n_tokens else None, context.adapter_on
            self._context, self._cached, self._known = None, CachedSequence(), _Known()
            context.close()
        self._context = context = LlamaContext(
            self.model, n_ctx, self._n_ubatch, self._n_threads, exact=self._exact, worker=self._worker
        )
        context.set_adapter(adapter)
        if state is not None:
            context.restore(state)
            self._cached, self._known = cached, known
        return context

    def _truncate(self, n_tokens: int) -> None:
        assert self._context is not None
        if n_tokens < self._cached.n_tokens:
            self._context.truncate(n_tokens)
            self._cached.truncate(n_tokens)

    def forget(self) -> None:
        """Empties the cache."""
        if self._context is not None:
            self._truncate(0)
        self._known = _Known()

    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.close()
