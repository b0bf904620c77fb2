"""Detokenizes one answer incrementally: incomplete UTF-8 characters are buffered."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for the bytes of an incomplete character


class TextStream(Protocol):
    """Turns the ids of one answer into text as they come."""

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """The buffered text at the end of the answer; an incomplete character becomes REPLACEMENT."""
        ...


class WindowStream:
    """Decodes the last few tokens again with every new one, since a token's text can depend on its neighbours.

    A decoder may drop the space before the first word, join bytes into a character, or clean up spaces around
    punctuation. So a token is decoded together with the tokens whose text came just before it; whatever this adds to
    their text is the text of the new token.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._n_emitted = 0  # tokens at the start of the window whose text has been returned

    def push(self, token: int) -> str:
        self._window.append(token)
        emitted = self._decode(self._window[: self._n_emitted])
        text = self._decode(self._window)
        if len(text) <= len(emitted) or text.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._n_emitted :]
        self._n_emitted = len(self._window)
        return text[len(emitted) :]

    def flush(self) -> str:
        emitted = self._decode(self._window[: self._n_emitted])
        text = self._decode(self._window)
        self._n_emitted = len(self._window)
        return text[len(emitted) :]


class ByteStream:
    """Joins the tokens' bytes into UTF-8 text, for vocabularies whose pieces do not depend on their neighbours."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._piece(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
