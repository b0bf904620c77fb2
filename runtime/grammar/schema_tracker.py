"""Tracks an answer in the grammar of a JSON Schema. llguidance does everything except choose how to close it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np

from granite4v.runtime.grammar.json_closing import JsonPosition
from granite4v.runtime.grammar.matcher import Matcher, MatcherFactory
from granite4v.runtime.grammar.token_index import TokenIndex

_MAX_FORCED_BYTES = 4096  # per run; a schema can force endless text


class SchemaTracker:
    has_quick_endings = False  # each byte of an ending needs a mask from llguidance

    def __init__(
        self, matcher: Matcher, index: TokenIndex, factory: MatcherFactory, position: JsonPosition | None = None
    ) -> None:
        self._matcher, self._index, self._factory = matcher, index, factory
        self._position = position or JsonPosition()

    @property
    def is_accepting(self) -> bool:
        return self._matcher.is_accepting

    @property
    def is_final(self) -> bool:
        return self._matcher.is_final

    def copy(self) -> SchemaTracker:
        return SchemaTracker(self._matcher.copy(), self._index, self._factory, self._position)

    def mask(self) -> np.ndarray:
        return self._matcher.mask()

    def accept(self, token: int) -> None:
        self._matcher.accept(token)
        self._position = self._position.after(self._index.pieces[token])

    def forced_text(self) -> bytes:
        return self._matcher.forced_text()[:_MAX_FORCED_BYTES]

    def following(self, text: bytes) -> Collection[int]:
        ahead = self._matcher.copy()
        if not ahead.accepts(self._factory.tokenize(text)):
            return range(256)
        return np.flatnonzero(np.bincount(self._index.first_byte[ahead.mask()])).tolist()

    def ending(self, most: int, token: int | None) -> list[int] | None:
        ahead = self.copy()
        if token is not None:
            ahead.accept(token)
        tokens: list[int] = []
        n_taken: Counter[int] = Counter()
        while not ahead.is_accepting:
            # take forced text as a whole if there is any; otherwise one byte, the one that closes soonest
            text = ahead._matcher.forced_text()
            if not self._index.spell(text):
                byte = ahead._closing_byte(n_taken)
                if byte is None:
                    return None
                text = bytes((byte,))
                n_taken[byte] += 1
            new = self._index.spell(text)
            if len(tokens) + len(new) > most or not ahead._matcher.accepts(new):
                return None
            tokens += new
            ahead._position = ahead._position.after(text)
        return tokens

    def _closing_byte(self, n_taken: Counter[int]) -> int | None:
        mask = self._matcher.mask()
        allowed = {byte for byte, token in self._index.byte_tokens.items() if mask[token]}
        return self._position.closing_byte(allowed, n_taken) if allowed else None
