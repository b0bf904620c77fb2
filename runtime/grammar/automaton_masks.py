"""Which tokens of a vocabulary a form allows at a place, without trying each of them.

Where a literal is due, only tokens along the literals are looked up. Where text is due, all tokens are allowed but
those with a mark in them; of these the part from the first mark on decides, and many tokens share one.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from granite4v.runtime.grammar.automaton import Cursor, Text, advance
from granite4v.runtime.grammar.token_index import Lexicon, Spellings

if TYPE_CHECKING:
    import numpy as np

_KEPT = 64  # masks of 0.1 MB each at a vocabulary of 100,000


class FormMasks:
    """The masks of one vocabulary, kept for the places that were asked for last. They say nothing of characters."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self._kept: OrderedDict[tuple[Any, ...], np.ndarray] = OrderedDict()
        self._marked: dict[Text, _Marked] = {}

    def of(self, cursor: Cursor) -> np.ndarray:
        """bool `(n_vocab,)`, not to be written to"""
        key = (cursor.rule, cursor.literal, cursor.held, cursor.fresh)
        if key not in self._kept:
            self._kept[key] = self._in_text(cursor) if cursor.in_text else self._in_literals(cursor)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _in_literals(self, cursor: Cursor) -> np.ndarray:
        import numpy as np

        mask = np.zeros(self.lexicon.n_vocab, dtype=bool)
        mask[list(_along(cursor, self.lexicon.all))] = True
        return mask

    def _in_text(self, cursor: Cursor) -> np.ndarray:
        import numpy as np

        text, lexicon = cursor.want.text, self.lexicon
        assert text is not None
        if text not in self._marked:
            self._marked[text] = _Marked.of(lexicon, text)
        marked = self._marked[text]
        mask = ~marked.mask
        if cursor.held:  # what begins there decides: a rare place, so each is tried
            mask[[t for t in np.flatnonzero(marked.mask) if advance(cursor, lexicon.pieces[t]) is not None]] = True
        else:
            mask[list(marked.allowed(cursor, text))] = True
        if cursor.held == b"<":
            tags = np.isin(lexicon.first_byte, np.frombuffer(text.tags, dtype=np.uint8))
            mask = np.where(tags, self._in_literals(cursor._replace(literal=b"<", held=b"")), mask)
        return mask


@dataclass
class _Marked:
    """The tokens with a mark of a kind of text in them, as `mask`.

    `ends`: what they are from the first mark on, numbered; `tokens`: for each of them the tokens that have nothing
    before it, white space, or something else.
    """

    mask: np.ndarray
    ends: Spellings = field(default_factory=lambda: Spellings(()))
    tokens: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)

    @classmethod
    def of(cls, lexicon: Lexicon, text: Text) -> _Marked:
        import numpy as np

        mark = re.compile(b"[" + re.escape(text.marks + (b"<" if text.tags else b"")) + b"]")
        marked = cls(np.zeros(lexicon.n_vocab, dtype=bool))
        numbers: dict[bytes, int] = {}
        for piece, token in lexicon.all:
            found = mark.search(piece)
            if found is None:
                continue
            number = numbers.setdefault(piece[found.start() :], len(numbers))
            if number == len(marked.tokens):
                marked.tokens.append(([], [], []))
            before = piece[: found.start()]
            marked.tokens[number][0 if not before else 1 if before.isspace() else 2].append(token)
            marked.mask[token] = True
        marked.ends = Spellings(numbers.items())
        return marked

    def allowed(self, cursor: Cursor, text: Text) -> Iterator[int]:
        """The tokens that are allowed in this text, with no character half said."""
        begun = cursor._replace(fresh=False)
        numbers = {place: list(self._ends_allowed(place, text)) for place in {cursor, begun}}
        for i, place in enumerate((cursor, cursor if text.ink else begun, begun)):
            for number in numbers[place]:
                yield from self.tokens[number][i]

    def _ends_allowed(self, cursor: Cursor, text: Text) -> Iterator[int]:
        yield from _along(cursor, self.ends)
        if text.tags:
            yield from self.ends.exactly(b"<")
            for rest, number in self.ends.beyond(b"<"):
                if rest[0] not in text.tags and advance(cursor, b"<" + rest) is not None:
                    yield number


def _along(cursor: Cursor, spellings: Spellings, before: bytes = b"") -> Iterator[int]:
    """Those that spell `before` and a part of what may come at the cursor by literals, or go on behind that."""
    for literal, rest in cursor.remainders():
        for n in range(1, len(rest) + 1):
            if not spellings.begins(before + rest[:n]):
                break
            yield from spellings.exactly(before + rest[:n])
        else:
            yield from _behind(cursor.behind(literal), spellings, before + rest)


def _behind(cursor: Cursor, spellings: Spellings, before: bytes) -> Iterator[int]:
    """Those that begin with `before` and are longer, and whose rest may come at the cursor."""
    text = cursor.want.text
    if text is None:
        yield from _along(cursor, spellings, before)
        return
    marks = text.marks + (b"<" if text.tags else b"")
    for rest, number in spellings.beyond(before):
        if len(rest.translate(None, marks)) == len(rest) or advance(cursor, rest) is not None:
            yield number
