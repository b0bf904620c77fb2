"""The automaton of tables as JSON: `dimensions` first, then the cells in reading order until every slot is covered.

The cells before a cell determine its row and column, so these are forced; the model chooses its spans, type, level and
content. The layout is that of Python's json.dumps. An answer is one object or a list of objects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from granite4v.runtime.formats.tables_grammar import End, Tables
from granite4v.runtime.grammar.automaton import Next, Rule, Text

MOST_ROWS, MOST_COLUMNS, MOST_LEVEL = 999, 99, 99
_STRING = Text(marks=b'"\\\n\t')
_ESCAPES = (b'\\"', b"\\\\", b"\\/", b"\\n", b"\\t")


@dataclass(frozen=True)
class _Dimensions:
    """After the key of the next number: `rows` (those below the header), `columns`, `header_rows`, `total_rows`."""

    values: tuple[int, ...] = ()

    def next(self) -> Next:
        if len(self.values) < 3:
            return self._number().next()
        n_rows, _, n_header_rows = self.values
        totals = {n_rows + n_header_rows}
        if n_rows >= max(n_header_rows, 1):
            totals.add(n_rows)  # for models whose `rows` counts all rows
        return Next(tuple(b'%d}, "cells": [' % total for total in sorted(totals)))

    def _number(self) -> _Number:
        if not self.values:
            return _Number(self, 0, MOST_ROWS, b', "columns": ', 0)
        if len(self.values) == 1:
            return _Number(self, 1, MOST_COLUMNS, b', "header_rows": ', 1)
        least = 0 if self.values[0] else 1
        return _Number(self, least, MOST_ROWS, b', "total_rows": ', least)

    def after(self, literal: bytes) -> Rule:
        if len(self.values) < 3:
            return self._number().after(literal)
        return _CellStart(_Grid(int(literal.split(b"}")[0]), (0,) * self.values[1]), first=True)

    def having(self, value: int) -> Rule:
        return _Dimensions((*self.values, value))


@dataclass(frozen=True)
class _Number:
    """Inside the digits of a number from `least` to `most`. `tail` follows it; `owner` continues with its value.

    `soonest` is the number that leads to the end of the table soonest; its digits are offered first.
    """

    owner: _Dimensions | _Cell
    least: int
    most: int
    tail: bytes
    soonest: int
    digits: str = ""

    def next(self) -> Next:
        digits = [b"%d" % d for d in range(10) if self._leads(self.digits + str(d))]
        digits.sort(key=lambda digit: not str(self.soonest).startswith(self.digits + digit.decode()))
        if not self.digits or int(self.digits) < self.least:
            return Next(tuple(digits))
        on_the_way = str(self.soonest).startswith(self.digits) and self.digits != str(self.soonest)
        return Next((*digits, self.tail) if on_the_way else (self.tail, *digits))

    def _leads(self, digits: str) -> bool:
        """Whether these digits are a number from `least` to `most`, or begin one.

        For example, from 10 to 25, '2' does (20 to 25) and '3' does not: 30 is too large.
        """
        low = high = int(digits)
        if digits[0] == "0":
            return digits == "0" and self.least == 0
        while high < self.least:
            low, high = low * 10, high * 10 + 9
        return low <= self.most

    def after(self, literal: bytes) -> Rule:
        if literal == self.tail:
            return self.owner.having(int(self.digits))
        return replace(self, digits=self.digits + literal.decode())


@dataclass(frozen=True)
class _Grid:
    """Tracks which slots are covered. `above`: for each column, how many rows a cell from above covers, from `row` on;
    `below`: the same from the next row on, for the columns that are done.

    For example, in a table of two columns, after a cell with rowspan 3 in the first column of row 0, `above` is (0, 0)
    and `below` is (2,)."""

    n_rows: int
    above: tuple[int, ...]
    row: int = 0
    below: tuple[int, ...] = ()

    @property
    def column(self) -> int:
        return len(self.below)

    def at_free_slot(self) -> _Grid | None:
        """The same grid at the next slot that is not covered; None if there is none."""
        row, above, below = self.row, self.above, self.below
        while row < self.n_rows:
            while len(below) < len(above) and above[len(below)]:
                below = (*below, above[len(below)] - 1)
            if len(below) < len(above):
                return _Grid(self.n_rows, above, row, below)
            row, above, below = row + 1, below, ()
        return None

    def n_free(self) -> int:
        """The greatest colspan that a cell here may have."""
        rest = self.above[self.column :]
        return next((i for i, covered in enumerate(rest) if covered), len(rest))

    def with_cell(self, colspan: int, rowspan: int) -> _Grid:
        return replace(self, below=self.below + (rowspan - 1,) * colspan)


@dataclass(frozen=True)
class _CellStart:
    """Between two cells, or after the last."""

    grid: _Grid
    first: bool = False

    def next(self) -> Next:
        grid = self.grid.at_free_slot()
        if grid is None:
            return Next((b"]}",))
        where = b'{"row": %d, "col": %d, "colspan": ' % (grid.row + 1, grid.column + 1)
        return Next((where if self.first else b", " + where,))

    def after(self, literal: bytes) -> Rule:
        grid = self.grid.at_free_slot()
        return _Cell(grid) if grid is not None else End()


@dataclass(frozen=True)
class _Cell:
    """Inside a cell, after the key of the next value: `colspan`, `rowspan`, `type`, `header_level`."""

    grid: _Grid
    values: tuple[int, ...] = ()
    typed: bool = False

    def next(self) -> Next:
        if len(self.values) == 2 and not self.typed:
            return Next((b'header", "header_level": ', b'data", "header_level": '))
        return self._number().next()

    def _number(self) -> _Number:
        if not self.values:
            n_free = self.grid.n_free()
            return _Number(self, 1, n_free, b', "rowspan": ', n_free)
        if len(self.values) == 1:
            n_rows = self.grid.n_rows - self.grid.row
            return _Number(self, 1, n_rows, b', "type": "', n_rows)
        return _Number(self, 0, MOST_LEVEL, b', "content": "', 0)

    def after(self, literal: bytes) -> Rule:
        if len(self.values) == 2 and not self.typed:
            return replace(self, typed=True)
        return self._number().after(literal)

    def having(self, value: int) -> Rule:
        if len(self.values) == 2:
            colspan, rowspan = self.values
            return _Content(self.grid.with_cell(colspan, rowspan))
        return replace(self, values=(*self.values, value))


@dataclass(frozen=True)
class _Content:
    """Inside the string of a cell's content."""

    grid: _Grid

    def next(self) -> Next:
        return Next((b'"}', *_ESCAPES), _STRING)

    def after(self, literal: bytes) -> Rule:
        return _CellStart(self.grid) if literal == b'"}' else self


CELLS = Tables(b'{"dimensions": {"rows": ', _Dimensions())
