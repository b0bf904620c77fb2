"""Holds the contents of a context's sequences while they move to another context.

States beyond `IN_MEMORY_BYTES` go to a file without a name, so that the two contexts are never in memory at once. Each
state is written and read separately.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from io import RawIOBase
from types import TracebackType

import numpy as np

IN_MEMORY_BYTES = 192 << 20  # this much stays in memory: the state of a page


class MovedStates:
    """States by key, as arrays of bytes. A state that could not be written, for example to a full disk, is missing."""

    def __init__(self) -> None:
        self._held: dict[Hashable, np.ndarray] = {}
        self._n_held = 0
        self._file: RawIOBase | None = None
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._end = 0

    def save(self, key: Hashable, state: np.ndarray) -> None:
        if self._n_held + len(state) <= IN_MEMORY_BYTES:
            self._held[key] = state
            self._n_held += len(state)
            return
        left = state.data
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, closed by __exit__
            self._file.seek(self._end)
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            return
        self._places[key] = (self._end, len(state))
        self._end += len(state)

    def load(self, key: Hashable) -> np.ndarray | None:
        """Returns a state, uint8 `(n,)`, and drops the reference to it; None if it is missing or unreadable."""
        if key in self._held:
            return self._held.pop(key)
        if self._file is None or key not in self._places:
            return None
        start, n_bytes = self._places[key]
        state = np.empty(n_bytes, dtype=np.uint8)
        left = state.data
        try:
            self._file.seek(start)
            while left and (n_read := self._file.readinto(left)):
                left = left[n_read:]
        except OSError:
            return None
        return None if left else state

    def __enter__(self) -> MovedStates:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
