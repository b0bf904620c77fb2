"""Looks up tokens by their bytes: those that spell a text, and those that continue it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from granite4v.runtime.prompt.tokenizer import Vocabulary


class TokenIndex:
    """The tokens of a vocabulary with their bytes.

    `n_vocab` is the number of logits, which may exceed the number of token ids. `pieces` has the bytes of each id,
    empty for a special token or an unused id. `added` are the ids of added tokens: tokenizers find those in a text
    before they split the rest of it.
    """

    def __init__(self, vocabulary: Vocabulary, n_vocab: int) -> None:
        pieces = vocabulary.pieces[:n_vocab]
        self.n_vocab, self.added = n_vocab, vocabulary.added
        self.pieces: tuple[bytes, ...] = tuple(piece or b"" for piece in pieces) + (b"",) * (n_vocab - len(pieces))
        self.all = Spellings((piece, i) for i, piece in enumerate(self.pieces) if piece)
        self.added_only = Spellings((self.pieces[i], i) for i in self.added if i < n_vocab and self.pieces[i])
        self._spelled: dict[bytes, list[int]] = {}

    @cached_property
    def first_byte(self) -> np.ndarray:
        """uint16 `(n_vocab,)`: the first byte of each token, 256 for one without bytes."""
        return np.fromiter((piece[0] if piece else 256 for piece in self.pieces), dtype=np.uint16, count=self.n_vocab)

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """The token of each single byte that has one."""
        return {piece[0]: token for piece, token in self.all if len(piece) == 1}

    def text(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.pieces[token] for token in tokens)

    def spell(self, text: bytes) -> list[int]:
        """Spells a text with the longest token that fits at each step; an empty list if that fails."""
        if text not in self._spelled:
            tokens: list[int] = []
            rest = text
            while rest:
                fitting = (self.all.exact(rest[:n]) for n in range(min(len(rest), self.all.longest), 0, -1))
                token = next((token for found in fitting for token in found), None)
                if token is None:
                    tokens = []
                    break
                tokens.append(token)
                rest = rest[len(self.pieces[token]) :]
            self._spelled[text] = tokens
        return self._spelled[text]


class Spellings:
    """Tokens sorted by their bytes, so that all tokens with a common prefix are adjacent."""

    def __init__(self, entries: Iterable[tuple[bytes, int]]) -> None:
        self._entries = sorted(entries)
        self._pieces = [piece for piece, _ in self._entries]
        self.longest = max(map(len, self._pieces), default=0)  # bytes

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        return iter(self._entries)

    def exact(self, text: bytes) -> Iterator[int]:
        """Ids of the tokens that spell `text`; there may be several."""
        i = bisect_left(self._pieces, text)
        while i < len(self._pieces) and self._pieces[i] == text:
            yield self._entries[i][1]
            i += 1

    def continuations(self, text: bytes) -> Iterator[tuple[bytes, int]]:
        """For each token that begins with `text` and is longer: the bytes after `text`, and the id."""
        i = bisect_left(self._pieces, text)
        while i < len(self._pieces) and self._pieces[i].startswith(text):
            if len(self._pieces[i]) > len(text):
                yield self._pieces[i][len(text) :], self._entries[i][1]
            i += 1

    def has_prefix(self, text: bytes) -> bool:
        """Whether any token begins with `text`."""
        i = bisect_left(self._pieces, text)
        return i < len(self._pieces) and self._pieces[i].startswith(text)
