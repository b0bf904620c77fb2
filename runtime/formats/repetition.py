"""Detects answers that loop, by rows that repeat during generation, so that they can be stopped.

Real tables repeat cells, and sometimes a row. So complete rows are compared, and only a row, or a short cycle of rows,
that keeps repeating counts as a loop. Within one row (a single cell, a line of prose), periodic text counts as one.

A loop is reported after

- 36 equal rows, or 12 rounds of a cycle of 2 to 8 rows but at least 36 rows: a page has 50 to 60 lines, and what real
  tables repeat on it (zeros, "n/a", the code of a month) rarely fills more than half of them without a change;
- 72 rows without content: forms and ledgers have pages of blank lines;
- 600 characters of one row that are 12 rounds of the same text: leaders ("......") and blanks to fill in ("____") are
  one line long, at most about 150 characters.

A loop with a counter (an increasing row number) is not detected: each of its rows is new.

The first round of a loop is kept: there is no way to know whether it is the last real row or already made up.
"""

from __future__ import annotations

from granite4v.runtime.formats.rows import LINES, Rows

MOST_ROWS, MOST_BLANK_ROWS = 36, 72
MOST_ROUNDS = 12
LONGEST_CYCLE = 8  # rows per round
MOST_CHARACTERS = 600  # of periodic text within a row
_CHECKED_EVERY = 64  # characters within a row


class Repetition:
    """Watches one answer for loops; `rows` says how it is split into rows."""

    def __init__(self, rows: Rows = LINES) -> None:
        self._rows = rows
        self._text = ""  # the text after the last complete row or part of a row
        self._n_checked = 0
        self._row, self._group = "", ""
        self._row_length = 0  # characters in the complete parts of the incomplete row
        self._past: list[str] = []
        # [n]: how many of the last rows equal the row n before them. After the rows a, b, a, b, a, [2] is 3: with the
        # first two, that is a run of 5 rows, or two and a half rounds
        self._equal = [0] * (LONGEST_CYCLE + 1)
        self._equal_length = [0] * (LONGEST_CYCLE + 1)  # [n]: the characters of those rows
        self._n_blank = 0  # how many of the last rows are without content

    def push(self, piece: str) -> bool:
        """Adds a piece to the answer; True if the answer loops."""
        end = self._rows.end
        *parts, rest = (self._text + piece).split(end)
        for number, part in enumerate(parts, 1):
            self._n_checked = 0
            if self._end_part(part, len(part) + len(end)):
                self._text = end.join([*parts[number:], rest])
                return True
        self._text = rest
        if len(self._text) - self._n_checked < _CHECKED_EVERY:
            return False
        self._n_checked = len(self._text)
        return period(self._text[-MOST_CHARACTERS:]) is not None

    @property
    def n_repeated(self) -> int:
        """The number of characters after the first round of a loop at the end of the answer; 0 without a loop."""
        for cycle in range(1, LONGEST_CYCLE + 1):
            if self._is_endless(cycle):
                return self._equal_length[cycle] + self._row_length + len(self._text)
        shortest = period(self._text[-MOST_CHARACTERS:])
        if shortest is None:
            return 0
        start = len(self._text) - shortest
        while start and self._text[start - 1] == self._text[start - 1 + shortest]:
            start -= 1
        return len(self._text) - shortest - start

    def _end_part(self, part: str, length: int) -> bool:
        if self._rows.group is None:
            return self._end_row(part, length)
        found = self._rows.group.search(part)
        group = found[1] if found else ""
        if group == self._group:
            self._row += part
            self._row_length += length
            return False
        row, self._row, self._group = self._row, part, group
        row_length, self._row_length = self._row_length, length
        return self._end_row(row, row_length)

    def _end_row(self, row: str, length: int) -> bool:
        self._n_blank = 0 if self._rows.blank.sub("", row) else self._n_blank + 1
        if self._rows.position is not None:
            row = self._rows.position.sub("", row)
        for cycle in range(1, LONGEST_CYCLE + 1):
            equal = len(self._past) >= cycle and self._past[-cycle] == row
            self._equal[cycle] = self._equal[cycle] + 1 if equal else 0
            self._equal_length[cycle] = self._equal_length[cycle] + length if equal else 0
        self._past = [*self._past[1 - LONGEST_CYCLE :], row]
        return any(self._is_endless(cycle) for cycle in range(1, LONGEST_CYCLE + 1))

    def _is_endless(self, cycle: int) -> bool:
        n_rows = self._equal[cycle] + cycle  # with the first round
        most = MOST_BLANK_ROWS if self._n_blank >= n_rows else MOST_ROWS
        return self._equal[cycle] > 0 and n_rows >= max(most, MOST_ROUNDS * cycle)


def without_loop(text: str, rows: Rows) -> str:
    """An answer that was stopped for looping, up to the end of the first round; other texts unchanged."""
    watch = Repetition(rows)
    return text[: len(text) - watch.n_repeated] if watch.push(text) else text


def period(text: str) -> int | None:
    """The shortest period of a text, in characters; None if the text is shorter than `MOST_CHARACTERS` or has less than
    `MOST_ROUNDS` rounds of it."""
    n = len(text)
    if n < MOST_CHARACTERS:
        return None
    # border[i]: the length of the longest proper prefix of text[:i + 1] that is also its suffix (Knuth, Morris, Pratt);
    # n - border[-1] is the shortest period
    border = [0] * n
    length = 0
    for i in range(1, n):
        while length and text[i] != text[length]:
            length = border[length - 1]
        length += text[i] == text[length]
        border[i] = length
    shortest = n - border[-1]
    return shortest if shortest * MOST_ROUNDS <= n else None
