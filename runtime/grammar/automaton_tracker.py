"""Tracks an answer in an automaton.

The automaton decides about bytes, not about characters: half a character is text like any other. llguidance, which
knows the vocabulary as a trie of bytes, tracks beside it that text is UTF-8 without control characters. That is all it
is used for here: its grammars cannot count columns.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from granite4v.runtime.grammar.automaton import Position, advance, ending, forced_text, next_bytes
from granite4v.runtime.grammar.automaton_masks import AutomatonMasks
from granite4v.runtime.grammar.matcher import Matcher

_MAX_FORCED_BYTES = 4096  # of one run; an automaton can force text without end
_MAX_REST = 3  # bytes of a character after its first one


class AutomatonTracker:
    has_quick_endings = True

    def __init__(self, position: Position, masks: AutomatonMasks, characters: Matcher) -> None:
        self._position, self._masks, self._characters = position, masks, characters
        # the ending from one position, which is asked for at every token: text leaves the position as it was
        self._ending: tuple[Position, list[bytes]] | None = None

    @property
    def is_accepting(self) -> bool:
        return self._position.is_accepting and self._characters.is_accepting

    @property
    def is_final(self) -> bool:
        return self._position.is_final

    def copy(self) -> AutomatonTracker:
        return AutomatonTracker(self._position, self._masks, self._characters.copy())

    def mask(self) -> np.ndarray:
        return self._masks.at(self._position) & self._characters.mask()

    def accept(self, token: int) -> None:
        piece = self._masks.index.pieces[token]
        following = advance(self._position, piece)
        if following is None or not piece:
            raise ValueError(f"token {token} ({piece!r}) is not allowed here")
        self._characters.accept(token)
        self._position = following

    def forced_text(self) -> bytes:
        return forced_text(self._position, _MAX_FORCED_BYTES)

    def following(self, text: bytes) -> Collection[int]:
        after = advance(self._position, text)
        assert after is not None
        return next_bytes(after)

    def ending(self, most: int, token: int | None) -> list[int] | None:
        """The tokens that complete a character that was cut, and those of the automaton's own ending."""
        index = self._masks.index
        position, characters = self._position, self._characters
        if token is not None:
            following = advance(position, index.pieces[token])
            assert following is not None
            position, characters = following, characters.copy()
            characters.accept(token)
        completed = _complete_character(position, characters, self._masks)
        if completed is None:
            return None
        rest, position = completed
        if self._ending is None or self._ending[0] != position:
            pieces = ending(position, most)
            if pieces is None:
                return None
            self._ending = position, pieces
        spelled = [index.spell(piece) for piece in (*rest, *self._ending[1])]
        tokens = [token for piece in spelled for token in piece]
        return tokens if all(spelled) and len(tokens) <= most else None


def _complete_character(
    position: Position, characters: Matcher, masks: AutomatonMasks
) -> tuple[list[bytes], Position] | None:
    """Bytes that complete the character an answer was cut in, and the position after them; None if there are none."""
    index, rest = masks.index, list[bytes]()
    if not characters.is_accepting:
        characters = characters.copy()
    while not characters.is_accepting:
        mask = characters.mask()
        byte = next((byte for byte, token in index.byte_tokens.items() if mask[token]), None)
        following = None if byte is None else advance(position, bytes((byte,)))
        if byte is None or following is None or len(rest) == _MAX_REST:
            return None
        characters.accept(index.byte_tokens[byte])
        rest.append(bytes((byte,)))
        position = following
    return rest, position
