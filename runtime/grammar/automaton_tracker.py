"""Tracks an answer in an automaton.

The automaton works on bytes, not characters: to it, half a character is ordinary text. `Characters` checks in parallel
that the text is UTF-8 without control characters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from granite4v.runtime.grammar.automaton import Position, advance, ending, forced_text, next_bytes
from granite4v.runtime.grammar.automaton_masks import AutomatonMasks
from granite4v.runtime.grammar.characters import Characters
from granite4v.runtime.grammar.token_index import TokenIndex

_MAX_FORCED_BYTES = 4096  # per run; an automaton can force endless text
_MAX_REST = 3  # bytes of a character after its first


class AutomatonTracker:
    has_quick_endings = True

    def __init__(self, position: Position, masks: AutomatonMasks, characters: Characters) -> None:
        self._position, self._masks, self._characters = position, masks, characters
        # cached ending of one position (None: the vocabulary cannot spell it); it is asked for at every token, and
        # free text does not change the position
        self._ending: tuple[Position, list[int] | None] | None = None

    @property
    def is_accepting(self) -> bool:
        return self._position.is_accepting and self._characters.is_complete

    @property
    def is_final(self) -> bool:
        return self._position.is_final

    def copy(self) -> AutomatonTracker:
        return AutomatonTracker(self._position, self._masks, self._characters)

    def mask(self) -> np.ndarray:
        return self._masks.at(self._position) & self._characters.mask

    def accept(self, token: int) -> None:
        piece = self._masks.index.pieces[token]
        following = advance(self._position, piece)
        if following is None or not piece:
            raise ValueError(f"token {token} ({piece!r}) is not allowed here")
        self._characters = self._characters.after(token)
        self._position = following

    def forced_text(self) -> bytes:
        return forced_text(self._position, _MAX_FORCED_BYTES)

    def following(self, text: bytes) -> Collection[int]:
        after = advance(self._position, text)
        assert after is not None
        return next_bytes(after)

    def ending(self, most: int, token: int | None) -> list[int] | None:
        """The tokens that complete an incomplete character, then those of the automaton's own ending."""
        index = self._masks.index
        position, characters = self._position, self._characters
        if token is not None:
            following = advance(position, index.pieces[token])
            assert following is not None
            position, characters = following, characters.after(token)
        completed = _complete_character(position, characters, self._masks)
        if completed is None:
            return None
        rest, position = completed
        if self._ending is None or self._ending[0] != position:
            pieces = ending(position, most)
            if pieces is None:
                return None
            self._ending = position, _spelled(pieces, index)
        spelled, begun = self._ending[1], _spelled(rest, index)
        if spelled is None or begun is None or len(begun) + len(spelled) > most:
            return None
        return begun + spelled


def _spelled(pieces: Sequence[bytes], index: TokenIndex) -> list[int] | None:
    """The tokens of all pieces; None if the vocabulary cannot spell one of them."""
    spelled = [index.spell(piece) for piece in pieces]
    return [token for piece in spelled for token in piece] if all(spelled) else None


def _complete_character(
    position: Position, characters: Characters, masks: AutomatonMasks
) -> tuple[list[bytes], Position] | None:
    """Bytes that complete the last character of an answer, and the position after them; None if there are none."""
    index, rest = masks.index, list[bytes]()
    while not characters.is_complete:
        byte = next((byte for byte, token in index.byte_tokens.items() if characters.mask[token]), None)
        following = None if byte is None else advance(position, bytes((byte,)))
        if byte is None or following is None or len(rest) == _MAX_REST:
            return None
        characters = characters.after(index.byte_tokens[byte])
        rest.append(bytes((byte,)))
        position = following
    return rest, position
