"""What a decode step costs by its number of rows, learned from the steps that were computed."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

N_KEPT = 5  # latest steps of one number of rows; their median is little disturbed by what else the machine does
# Steps after which a figure is forgotten, for each time that it was measured: contexts grow, and attention with them;
# and what was measured once may have been disturbed.
AGE_EACH = 60
# What a further row is thought to cost before it was tried, as a part of the cost of one: less than it turns out to be
# on any CPU, so that it is tried once.
_HOPE = 0.25


@dataclass
class _Measured:
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=N_KEPT))
    noted_at: int = 0


class StepCosts:
    """Estimates the seconds of a step. Numbers of rows that were not tried lately are interpolated between those that
    were; beyond them rows are taken to be cheap."""

    def __init__(self) -> None:
        self._measured: dict[int, _Measured] = {}
        self._n_noted = 0

    def note(self, n_rows: int, seconds: float) -> None:
        """Takes account of a step."""
        self._n_noted += 1
        measured = self._measured.setdefault(n_rows, _Measured())
        measured.seconds.append(seconds)
        measured.noted_at = self._n_noted

    def seconds(self, n_rows: int) -> float:
        """Estimated seconds of a step; relative ones before the first was measured."""
        known = self._known()
        below = max((n for n in known if n <= n_rows), default=None)
        above = min((n for n in known if n >= n_rows), default=None)
        if below is None and above is None:
            return 1 + _HOPE * (n_rows - 1)
        if below is None:
            assert above is not None
            return known[above] * (1 + _HOPE * (n_rows - 1)) / (1 + _HOPE * (above - 1))
        if above is None:
            return known[below] * (1 + _HOPE * (n_rows - below) / below)
        if above == below:
            return known[below]
        share = (n_rows - below) / (above - below)
        return known[below] + share * (known[above] - known[below])

    def _known(self) -> dict[int, float]:
        """Seconds by numbers of rows, rising: fewer rows could be filled up to more."""
        known: dict[int, float] = {}
        least = float("inf")
        for n, measured in sorted(self._measured.items(), reverse=True):
            if self._n_noted - measured.noted_at < AGE_EACH * len(measured.seconds):
                known[n] = least = min(least, statistics.median(measured.seconds))
        return known
