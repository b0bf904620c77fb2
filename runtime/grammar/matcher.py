"""Wraps llguidance's matchers for one vocabulary: errors become exceptions, token masks become arrays."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from granite4v.errors import ConstraintError
from granite4v.runtime.grammar.forced_tokens import Encode
from granite4v.runtime.grammar.grammar_text import lark_grammar, limits
from granite4v.runtime.grammar.token_index import TokenIndex

_MAX_GRAMMARS = 16
# any text without control characters (tab and line feed are allowed), byte order marks (U+FEFF, U+FFFE) and U+FFFF
_ANY_TEXT = (
    '%llguidance {"no_forcing": true}\n'
    r"start: /[^\x00-\x08\x0b-\x1f\x7f-\x9f\x{feff}\x{fffe}\x{ffff}]*/"
)


class Matcher:
    """Tracks the position of an answer in an llguidance grammar. `end` is llguidance's end token."""

    def __init__(self, matcher: LLMatcher, n_vocab: int, end: int) -> None:
        self._matcher, self._n_vocab, self._end = matcher, n_vocab, end

    @property
    def is_accepting(self) -> bool:
        return bool(self._matcher.is_accepting())

    @property
    def is_final(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._n_vocab, self._end)

    def mask(self) -> np.ndarray:
        """The token mask without the end token; a new array, bool `(n_vocab,)`. Raises ConstraintError."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(packed, count=self._n_vocab, bitorder="little").view(bool)
        mask[self._end] = False
        return mask

    def forced_text(self) -> bytes:
        """The text that must come next. Raises ConstraintError."""
        text = bytes(self._matcher.compute_ff_bytes())
        self._check()
        return text

    def accept(self, token: int) -> None:
        """Raises ValueError for a token that is not allowed, ConstraintError when llguidance gives up."""
        if not self._matcher.consume_token(token):
            reason = _reason(self._matcher)
            if "limit" in reason:
                self._check()
            raise ValueError(f"token {token} is not allowed here: {reason}")

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Advances by the tokens and returns whether all of them are allowed."""
        return int(self._matcher.try_consume_tokens(list(tokens))) == len(tokens)

    def _check(self) -> None:
        # a matcher that hit one of its limits allows only the end token, which would silently truncate the answer
        if self._matcher.is_error():
            raise ConstraintError(
                f"llguidance gave up in the middle of an answer: {_reason(self._matcher)}.", "Use --unconstrained."
            )


class MatcherFactory:
    """Creates matchers, and caches the grammars that were used last in compiled form."""

    def __init__(self, index: TokenIndex, encode: Encode, end: int) -> None:
        self._index, self._encode, self._end = index, encode, end
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def of_schema(self, schema_text: str) -> Matcher:
        """A matcher for JSON, at the start of an answer. Raises ConstraintError if the grammar cannot be compiled."""
        return self._start(lark_grammar(schema_text))

    def of_text(self) -> Matcher:
        """A matcher for any text in complete characters, at its start."""
        return self._start(_ANY_TEXT)

    def _start(self, grammar: str) -> Matcher:
        if grammar not in self._compiled:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits())
            if matcher.is_error():
                raise ConstraintError(
                    f"llguidance cannot compile the grammar: {_reason(matcher)}.", "Use --unconstrained."
                )
            self._compiled[grammar] = matcher
            while len(self._compiled) > _MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return Matcher(self._compiled[grammar].deep_copy(), self._index.n_vocab, self._end)

    def tokenize(self, text: bytes) -> list[int]:
        """Tokens that spell the text, not necessarily those that the tokenizer would write."""
        return list(self._tokenizer.tokenize_bytes(text))

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._index, self._encode, self._end)))


class _Vocabulary:
    """The interface that `llguidance.TokenizerWrapper` expects. llguidance never allows a token without bytes."""

    def __init__(self, index: TokenIndex, encode: Encode, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = list(index.pieces)
        self.special_token_ids = [end]
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _reason(matcher: LLMatcher) -> str:
    """The first part of llguidance's error message; a dump of its parser follows it."""
    return str(matcher.get_error()).split("\n<state>")[0].strip()
