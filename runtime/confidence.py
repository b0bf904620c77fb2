"""Computes how sure the model was of each cell or field of an answer, from the probabilities of its tokens."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from granite4v.errors import AnswerError, ArgumentError
from granite4v.runtime.answer import STOP, Answer, TokenLogprob
from granite4v.runtime.formats.place import Key
from granite4v.runtime.formats.tasks import places, read, salvage


@dataclass(frozen=True)
class Confidence:
    """The mean and the lowest (`least`) probability of the `n_tokens` tokens that a cell or a field was written with.

    Probabilities are the model's own (`TokenLogprob.logprob`), from 0 to 1. Tokens that a grammar forced are left out.
    """

    mean: float
    least: float
    n_tokens: int


def confidence(answer: Answer, task: str) -> dict[Key, Confidence]:
    """Returns the confidence of each cell or field of an answer to a task, in the order of its text.

    Keys: for tables and charts (table, row, column), counted from 0, of a cell's top left slot; for fields ('kvp') the
    JSON pointer of each text, number, literal and empty container; for code and prose '', which stands for the whole
    answer. A cell's tokens are those that overlap its text, plus the one that ends it, so an empty cell has a
    confidence, too. Tokens that a grammar forced do not count. A cell or field whose tokens were all forced has no
    entry, such as text that closed the answer at its limit. A truncated answer has entries for what `formats.salvage`
    finds in it.

    Raises ArgumentError for an answer without log-probabilities (see `GenerationOptions.logprobs`) and for an unknown
    task.
    """
    if answer.logprobs is None:
        raise ArgumentError("the answer has no log-probabilities; generate it with logprobs=0.")
    value = _value(answer, task)
    if value is None:
        return {}
    spans = _Spans(answer.logprobs)
    found: dict[Key, Confidence] = {}
    for place in places(task, answer.text, value):
        free = [math.exp(entry.logprob) for entry in spans.overlapping(place.start, place.end) if not entry.forced]
        if free:
            found[place.key] = Confidence(sum(free) / len(free), min(free), len(free))
    return found


def confidence_as_json(found: Mapping[Key, Confidence]) -> dict[str, dict[str, float]]:
    """Converts confidences to JSON data: `mean` and `least` by the JSON pointer of a field, or 'table/row/column' of a
    cell."""
    return {
        key if isinstance(key, str) else "/".join(map(str, key)): {"mean": one.mean, "least": one.least}
        for key, one in found.items()
    }


def _value(answer: Answer, task: str) -> Any:
    if answer.finish_reason == STOP:
        try:
            return read(task, answer.text)
        except AnswerError:
            pass  # salvage its complete part below
    saved = salvage(task, answer.text)
    return saved.value if saved is not None else None


class _Spans:
    """Maps a range of an answer's text to the tokens that wrote it.

    A token that writes only part of a character gets the span of that character. For example, of the tokens 'a', first
    half of 'é', second half of 'é', with `end` 1, 1 and 2, the spans are [0, 1), [1, 2) and [1, 2).
    """

    def __init__(self, entries: Sequence[TokenLogprob]) -> None:
        self._entries = entries
        self._starts: list[int] = []  # both non-decreasing; [start, end) is empty only at the end of the text
        self._ends: list[int] = []
        at = 0
        for entry in entries:
            self._starts.append(at)
            at = max(at, entry.end)
        end = at
        for start, entry in zip(reversed(self._starts), reversed(entries), strict=True):
            end = entry.end if entry.end > start else end
            self._ends.append(end)
        self._ends.reverse()

    def overlapping(self, start: int, end: int) -> Sequence[TokenLogprob]:
        return self._entries[bisect_right(self._ends, start) : bisect_left(self._starts, end)]
