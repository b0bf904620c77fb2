"""A table as data: a rectangular grid in which one cell covers each slot. Knows no format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from granite4v.errors import AnswerError
from granite4v.extras import check_installed
from granite4v.runtime.formats.json_values import replace_surrogates

MAX_SLOTS = 1_000_000  # far above what an answer can hold; an absurd "colspan" must not exhaust the memory
MAX_WRITTEN = 50_000_000  # characters of a table whose cells repeat their text in every slot
_UNPRINTABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class Cell:
    """One cell; `row` and `col` are its top left slot in the grid, counted from 0.

    `header`: the cell labels a column, a row or a section. `header_level` counts from 1 for column headers, top row
    first, and is 0 for all others. An empty cell has empty text.
    """

    row: int
    col: int
    text: str
    rowspan: int = 1
    colspan: int = 1
    header: bool = False
    header_level: int = 0


@dataclass(frozen=True)
class Table:
    """A grid of `n_rows` by `n_cols` slots; its first `n_header_rows` rows are column headers.

    Cells are kept in reading order. Raises AnswerError unless they cover every slot of the grid exactly once.
    """

    n_rows: int
    n_cols: int
    n_header_rows: int
    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", tuple(sorted(self.cells, key=lambda cell: (cell.row, cell.col))))
        check_size(self.n_rows, self.n_cols)
        if not 0 <= self.n_header_rows <= self.n_rows:
            raise AnswerError(
                f"a table of {self.n_rows} rows has {self.n_header_rows} header rows; expected 0 to {self.n_rows}."
            )
        self.grid()

    def grid(self) -> list[list[Cell]]:
        """The cell that covers each slot, (n_rows, n_cols); a spanning cell occurs several times."""
        slots: list[list[Cell | None]] = [[None] * self.n_cols for _ in range(self.n_rows)]
        for cell in self.cells:
            self._check_bounds(cell)
            for i in range(cell.row, cell.row + cell.rowspan):
                for j in range(cell.col, cell.col + cell.colspan):
                    other = slots[i][j]
                    if other is not None:
                        raise AnswerError(
                            f"{place(i, j)} is covered twice, by the cells that start at {place(other.row, other.col)} "
                            f"and at {place(cell.row, cell.col)}; expected one cell for each slot."
                        )
                    slots[i][j] = cell
        return [[self._covering(cell, i, j) for j, cell in enumerate(row)] for i, row in enumerate(slots)]

    def texts(self) -> list[list[str]]:
        """The text of each slot, (n_rows, n_cols); a spanning cell repeats its text."""
        return [[cell.text for cell in row] for row in self.grid()]

    def column_names(self) -> list[str]:
        """The names of the columns: the texts of the header rows, joined by ' - ', as in Markdown.

        A column without a name is called for instance 'column 3', and a duplicate name gets a number. Letter case is
        ignored, since databases ignore it. Lone surrogates become U+FFFD.
        """
        names: list[str] = []
        taken: set[str] = set()
        header = self.texts()[: self.n_header_rows]
        for number in range(1, self.n_cols + 1):
            parts = [text for text, _ in groupby(row[number - 1] for row in header) if text]
            plain = name = replace_surrogates(" - ".join(parts)) or f"column {number}"
            n = 1
            while name.casefold() in taken:
                n += 1
                name = f"{plain} {n}"
            taken.add(name.casefold())
            names.append(name)
        return names

    def to_pandas(self) -> Any:
        """A pandas DataFrame of texts, (n_rows - n_header_rows, n_cols), as in a Parquet file: `column_names` names its
        columns, and lone surrogates become U+FFFD. Raises Granite4vError if pandas is not installed."""
        check_installed("to_pandas", "pandas", "pandas")
        import pandas

        rows = replace_surrogates(self.texts()[self.n_header_rows :])
        return pandas.DataFrame(rows, columns=self.column_names(), dtype="str")

    def check_repeated(self) -> None:
        """Raises AnswerError when the table is too long for a format that repeats a cell's text in every slot."""
        n_characters = sum(len(cell.text) * cell.rowspan * cell.colspan for cell in self.cells)
        if n_characters > MAX_WRITTEN:
            raise AnswerError(
                f"a table that has {n_characters:,} characters when cells repeat their text in every slot; expected at "
                f"most {MAX_WRITTEN:,}. Write it as HTML, JSON or OTSL."
            )

    def _check_bounds(self, cell: Cell) -> None:
        inside = 0 <= cell.row <= self.n_rows - cell.rowspan and 0 <= cell.col <= self.n_cols - cell.colspan
        if not inside or cell.rowspan < 1 or cell.colspan < 1:
            raise AnswerError(
                f"the cell at {place(cell.row, cell.col)} spans {cell.rowspan} rows and {cell.colspan} columns; "
                f"expected it to lie within {self.n_rows} rows and {self.n_cols} columns."
            )

    @staticmethod
    def _covering(cell: Cell | None, i: int, j: int) -> Cell:
        if cell is None:
            raise AnswerError(f"{place(i, j)} is not covered by any cell; expected one cell for each slot.")
        return cell


def bounded(tables: Iterable[Table]) -> Iterator[Table]:
    """Yields the tables; raises AnswerError once their slots add up to more than an answer can hold."""
    n_slots = 0
    for number, table in enumerate(tables, 1):
        n_slots += table.n_rows * table.n_cols
        if n_slots > MAX_SLOTS:
            raise AnswerError(f"{number} tables of {n_slots:,} slots together; expected at most {MAX_SLOTS:,}.")
        yield table


def stacked(tables: Sequence[Table]) -> Table:
    """Stacks tables into one, each below the one before; narrower tables get empty cells on the right."""
    n_cols, cells, row = max(table.n_cols for table in tables), [], 0
    for table in tables:
        cells += [replace(c, row=row + c.row, header_level=0 if row else c.header_level) for c in table.cells]
        cells += [Cell(row + i, j, "") for i in range(table.n_rows) for j in range(table.n_cols, n_cols)]
        row += table.n_rows
    return Table(row, n_cols, tables[0].n_header_rows, tuple(cells))


def as_many_as_fit(tables: Iterable[Table]) -> tuple[list[Table], bool]:
    """The tables up to the first that raises AnswerError, and whether these are all of them."""
    found: list[Table] = []
    try:
        for table in bounded(tables):
            found.append(table)
    except AnswerError:
        return found, False
    return found, True


def check_size(n_rows: int, n_cols: int) -> None:
    """Raises AnswerError for a table without slots, or with more than an answer can hold."""
    size = f"a table of {n_rows} rows and {n_cols} columns"
    if n_rows < 1 or n_cols < 1:
        raise AnswerError(f"{size}; expected at least one of each.")
    if n_rows * n_cols > MAX_SLOTS:
        raise AnswerError(f"{size}; expected at most {MAX_SLOTS} slots.")


def printable(text: str) -> str:
    """The text with U+FFFD in place of characters that neither HTML nor Markdown can represent."""
    return _UNPRINTABLE.sub("\ufffd", text)


def place(row: int, col: int) -> str:
    """A slot as messages name it; row and column count from 1 there."""
    return f"row {row + 1}, column {col + 1}"


def with_header_rows(n_rows: int, n_cols: int, n_header_rows: int, cells: list[Cell]) -> Table:
    """Makes a table, for formats without header levels: cells in header rows become headers of their row's level."""
    made = [
        Cell(c.row, c.col, c.text, c.rowspan, c.colspan, True, c.row + 1)
        if c.row < n_header_rows
        else Cell(c.row, c.col, c.text, c.rowspan, c.colspan, c.header)
        for c in cells
    ]
    return Table(n_rows, n_cols, n_header_rows, tuple(made))
