"""What tracks the position of one answer in a grammar, whichever kind of grammar it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np


class Tracker(Protocol):
    """`is_accepting`: what was generated is a complete answer; `is_final`: nothing can follow.

    `has_quick_endings`: `ending` takes a small part of the time of a token.
    """

    has_quick_endings: bool

    @property
    def is_accepting(self) -> bool: ...

    @property
    def is_final(self) -> bool: ...

    def copy(self) -> Tracker: ...

    def mask(self) -> np.ndarray:
        """The tokens that may come next without the end, a new array, bool `(n_vocab,)`."""
        ...

    def accept(self, token: int) -> None:
        """Raises ValueError for a token that is not allowed."""
        ...

    def forced_text(self) -> bytes:
        """The text that must come next, perhaps cut within a character."""
        ...

    def following(self, text: bytes) -> Collection[int]:
        """The bytes that may come after `text`, which is forced."""
        ...

    def ending(self, most: int, token: int | None) -> list[int] | None:
        """As `GrammarState.ending`."""
        ...
