"""A vocabulary that can be asked by its spelling: which tokens spell this, which go on from here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from granite4v.runtime.prompt.tokenizer import Vocabulary

if TYPE_CHECKING:
    import numpy as np


class Lexicon:
    """`n_vocab` is the number of logits, perhaps more than the tokenizer has ids. A special token spells nothing."""

    def __init__(self, vocabulary: Vocabulary, n_vocab: int) -> None:
        pieces = vocabulary.pieces[:n_vocab]
        self.n_vocab, self.added = n_vocab, vocabulary.added
        self.pieces: tuple[bytes, ...] = tuple(piece or b"" for piece in pieces) + (b"",) * (n_vocab - len(pieces))
        self.all = Spellings((piece, i) for i, piece in enumerate(self.pieces) if piece)
        self.added_alone = Spellings((self.pieces[i], i) for i in self.added if i < n_vocab and self.pieces[i])
        self._spelled: dict[bytes, list[int]] = {}

    @cached_property
    def first_byte(self) -> np.ndarray:
        """uint16 `(n_vocab,)`; 256 for an id that spells nothing."""
        import numpy as np

        return np.fromiter((piece[0] if piece else 256 for piece in self.pieces), dtype=np.uint16, count=self.n_vocab)

    @cached_property
    def of_byte(self) -> dict[int, int]:
        """The token of each single byte, where there is one."""
        return {piece[0]: token for piece, token in self.all if len(piece) == 1}

    def text(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.pieces[token] for token in tokens)

    def spell(self, text: bytes) -> list[int]:
        """Tokens of a text, always the longest that fits; none for a text that cannot be spelled so."""
        if text not in self._spelled:
            tokens: list[int] = []
            rest = text
            while rest:
                fitting = (self.all.exactly(rest[:n]) for n in range(min(len(rest), self.all.longest), 0, -1))
                token = next((token for found in fitting for token in found), None)
                if token is None:
                    tokens = []
                    break
                tokens.append(token)
                rest = rest[len(self.pieces[token]) :]
            self._spelled[text] = tokens
        return self._spelled[text]


class Spellings:
    """Tokens in the order of their bytes."""

    def __init__(self, entries: Iterable[tuple[bytes, int]]) -> None:
        self._entries = sorted(entries)
        self._pieces = [piece for piece, _ in self._entries]
        self.longest = max(map(len, self._pieces), default=0)

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        return iter(self._entries)

    def exactly(self, text: bytes) -> Iterator[int]:
        """Ids that spell `text`; there may be several."""
        i = bisect_left(self._pieces, text)
        while i < len(self._pieces) and self._pieces[i] == text:
            yield self._entries[i][1]
            i += 1

    def beyond(self, text: bytes) -> Iterator[tuple[bytes, int]]:
        """What comes after `text` in the tokens that begin with it and are longer, and their ids."""
        i = bisect_left(self._pieces, text)
        while i < len(self._pieces) and self._pieces[i].startswith(text):
            if len(self._pieces[i]) > len(text):
                yield self._pieces[i][len(text) :], self._entries[i][1]
            i += 1

    def begins(self, text: bytes) -> bool:
        """Whether any token begins with `text`."""
        i = bisect_left(self._pieces, text)
        return i < len(self._pieces) and self._pieces[i].startswith(text)
