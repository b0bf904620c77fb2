"""The answer, token by token: sampling, stop tokens and strings, text as it comes, timings.

Works on anything that gives logits for a prompt and after one more token (`Source`); knows no model files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from granite4v.ggml.backend import Aborted
from granite4v.runtime.sampling import Sampler, Sampling
from granite4v.runtime.tokens import TextStream

if TYPE_CHECKING:
    import numpy as np

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclass
class Timings:
    """Where the time of one answer went, in seconds, and how many tokens took it.

    `encode_s` pictures to embeddings; `prefill_image_s` and `prefill_text_s` the prompt; `decode_s` the answer;
    `load_s` reading weights, which only a first request does. `n_reused` prompt tokens were known already.
    """

    load_s: float = 0.0
    encode_s: float = 0.0
    prefill_image_s: float = 0.0
    prefill_text_s: float = 0.0
    decode_s: float = 0.0
    n_prompt: int = 0
    n_image: int = 0
    n_reused: int = 0
    n_generated: int = 0
    n_steps: int = 0  # decodes in `decode_s`; the first token of an answer costs none

    @property
    def prefill_s(self) -> float:
        return self.prefill_image_s + self.prefill_text_s

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second while answering; 0 before the second token."""
        return self.n_steps / self.decode_s if self.decode_s > 0 else 0.0


@dataclass
class Answer:
    """`tokens` are the generated ids without the one that ended the answer.

    `finish_reason`: 'stop' (the model or a stop string ended it), 'length' (`max_tokens`) or 'cancelled'.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    timings: Timings = field(default_factory=Timings)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The answer as JSON data."""
        timings = {
            **asdict(self.timings),
            "prefill_s": self.timings.prefill_s,
            "decode_tok_s": self.timings.decode_tok_s,
        }
        return {**asdict(self), "timings": timings}


class Source(Protocol):
    """Where logits come from, float32 `(n_vocab,)`; both may raise Aborted."""

    def first(self) -> np.ndarray: ...

    def next(self, tokens: Sequence[int]) -> np.ndarray: ...


def generate(
    source: Source,
    answer: Answer,
    text: TextStream,
    *,
    sampling: Sampling,
    stop_tokens: frozenset[int],
    stop: Sequence[str] = (),
    max_tokens: int,
    cancelled: Callable[[], bool],
) -> Iterator[str]:
    """Pieces of text as they are certain; fills `answer` on the way.

    A piece is held back while it could be the beginning of a stop string or of an unfinished character.
    Stopping the iteration early (closing it) leaves `answer` as 'cancelled'.
    """
    answer.finish_reason = CANCELLED
    output, sampler = _Output(text, stop, answer), Sampler(sampling)
    try:
        logits = source.first()
        while True:
            if cancelled():
                break
            if len(answer.tokens) >= max_tokens:
                answer.finish_reason = LENGTH
                break
            token = sampler.pick(logits, answer.tokens)
            if token in stop_tokens:
                answer.finish_reason = STOP
                break
            answer.tokens.append(token)
            answer.timings.n_generated += 1
            piece = output.push(token)
            if piece:
                yield piece
            if output.stopped:
                answer.finish_reason = STOP
                break
            if len(answer.tokens) < max_tokens:
                start = time.perf_counter()
                logits = source.next(answer.tokens)
                answer.timings.decode_s += time.perf_counter() - start
                answer.timings.n_steps += 1
    except Aborted:
        pass  # cancelled while computing: what was said so far is the answer
    piece = output.finish()
    if piece:
        yield piece


class _Output:
    """Text that is safe to show: looks for stop strings across token boundaries."""

    def __init__(self, text: TextStream, stop: Sequence[str], answer: Answer) -> None:
        self._text, self._stop, self._answer = text, [s for s in stop if s], answer
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        self._held += self._text.push(token)
        return self._release(final=False)

    def finish(self) -> str:
        if self.stopped:
            return ""
        self._held += self._text.flush()
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        hits = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if hits:
            self.stopped = True
            piece, self._held = self._held[: min(hits)], ""
        else:
            n = 0 if final else self._n_uncertain()
            piece, self._held = self._held[: len(self._held) - n], self._held[len(self._held) - n :]
        self._answer.text += piece
        return piece

    def _n_uncertain(self) -> int:
        """Characters at the end that a stop string could begin with."""
        most = max((len(s) - 1 for s in self._stop), default=0)
        for n in range(min(most, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stop):
                return n
        return 0
