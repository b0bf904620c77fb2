"""Generates one answer, token by token: grammar, sampling, stop tokens and strings, repetition, and the token budget.

A `Sequence` is given the logits after its latest token and returns the tokens to decode next. It knows no model, no
cache and no thread, so the engine can run any number of them concurrently.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from granite4v.errors import ConstraintError
from granite4v.runtime.answer import CANCELLED, LENGTH, REPETITION, STOP, Answer, Timings
from granite4v.runtime.engine.draft import Draft, Drafter
from granite4v.runtime.engine.logprobs import Logprobs
from granite4v.runtime.engine.sampler import Sampler, Sampling
from granite4v.runtime.formats.repetition import Repetition
from granite4v.runtime.prompt.detokenizer import TextStream

if TYPE_CHECKING:
    from granite4v.runtime.grammar import GrammarState

# If computing an ending is slow, it is computed after this many tokens, and for each token once fewer than `_WATCHED`
# tokens are left beyond twice its length.
_LOOK_EVERY, _WATCHED = 16, 256
_SPARE = 2  # tokens; forced text may take more of them than the computed ending has


@dataclass(frozen=True)
class Step:
    """The result of one row of logits: tokens to decode next (none once the answer has ended), text that is final, and
    why the answer has ended ('' if it goes on)."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    finish: str = ""


class Advances(Protocol):
    """What the scheduler runs: an answer, or tokens to be scored."""

    def advance(self, logits: np.ndarray) -> Step:
        """Consumes `logits`: float32 `(n_vocab,)`, after the tokens of the last step, or after the prompt."""
        ...

    def cancel(self) -> Step:
        """Ends an answer that was cancelled."""
        ...

    def draft(self, most: int) -> Draft:
        """Proposes at most `most` tokens that are likely to follow those of the steps so far."""
        ...


class Sequence:
    """An answer that is being generated; fills `answer`.

    Text is held back while it could be the beginning of a stop string or of an unfinished character. With a `grammar`
    only allowed tokens are sampled, and the answer ends only where it is valid; with `fast_forward` tokens that the
    grammar forces are not sampled. Part of `max_tokens` is reserved for closing the structure, so an answer that
    reaches the limit is valid, too.
    """

    def __init__(
        self,
        answer: Answer,
        text: TextStream,
        *,
        sampling: Sampling,
        stop_tokens: frozenset[int],
        stop: SequenceOf[str] = (),
        max_tokens: int,
        grammar: GrammarState | None = None,
        fast_forward: bool = True,
        repetition: Repetition | None = None,
        drafter: Drafter | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        """`drafter`: None for no drafts; `logprobs`: None for no log-probabilities."""
        self.answer, self._max_tokens, self._drafter = answer, max_tokens, drafter
        self._logprobs = logprobs
        if logprobs is not None:
            answer.logprobs = logprobs.entries
        self._output = _Output(text, stop, answer, repetition)
        self._chooser = _Chooser(Sampler(sampling), stop_tokens, grammar, fast_forward, max_tokens, answer.timings)

    def advance(self, logits: np.ndarray) -> Step:
        answer, chooser, output = self.answer, self._chooser, self._output
        if finish := self._limit():
            return self._end(finish)
        n_before, n_open = len(answer.tokens), output.n_characters
        choice = chooser.choose(logits, answer.tokens)
        tokens = choice.tokens
        if not tokens:
            return self._end(LENGTH if chooser.is_closing else STOP, n_open)
        text, ends = output.push(tokens[: self._max_tokens - n_before])
        n_pushed = len(ends)
        answer.timings.n_forced += max(0, n_pushed - choice.n_sampled)
        if self._logprobs is not None:
            self._logprobs.add(tokens[:n_pushed], ends, logits if choice.is_free else None)
        if output.ended or n_pushed < len(tokens) or chooser.is_closing:
            return self._end(output.ended or LENGTH, n_open, text)
        if finish := self._limit():
            return self._end(finish, n_open, text)
        return Step(tuple(tokens), text)

    def cancel(self) -> Step:
        return self._end(CANCELLED)

    def draft(self, most: int) -> Draft:
        """Drafts nothing that the grammar forbids, and never the last token of the answer: it is sampled from the
        logits before it and needs no decoding."""
        tokens = self.answer.tokens
        most = min(most, self._max_tokens - len(tokens) - 1)
        if self._drafter is None or most < 1:
            return Draft()
        draft = self._drafter.propose(tokens, most)
        n_possible = self._chooser.n_possible(draft.tokens)
        return Draft(draft.tokens[:n_possible], draft.chances[:n_possible])

    def _limit(self) -> str:
        """Returns the finish reason if nothing can be added whatever the logits are, else ''."""
        if self._chooser.is_final:
            return STOP
        return LENGTH if len(self.answer.tokens) >= self._max_tokens else ""

    def _end(self, finish: str, n_open: int = 0, text: str = "") -> Step:
        """Ends the answer. `n_open`: length of its text before its last tokens, in characters."""
        text += self._output.finish()
        self.answer.finish_reason = finish
        if self._chooser.is_closing and finish == LENGTH:
            self.answer.closing = self.answer.text[n_open:]
        return Step((), text, finish)


class Scoring:
    """Forces tokens as if they were the answer, and collects the logits before each of them."""

    def __init__(self, tokens: SequenceOf[int]) -> None:
        """Without tokens it collects only the logits after the prompt."""
        self._tokens = tuple(tokens)
        self.rows: list[np.ndarray] = []  # float32 (n_vocab,)

    def advance(self, logits: np.ndarray) -> Step:
        self.rows.append(logits)
        if len(self.rows) < len(self._tokens):
            return Step((self._tokens[len(self.rows) - 1],))
        return Step((), finish=STOP)

    def cancel(self) -> Step:
        return Step((), finish=CANCELLED)

    def draft(self, most: int) -> Draft:
        return Draft()


class _Choice(NamedTuple):
    """The next tokens of an answer, none at its end. `n_sampled`: how many of them were sampled: the first, or none.
    `is_free`: whether the sampled token was one of several possible ones."""

    tokens: list[int]
    n_sampled: int = 0
    is_free: bool = False


class _Chooser:
    """Chooses the next tokens of an answer: one sampled token, followed by those that the grammar forces."""

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
        self.is_closing = False  # the last tokens were not sampled: they complete the structure at the limit

    @property
    def is_final(self) -> bool:
        """Whether the grammar allows nothing more except the end."""
        return self._grammar is not None and self._grammar.is_final

    def choose(self, logits: np.ndarray, history: SequenceOf[int]) -> _Choice:
        grammar, reserve = self._grammar, self._reserve
        if grammar is None or reserve is None:
            token = self._sampler.pick(logits, history)
            return _Choice([]) if token in self._stop_tokens else _Choice([token], 1, True)
        forced = [] if history else self._forced(grammar)  # only at the start; later they follow a sampled token
        if forced:
            return _Choice(forced)
        start = time.perf_counter()
        allowed = grammar.allowed(self._stop_tokens)
        ending = reserve.ending(len(history))
        self._timings.constraint_s += time.perf_counter() - start
        token = self._sampler.pick(logits, history, allowed)
        if token in self._stop_tokens:
            return _Choice([])
        if ending is not None and not reserve.allows(token, len(history)):
            self.is_closing = True
            return _Choice(ending)
        grammar.accept(token)
        return _Choice([token, *self._forced(grammar)], 1, bool(np.count_nonzero(allowed) > 1))

    def n_possible(self, draft: SequenceOf[int]) -> int:
        """How many leading tokens of a draft are possible without ending the answer."""
        state = self._grammar.copy() if self._grammar is not None and draft else None
        for n, token in enumerate(draft):
            if token in self._stop_tokens:
                return n
            if state is not None:
                try:
                    state.accept(token)
                except (ValueError, ConstraintError):
                    return n
                if state.is_final:
                    return n
        return len(draft)

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
    """Keeps enough of the token budget free to close a structure, so that an answer is valid when it reaches its limit.

    The ending is computed every few tokens, and for every token once it could soon be too long.

    For example, with 2,000 tokens left and an ending of 40, 2,000 - 2 * 40 - 256 = 1,664 are to spare, so the next look
    is after 16 tokens. With 300 left, nothing is to spare (300 - 80 - 256 < 0): from there each token is checked.
    """

    def __init__(self, grammar: GrammarState, max_tokens: int) -> None:
        self._grammar, self._max_tokens = grammar, max_tokens
        self._next_look = 0  # answer length, in tokens, at which the ending is computed next

    def ending(self, n_generated: int) -> list[int] | None:
        """Returns tokens that complete the answer; None while the limit is far away, or if none is short enough."""
        if n_generated < self._next_look:
            return None
        n_left = self._max_tokens - n_generated
        ending = self._grammar.ending(n_left)
        n_spare = _LOOK_EVERY if ending is None else n_left - 2 * len(ending) - _WATCHED
        if n_spare <= 0 or self._grammar.has_quick_endings:
            return ending
        self._next_look = n_generated + min(n_spare, _LOOK_EVERY)
        return None

    def allows(self, token: int, n_generated: int) -> bool:
        """Whether there would still be room for an ending after this token."""
        return self._grammar.ending(self._max_tokens - n_generated - 1 - _SPARE, token) is not None


class _Output:
    """Releases text that is safe to show. Finds stop strings across token boundaries, and answers that loop."""

    def __init__(
        self, text: TextStream, stop: SequenceOf[str], answer: Answer, repetition: Repetition | None = None
    ) -> None:
        self._text, self._stop, self._answer = text, [s for s in stop if s], answer
        self._repetition = repetition
        self._held = ""
        self.ended = ""  # finish reason, once the answer has ended

    @property
    def n_characters(self) -> int:
        """Length of the answer so far, including text that is held back."""
        return len(self._answer.text) + len(self._held)

    def push(self, tokens: SequenceOf[int]) -> tuple[str, list[int]]:
        """Adds tokens to the answer, up to one that ends it. Returns the text that is final now, and for each added
        token the length of the answer up to and including it."""
        shown, ends = "", list[int]()
        for token in tokens:
            self._answer.tokens.append(token)
            self._answer.timings.n_generated += 1
            shown += self._add(self._text.push(token))
            ends.append(self.n_characters)
            if self.ended:
                break
        return shown, ends

    def _add(self, piece: str) -> str:
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
        """Number of characters at the end that could be the beginning of a stop string."""
        most = max((len(s) - 1 for s in self._stop), default=0)
        for n in range(min(most, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stop):
                return n
        return 0
