"""Runs one answer on made-up logits the way the engine would, without a model or a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import numpy as np

from granite4v.ggml.backend import Aborted
from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.draft import Draft
from granite4v.runtime.engine.sequence import Sequence, Step

N_VOCAB, EOS = 300, 299  # of the vocabulary of `Script`


class Source(Protocol):
    """Provides logits, float32 `(n_vocab,)`. Both methods may raise Aborted. `tokens` is the answer so far."""

    def first(self) -> np.ndarray: ...

    def next(self, tokens: SequenceOf[int]) -> np.ndarray: ...


class Script:
    """Logits that make greedy decoding follow a list of tokens."""

    def __init__(self, tokens: SequenceOf[int], aborts_at: int | None = None) -> None:
        self.tokens, self.aborts_at, self.asked = list(tokens), aborts_at, 0

    def _logits(self, i: int) -> np.ndarray:
        self.asked += 1
        if i == self.aborts_at:
            raise Aborted
        logits = np.zeros(N_VOCAB, dtype=np.float32)
        logits[self.tokens[i]] = 1.0
        return logits

    def first(self) -> np.ndarray:
        return self._logits(0)

    def next(self, tokens: SequenceOf[int]) -> np.ndarray:
        assert list(tokens) == self.tokens[: len(tokens)]
        return self._logits(len(tokens))


class Letters:
    """A text stream in which token n is the character with code n."""

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


def generate(
    source: Source, answer: Answer, text: Any, *, cancelled: Callable[[], bool] = lambda: False, **options: Any
) -> Iterator[str]:
    """Yields the pieces of the answer; `options` are those of `Sequence`."""
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


def verify(sequence: Sequence, draft: Draft, rows: SequenceOf[np.ndarray]) -> Step:
    """Advances an answer by one step with a draft. `rows` are the logits before each draft token and after the last."""
    n_accepted = 0
    step = sequence.advance(rows[0])
    while not step.finish and draft.tokens[n_accepted:][: len(step.tokens)] == step.tokens:
        n_accepted += len(step.tokens)
        step = sequence.advance(rows[n_accepted])
    sequence.answer.timings.n_accepted += n_accepted
    return step
