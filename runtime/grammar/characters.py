"""Computes which tokens keep an answer valid UTF-8 without control characters.

llguidance decides that, and its verdict depends only on the incomplete character that the answer ends in. So it is
asked once for each beginning of a character, not for each token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from granite4v.runtime.grammar.matcher import Matcher

_MAX_KEPT = 64  # beginnings of characters; a mask takes 0.1 MB for a vocabulary of 100,000


class Characters:
    """The position of an answer: between two characters, or inside one. Immutable."""

    def __init__(
        self, matcher: Matcher, pieces: Sequence[bytes], begun: bytes = b"", start: Characters | None = None
    ) -> None:
        """`matcher`: for any text, at this position; `pieces`: the bytes of each token; `begun`: the bytes of an
        incomplete character; `start`: the position between two characters, unless it is this one."""
        self._matcher, self._pieces, self._begun, self._start = matcher, pieces, begun, start or self
        self._kept: OrderedDict[bytes, Characters] = OrderedDict()  # used in `start` only: positions by their `begun`
        self.mask = matcher.mask()  # bool (n_vocab,): the tokens that may come next
        self.mask.flags.writeable = False

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return not self._begun

    def after(self, token: int) -> Characters:
        """The position after a token. Raises ValueError for one that is not allowed."""
        if not self.mask[token]:
            raise ValueError(f"token {token} ({self._pieces[token]!r}) is not allowed here")
        begun = _cut_character(self._begun + self._pieces[token])
        if not begun:
            return self._start
        kept = self._start._kept
        if begun not in kept:
            matcher = self._matcher.copy()
            matcher.accept(token)
            kept[begun] = Characters(matcher, self._pieces, begun, self._start)
            if len(kept) > _MAX_KEPT:
                kept.popitem(last=False)
        return kept[begun]


def _cut_character(text: bytes) -> bytes:
    """The bytes of the incomplete character at the end of a text, which is the beginning of valid UTF-8; empty if the
    text ends with a complete one."""
    for n in range(1, min(len(text), 3) + 1):
        byte = text[-n]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            n_all = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return text[-n:] if n < n_all else b""
    return b""
