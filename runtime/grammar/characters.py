"""Text in complete characters: which tokens keep an answer UTF-8 without control characters.

llguidance decides that, and what it says depends on nothing but the character that an answer was cut in. So it is asked
once for each beginning of a character, not for each token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from granite4v.runtime.grammar.matcher import Matcher

_MAX_KEPT = 64  # of the beginnings of characters; a mask takes 0.1 MB for a vocabulary of 100,000


class Characters:
    """Where an answer is: between two characters, or within one. Immutable."""

    def __init__(
        self, matcher: Matcher, pieces: Sequence[bytes], begun: bytes = b"", start: Characters | None = None
    ) -> None:
        """`matcher`: of any text, here; `pieces`: the bytes of each token; `begun`: those of a character that is not
        complete; `start`: the place between two characters, where this is not it."""
        self._matcher, self._pieces, self._begun, self._start = matcher, pieces, begun, start or self
        self._kept: OrderedDict[bytes, Characters] = OrderedDict()  # of the start: places by what is begun there
        self.mask = matcher.mask()  # bool (n_vocab,): the tokens that may come next
        self.mask.flags.writeable = False

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return not self._begun

    def after(self, token: int) -> Characters:
        """Where the answer is after a token; ValueError for one that is not allowed."""
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
    """The bytes of the character that a text, the beginning of valid UTF-8, ends within; none if it ends with one."""
    for n in range(1, min(len(text), 3) + 1):
        byte = text[-n]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            n_all = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return text[-n:] if n < n_all else b""
    return b""
