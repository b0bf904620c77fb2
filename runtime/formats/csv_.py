"""CSV of a chart's data: a header row, and rows as wide as it.

Named with an underscore because it stands beside the standard `csv`, which it reads with.
"""

from __future__ import annotations

import csv
import io
import re

from granite4v.errors import AnswerError
from granite4v.runtime.formats.rows import Rows
from granite4v.runtime.formats.table import Cell, Table, with_header_rows
from granite4v.runtime.formats.wrapping import unfence

CSV_ROWS = Rows("\n", re.compile(r'[,"\s]+'))


def read_csv(text: str) -> Table:
    """The rows as a table with one header row, blank lines left out, fields as they are. Raises AnswerError."""
    body = unfence(text, "csv").text
    rows, error = _rows(body)
    if error:
        raise error
    if not body.strip() or not rows:
        raise AnswerError(f"no row in {text!r:.60}; expected CSV with a header row.")
    return _table(rows)


def salvage_csv(text: str) -> tuple[Table | None, bool]:
    """The rows that end with a line break and fit, and whether that is the whole answer.

    Without a closing fence nothing tells a short last field from a cut one: the last line is left out.
    """
    body = unfence(text, "csv")
    rows, error = _rows(body.text, drop_last=not body.closed)
    return (_table(rows) if rows and body.text.strip() else None), body.closed and error is None


def _rows(text: str, drop_last: bool = False) -> tuple[list[list[str]], AnswerError | None]:
    """The rows up to the first that does not fit, and why that one does not."""
    rows: list[list[str]] = []
    lines = list(io.StringIO(text, newline=""))
    if drop_last and lines and not lines[-1].endswith("\n"):
        lines.pop()
    reader = csv.reader(lines, strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:  # also for a field of more than 131,072 characters
            where = f"row {len(rows) + 1}, on line {reader.line_num},"
            return rows, AnswerError(f"{where} is no CSV: {error}; expected quotes around whole fields.")
        if row is None:
            return rows, None
        if rows and row and len(row) != len(rows[0]):
            return rows, AnswerError(
                f"row {len(rows) + 1}, on line {reader.line_num}, has {len(row)} fields; "
                f"expected {len(rows[0])} as in the header row."
            )
        if row:
            rows.append(row)


def _table(rows: list[list[str]]) -> Table:
    cells = [Cell(i, j, text) for i, row in enumerate(rows) for j, text in enumerate(row)]
    return with_header_rows(len(rows), len(rows[0]), 1, cells)


def write_csv(table: Table) -> str:
    """A line for each row, header rows too, and a line break between rows.

    A cell that spans repeats its text in every slot, as pandas.read_html and docling's data frames have it. Raises
    AnswerError where that grows out of bounds.
    """
    table.check_repeated()
    return "\n".join(",".join(map(_field, row)) if len(row) > 1 else _only_field(row[0]) for row in table.texts())


def _field(text: str) -> str:
    # not csv.writer: which line breaks it puts in quotes depends on Python's version
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _only_field(text: str) -> str:
    return _field(text) if text.strip() else f'"{text}"'  # a blank line is no row
