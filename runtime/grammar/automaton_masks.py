"""Computes the tokens of a vocabulary that an automaton allows at a position, without trying each of them.

Trying all of 100,000 tokens would take longer than the model needs for one. Where a literal must come, only tokens
along the literals are looked up. Where text may come, every token without a mark is allowed, and that part of the mask
is the same at every position. In a token with a mark, the bytes before the first mark are text, so only the part from
the mark on decides ('x</td>' is allowed where '</td>' is). Many tokens share that part; it is tried once for all of
them.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from granite4v.runtime.grammar.automaton import Position, Text, advance
from granite4v.runtime.grammar.token_index import Spellings, TokenIndex

_MAX_MASKS = 64  # 0.1 MB each for a vocabulary of 100,000


class AutomatonMasks:
    """The token masks of one vocabulary; the most recently used are cached.

    They consider bytes only: whether a token makes valid UTF-8 is not checked here.
    """

    def __init__(self, index: TokenIndex) -> None:
        self.index = index
        self._kept: OrderedDict[tuple[Any, ...], np.ndarray] = OrderedDict()
        self._marked: dict[Text, _Marked] = {}

    def at(self, position: Position) -> np.ndarray:
        """The mask at a position: bool `(n_vocab,)`, cached, so it must not be written to."""
        key = (position.rule, position.partial, position.held, position.is_initial)
        mask = self._kept.get(key)
        if mask is None:
            mask = self._kept[key] = self._in_text(position) if position.in_text else self._in_literals(position)
            while len(self._kept) > _MAX_MASKS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return mask

    def _in_literals(self, position: Position) -> np.ndarray:
        mask = np.zeros(self.index.n_vocab, dtype=bool)
        mask[list(_along(position, self.index.all))] = True
        return mask

    def _in_text(self, position: Position) -> np.ndarray:
        text, index = position.next.text, self.index
        assert text is not None
        if text not in self._marked:
            self._marked[text] = _Marked.of(index, text)
        marked = self._marked[text]
        mask = ~marked.mask
        if position.held:  # the held byte and the token decide together; this is rare, so each token is tried
            mask[[t for t in np.flatnonzero(marked.mask) if advance(position, index.pieces[t]) is not None]] = True
        else:
            mask[list(marked.allowed(position, text))] = True
        if position.held == b"<":
            tags = np.isin(index.first_byte, np.frombuffer(text.tags, dtype=np.uint8))
            mask = np.where(tags, self._in_literals(position._replace(partial=b"<", held=b"")), mask)
        return mask


@dataclass
class _Marked:
    """The tokens that contain a mark of one kind of text, as `mask`.

    `suffixes`: the distinct parts of tokens from their first mark on, numbered. `tokens`: for each number, three lists
    of tokens: those with nothing, only white space, or other text before that part.
    """

    mask: np.ndarray
    suffixes: Spellings = field(default_factory=lambda: Spellings(()))
    tokens: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)

    @classmethod
    def of(cls, index: TokenIndex, text: Text) -> _Marked:
        mark = re.compile(b"[" + re.escape(text.marks + (b"<" if text.tags else b"")) + b"]")
        marked = cls(np.zeros(index.n_vocab, dtype=bool))
        numbers: dict[bytes, int] = {}
        for piece, token in index.all:
            found = mark.search(piece)
            if found is None:
                continue
            number = numbers.setdefault(piece[found.start() :], len(numbers))
            if number == len(marked.tokens):
                marked.tokens.append(([], [], []))
            before = piece[: found.start()]
            marked.tokens[number][0 if not before else 1 if before.isspace() else 2].append(token)
            marked.mask[token] = True
        marked.suffixes = Spellings(numbers.items())
        return marked

    def allowed(self, position: Position, text: Text) -> Iterator[int]:
        """The tokens that are allowed in this text when no byte is held."""
        # text before the mark makes the position non-initial; so does white space, unless it does not count as text
        begun = position._replace(is_initial=False)
        numbers = {place: list(self._allowed_suffixes(place, text)) for place in {position, begun}}
        for i, place in enumerate((position, position if text.non_blank else begun, begun)):
            for number in numbers[place]:
                yield from self.tokens[number][i]

    def _allowed_suffixes(self, position: Position, text: Text) -> Iterator[int]:
        yield from _along(position, self.suffixes)
        if text.tags:
            yield from self.suffixes.exact(b"<")
            for rest, number in self.suffixes.continuations(b"<"):
                if rest[0] not in text.tags and advance(position, b"<" + rest) is not None:
                    yield number


def _along(position: Position, spellings: Spellings, before: bytes = b"") -> Iterator[int]:
    """Ids of the spellings that consist of `before` and the beginning of what may come at the position: part of a
    literal, or a complete literal and what follows it."""
    for literal, rest in position.remainders():
        for n in range(1, len(rest) + 1):
            if not spellings.has_prefix(before + rest[:n]):
                break
            yield from spellings.exact(before + rest[:n])
        else:
            yield from _after_literal(position.after(literal), spellings, before + rest)


def _after_literal(position: Position, spellings: Spellings, before: bytes) -> Iterator[int]:
    """Ids of the spellings that begin with `before`, are longer, and whose rest may come at the position."""
    text = position.next.text
    if text is None:
        yield from _along(position, spellings, before)
        return
    marks = text.marks + (b"<" if text.tags else b"")
    for rest, number in spellings.continuations(before):
        if len(rest.translate(None, marks)) == len(rest) or advance(position, rest) is not None:
            yield number
