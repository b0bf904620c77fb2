"""The answer, token by token: constraint, sampling, stop tokens and strings, text as it comes, timings.

Works on anything that gives logits for a prompt and after more tokens (`Source`); knows no model files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from granite4v.ggml.backend import Aborted
from granite4v.runtime.engine.sampler import Sampler, Sampling
from granite4v.runtime.prompt.tokenizer import TextStream

if TYPE_CHECKING:
    import numpy as np

    from granite4v.runtime.engine.repetition import Repetition
    from granite4v.runtime.grammar.grammar_state import GrammarState

STOP, LENGTH, CANCELLED, REPETITION = "stop", "length", "cancelled", "repetition"


@dataclass
class Timings:
    """Where the time of one answer went, in seconds, and how many tokens took it.

    `encode_s` pictures to embeddings; `prefill_image_s` and `prefill_text_s` the prompt; `decode_s` the answer;
    `load_s` reading weights, which only a first request does; `constraint_s` finding out what may be said.
    `n_reused` prompt tokens were known already, `n_encoded` pictures were not. `n_forced` tokens of the answer were
    no choice and not sampled.
    """

    load_s: float = 0.0
    encode_s: float = 0.0
    prefill_image_s: float = 0.0
    prefill_text_s: float = 0.0
    decode_s: float = 0.0
    constraint_s: float = 0.0
    n_prompt: int = 0
    n_image: int = 0
    n_reused: int = 0
    n_encoded: int = 0
    n_generated: int = 0
    n_forced: int = 0
    n_steps: int = 0  # decodes in `decode_s`; the first token of an answer costs none

    @property
    def prefill_s(self) -> float:
        return self.prefill_image_s + self.prefill_text_s

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second while answering; 0 before the second token."""
        return (self.n_steps + self.n_forced) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass
class Answer:
    """`tokens` are the generated ids without the one that ended the answer.

    `finish_reason`: 'stop' (the model, its constraint or a stop string ended it), 'length' (`max_tokens`),
    'repetition' (it ran on with the same rows) or 'cancelled'. Under a constraint an answer that reaches `max_tokens`
    is brought to an end before that: `closing` is the end of `text` that the model did not choose, perhaps empty. It is
    None otherwise, and where so few tokens hold no whole answer; then the text is cut.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    closing: str | None = None
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


# Where that takes long, an answer's end is looked for after so many tokens, and with each token when fewer than the
# second number are left beside twice its length.
_LOOK_EVERY, _WATCHED = 16, 256
_SPARE = 2  # tokens; the tokenizer may need more for text that is forced than the end was found to need


class Source(Protocol):
    """Where logits come from, float32 `(n_vocab,)`; both may raise Aborted.

    `tokens` are the answer so far: those of the call before, and at least one more.
    """

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
    grammar: GrammarState | None = None,
    fast_forward: bool = True,
    repetition: Repetition | None = None,
) -> Iterator[str]:
    """Pieces of text as they are certain; fills `answer` on the way.

    A piece is held back while it could be the beginning of a stop string or of an unfinished character.
    Stopping the iteration early (closing it) leaves `answer` as 'cancelled'. With a `grammar` only what it allows is
    sampled, and the answer ends where it may; with `fast_forward` what it forces is not sampled. Room is kept for the
    rest of the form, so that an answer of `max_tokens` is whole, too.
    """
    answer.finish_reason = CANCELLED
    output = _Output(text, stop, answer, repetition)
    chooser = _Chooser(Sampler(sampling), stop_tokens, grammar, fast_forward, max_tokens, answer.timings)
    try:
        logits = source.first()
        while not cancelled():
            if chooser.is_over:
                answer.finish_reason = STOP
                break
            if len(answer.tokens) >= max_tokens:
                answer.finish_reason = LENGTH
                break
            n_open = output.n_characters
            n_sampled, tokens = chooser.choose(logits, answer.tokens)
            if not tokens:
                answer.finish_reason = LENGTH if chooser.is_closing else STOP
                break
            n_before = len(answer.tokens)
            piece = output.say(tokens[: max_tokens - n_before])
            n_said = len(answer.tokens) - n_before
            answer.timings.n_forced += max(0, n_said - n_sampled)
            if piece:
                yield piece
            if output.ended or n_said < len(tokens) or chooser.is_closing:
                answer.finish_reason = output.ended or LENGTH
                break
            if len(answer.tokens) < max_tokens and not chooser.is_over:
                start = time.perf_counter()
                logits = source.next(answer.tokens)
                answer.timings.decode_s += time.perf_counter() - start
                answer.timings.n_steps += 1
    except Aborted:
        pass  # cancelled while computing: what was said so far is the answer
    piece = output.finish()
    if chooser.is_closing and answer.finish_reason == LENGTH:
        answer.closing = answer.text[n_open:]
    if piece:
        yield piece


class _Chooser:
    """The next tokens of an answer: one that is sampled, and those that are no choice."""

    def __init__(
        self,
        sampler: Sampler,
        stop_tokens: frozenset[int],
        grammar: GrammarState | None,
        fast_forward: bool,
        max_tokens: int,
        timings: Timings,
    ) -> None:
        self._sampler, self._stop_tokens, self._grammar = sampler, stop_tokens, grammar
        self._fast_forward, self._timings = fast_forward, timings
        self._reserve = _Reserve(grammar, max_tokens) if grammar is not None else None
        self.is_closing = False  # the last tokens only make the answer whole

    @property
    def is_over(self) -> bool:
        """Whether the constraint allows nothing but the end."""
        return self._grammar is not None and self._grammar.is_final

    def choose(self, logits: np.ndarray, history: Sequence[int]) -> tuple[int, list[int]]:
        """How many of the tokens were sampled, and the tokens; none of them at the end of the answer."""
        grammar, reserve = self._grammar, self._reserve
        if grammar is None or reserve is None:
            return self._unless_stop(self._sampler.pick(logits, history))
        forced = [] if history else self._forced(grammar)  # later ones come along with a sampled token
        if forced:
            return 0, forced
        start = time.perf_counter()
        allowed = grammar.allowed(self._stop_tokens)
        ending = reserve.ending(len(history))
        self._timings.constraint_s += time.perf_counter() - start
        token = self._sampler.pick(logits, history, allowed)
        n_sampled, tokens = self._unless_stop(token)
        if ending is not None and tokens and not reserve.allows(token, len(history)):
            self.is_closing = True
            return 0, ending
        for token in tokens:
            grammar.accept(token)
        return n_sampled, [*tokens, *(self._forced(grammar) if tokens else [])]

    def _unless_stop(self, token: int) -> tuple[int, list[int]]:
        return (0, []) if token in self._stop_tokens else (1, [token])

    def _forced(self, grammar: GrammarState) -> list[int]:
        if not self._fast_forward:
            return []
        start = time.perf_counter()
        tokens = grammar.forced_tokens()
        for token in tokens:
            grammar.accept(token)
        self._timings.constraint_s += time.perf_counter() - start
        return tokens


class _Reserve:
    """Keeps room for the rest of a form, so that an answer is whole when it reaches its limit.

    The end is looked for now and then, and with every token once it could soon be too long.
    """

    def __init__(self, grammar: GrammarState, max_tokens: int) -> None:
        self._grammar, self._max_tokens = grammar, max_tokens
        self._next_look = 0  # the length of the answer at which its end is looked for again

    def ending(self, n_said: int) -> list[int] | None:
        """Tokens that make the answer whole; None where the limit is far, or nothing that short does."""
        if n_said < self._next_look:
            return None
        n_left = self._max_tokens - n_said
        ending = self._grammar.ending(n_left)
        n_spare = _LOOK_EVERY if ending is None else n_left - 2 * len(ending) - _WATCHED
        if n_spare <= 0 or self._grammar.has_quick_endings:
            return ending
        self._next_look = n_said + min(n_spare, _LOOK_EVERY)
        return None

    def allows(self, token: int, n_said: int) -> bool:
        """Whether there is room for an ending behind this token."""
        return self._grammar.ending(self._max_tokens - n_said - 1 - _SPARE, token) is not None


class _Output:
    """Text that is safe to show: looks for stop strings across token boundaries, and for answers that run on."""

    def __init__(
        self, text: TextStream, stop: Sequence[str], answer: Answer, repetition: Repetition | None = None
    ) -> None:
        self._text, self._stop, self._answer = text, [s for s in stop if s], answer
        self._repetition = repetition
        self._held = ""
        self.ended = ""  # why the answer has ended, once it has

    @property
    def n_characters(self) -> int:
        """Of the answer so far, those that are not shown yet included."""
        return len(self._answer.text) + len(self._held)

    def say(self, tokens: Sequence[int]) -> str:
        """Adds tokens to the answer, up to one that ends it; the text that is certain now."""
        shown = ""
        for token in tokens:
            self._answer.tokens.append(token)
            self._answer.timings.n_generated += 1
            shown += self._push(self._text.push(token))
            if self.ended:
                break
        return shown

    def _push(self, piece: str) -> str:
        self._held += piece
        shown = self._release(final=False)
        if not self.ended and self._repetition is not None and self._repetition.push(piece):
            self.ended = REPETITION
        return shown

    def finish(self) -> str:
        if self.ended == STOP:
            return ""
        self._held += self._text.flush()
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        hits = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if hits:
            self.ended = STOP
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
