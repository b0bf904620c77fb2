"""Runs one answer on made-up logits, as the engine would, without a model or a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import numpy as np

from granite4v.ggml.backend import Aborted
from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.sequence import Sequence, Step


class Source(Protocol):
    """Where logits come from, float32 `(n_vocab,)`; both may raise Aborted. `tokens` are the answer so far."""

    def first(self) -> np.ndarray: ...

    def next(self, tokens: SequenceOf[int]) -> np.ndarray: ...


def generate(
    source: Source, answer: Answer, text: Any, *, cancelled: Callable[[], bool] = lambda: False, **options: Any
) -> Iterator[str]:
    """The pieces of the answer; `options` are those of `Sequence`."""
    sequence = Sequence(answer, text, **options)
    step = Step()
    while not step.finish:
        try:
            logits = source.next(answer.tokens) if step.tokens else source.first()
            answer.timings.n_steps += bool(step.tokens)
            answer.timings.n_decoded += len(step.tokens)
            step = sequence.cancel() if cancelled() else sequence.advance(logits)
        except Aborted:
            step = sequence.cancel()
        if step.text:
            yield step.text
