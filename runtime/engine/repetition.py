"""Answers that run on: the same rows again and again, noticed while they are said.

Honest tables repeat cells, and now and then a row. So whole rows are compared, and only a row, or a short cycle of
rows, that comes again without end counts. Inside one row (a single cell, a line of prose) a text of one period does.

A run is called endless after

- 36 equal rows, or 12 rounds of a cycle of 2 to 8 rows but at least 36 rows: a page holds 50 to 60 lines, and what
  tables repeat honestly on one (zeros, "n/a", a month's code) rarely fills more than half of them without a change;
- 72 rows if nothing is written in them: forms and ledgers have pages of blank lines;
- 600 characters of one row that are 12 rounds of the same text: leaders ("......") and blanks ("____") to fill in
  are a line long, at most about 150.

A run that counts (a row number that goes up) is not noticed: it says something new each time.
"""

from __future__ import annotations

from granite4v.runtime.formats.rows import LINES, Rows

MOST_ROWS, MOST_BLANK_ROWS = 36, 72
MOST_ROUNDS = 12
LONGEST_CYCLE = 8  # rows
MOST_CHARACTERS = 600  # of one period within a row
_CHECKED_EVERY = 64  # characters


class Repetition:
    """Watches one answer, which falls into `rows`."""

    def __init__(self, rows: Rows = LINES) -> None:
        self._rows = rows
        self._text = ""  # of the part that has not ended
        self._n_checked = 0
        self._row, self._group = "", ""
        self._past: list[str] = []
        self._equal = [0] * (LONGEST_CYCLE + 1)  # rows up to the last that equal the one that many rows before
        self._n_blank = 0  # rows up to the last in which nothing is written

    def push(self, piece: str) -> bool:
        """Whether the answer runs on, with this piece at its end."""
        self._text += piece
        while self._rows.end in self._text:
            part, _, self._text = self._text.partition(self._rows.end)
            self._n_checked = 0
            if self._end_part(part):
                return True
        if len(self._text) - self._n_checked < _CHECKED_EVERY:
            return False
        self._n_checked = len(self._text)
        return is_periodic(self._text[-MOST_CHARACTERS:])

    def _end_part(self, part: str) -> bool:
        if self._rows.group is None:
            return self._end_row(part)
        found = self._rows.group.search(part)
        group = found[1] if found else ""
        if group == self._group:
            self._row += part
            return False
        row, self._row, self._group = self._row, part, group
        return self._end_row(row)

    def _end_row(self, row: str) -> bool:
        self._n_blank = 0 if self._rows.blank.sub("", row) else self._n_blank + 1
        if self._rows.position is not None:
            row = self._rows.position.sub("", row)
        for cycle in range(1, LONGEST_CYCLE + 1):
            equal = len(self._past) >= cycle and self._past[-cycle] == row
            self._equal[cycle] = self._equal[cycle] + 1 if equal else 0
        self._past = [*self._past[1 - LONGEST_CYCLE :], row]
        return any(self._is_endless(cycle) for cycle in range(1, LONGEST_CYCLE + 1))

    def _is_endless(self, cycle: int) -> bool:
        n_rows = self._equal[cycle] + cycle
        most = MOST_BLANK_ROWS if self._n_blank >= n_rows else MOST_ROWS
        return self._equal[cycle] > 0 and n_rows >= max(most, MOST_ROUNDS * cycle)


def is_periodic(text: str) -> bool:
    """Whether a text of at least `MOST_CHARACTERS` is `MOST_ROUNDS` or more rounds of a shorter one."""
    n = len(text)
    if n < MOST_CHARACTERS:
        return False
    # the longest proper beginning that is an end too; what is left is the shortest period (Knuth, Morris, Pratt)
    border = [0] * n
    length = 0
    for i in range(1, n):
        while length and text[i] != text[length]:
            length = border[length - 1]
        length += text[i] == text[length]
        border[i] = length
    return (n - border[-1]) * MOST_ROUNDS <= n
