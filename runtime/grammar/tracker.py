"""The interface that tracks the position of one answer in a grammar of any kind."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np


class Tracker(Protocol):
    """Tracks the position of one answer in a grammar.

    `is_accepting`: the tokens so far are a complete answer; `is_final`: nothing can follow. `has_quick_endings`:
    `ending` takes a small fraction of the time that a token takes.
    """

    has_quick_endings: bool

    @property
    def is_accepting(self) -> bool: ...

    @property
    def is_final(self) -> bool: ...

    def copy(self) -> Tracker: ...

    def mask(self) -> np.ndarray:
        """The token mask: which tokens may come next, without the end token; a new array, bool `(n_vocab,)`."""
        ...

    def accept(self, token: int) -> None:
        """Raises ValueError for a token that is not allowed."""
        ...

    def forced_text(self) -> bytes:
        """The text that must come next; it may end inside a UTF-8 character."""
        ...

    def following(self, text: bytes) -> Collection[int]:
        """The bytes that may follow `text`, which must be forced text."""
        ...

    def ending(self, most: int, token: int | None) -> list[int] | None:
        """See `GrammarState.ending`."""
        ...
