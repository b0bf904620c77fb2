"""Estimates what a decode step costs by its number of rows, from the steps that were computed."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

N_KEPT = 5  # latest steps kept for each number of rows; their median is robust against other load on the machine
# A measurement is forgotten after this many steps for each time it was made (up to N_KEPT times): contexts grow, and
# attention with them, and a single measurement may have been disturbed.
AGE_EACH = 60
# Assumed cost of an additional row before it was tried, as a fraction of the cost of one. It is lower than the real
# cost on any CPU, so that each size is tried once.
_HOPE = 0.25


@dataclass
class _Measured:
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=N_KEPT))
    median: float = 0.0
    noted_at: int = 0


class StepCosts:
    """Estimates the seconds of a step. Sizes that were not measured recently are interpolated between those that were;
    more rows than the largest one are assumed to be cheap."""

    def __init__(self) -> None:
        self._measured: dict[int, _Measured] = {}
        self._n_noted = 0
        # known sizes, ascending, and their seconds; sorted once per step, because a step asks for many estimates
        self._numbers: list[int] = []
        self._seconds: list[float] = []

    def note(self, n_rows: int, seconds: float) -> None:
        """Records the duration of a step."""
        self._n_noted += 1
        measured = self._measured.setdefault(n_rows, _Measured())
        measured.seconds.append(seconds)
        measured.median = statistics.median(measured.seconds)
        measured.noted_at = self._n_noted
        self._order()

    def seconds(self, n_rows: int) -> float:
        """Estimated seconds of a step; only relative before the first measurement."""
        numbers, seconds = self._numbers, self._seconds
        if not numbers:
            return 1 + _HOPE * (n_rows - 1)
        i = bisect_left(numbers, n_rows)
        if i == len(numbers):
            return seconds[-1] * (1 + _HOPE * (n_rows - numbers[-1]) / numbers[-1])
        if i == 0:
            return seconds[0] * (1 + _HOPE * (n_rows - 1)) / (1 + _HOPE * (numbers[0] - 1))
        share = (n_rows - numbers[i - 1]) / (numbers[i] - numbers[i - 1])
        return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])

    def _order(self) -> None:
        """Sorts the medians by number of rows, without forgotten ones.

        A step is never estimated higher than a larger one, because it could be padded to that size.
        """
        numbers, seconds, least = list[int](), list[float](), float("inf")
        for n, measured in sorted(self._measured.items(), reverse=True):
            if self._n_noted - measured.noted_at < AGE_EACH * len(measured.seconds):
                least = min(least, measured.median)
                numbers.append(n)
                seconds.append(least)
        self._numbers, self._seconds = numbers[::-1], seconds[::-1]
