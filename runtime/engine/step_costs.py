"""What a decode step costs by its number of rows, learned from the steps that were computed."""

from __future__ import annotations

import statistics
from bisect import bisect_left
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
    median: float = 0.0
    noted_at: int = 0


class StepCosts:
    """Estimates the seconds of a step. Numbers of rows that were not tried lately are interpolated between those that
    were; beyond them rows are taken to be cheap."""

    def __init__(self) -> None:
        self._measured: dict[int, _Measured] = {}
        self._n_noted = 0
        # what is known, rising: a step asks for many estimates, so it is put in order once a step
        self._numbers: list[int] = []
        self._seconds: list[float] = []

    def note(self, n_rows: int, seconds: float) -> None:
        """Takes account of a step."""
        self._n_noted += 1
        measured = self._measured.setdefault(n_rows, _Measured())
        measured.seconds.append(seconds)
        measured.median = statistics.median(measured.seconds)
        measured.noted_at = self._n_noted
        self._order()

    def seconds(self, n_rows: int) -> float:
        """Estimated seconds of a step; relative ones before the first was measured."""
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
        """Seconds by numbers of rows, without what is forgotten. Fewer rows could be filled up to more."""
        numbers, seconds, least = list[int](), list[float](), float("inf")
        for n, measured in sorted(self._measured.items(), reverse=True):
            if self._n_noted - measured.noted_at < AGE_EACH * len(measured.seconds):
                least = min(least, measured.median)
                numbers.append(n)
                seconds.append(least)
        self._numbers, self._seconds = numbers[::-1], seconds[::-1]
