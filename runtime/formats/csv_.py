"""Chart data as CSV: a header row, and rows of the same width.

The underscore in the module's name distinguishes it from the standard library's `csv`, which does the parsing.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from granite4v.errors import AnswerError
from granite4v.runtime.formats.place import Place
from granite4v.runtime.formats.rows import Rows
from granite4v.runtime.formats.table import Cell, Table, with_header_rows
from granite4v.runtime.formats.wrapping import unfence

_FIELD = re.compile(r'"(?:[^"]|"")*"|[^,\r\n]*')
CSV_ROWS = Rows("\n", re.compile(r'[,"\s]+'))


def read_csv(text: str) -> Table:
    """Parses an answer into a table with one header row; blank lines are skipped. Raises AnswerError."""
    body = unfence(text, "csv").text
    rows, error = _rows(body)
    if error:
        raise error
    if not body.strip() or not rows:
        raise AnswerError(f"no row in {text!r:.60}; expected CSV with a header row.")
    return _table(rows)


def salvage_csv(text: str) -> tuple[Table | None, bool]:
    """The valid rows that end with a line break, and whether they are the complete answer.

    Without a closing fence, a short last field looks like a truncated one, so an unfinished last line is left out.
    """
    body = unfence(text, "csv")
    rows, error = _rows(body.text, drop_last=not body.closed)
    return (_table(rows) if rows and body.text.strip() else None), body.closed and error is None


def csv_places(text: str) -> list[Place]:
    """The place of each field, with its quotes and the comma or line break after it."""
    body = unfence(text, "csv")
    places: list[Place] = []
    for i, row in enumerate(_rows(body.text)[0]):
        at = row.start
        for j in range(len(row.texts)):
            found = _FIELD.match(body.text, at, row.end)
            at = found.end() + 1 if found else row.end
            places.append(Place((0, i, j), *body.span(found.start() if found else row.end, at)))
    return places


@dataclass(frozen=True)
class _Row:
    """The fields of a row, and the start and end offsets of its line or lines."""

    texts: list[str]
    start: int
    end: int


def _rows(text: str, drop_last: bool = False) -> tuple[list[_Row], AnswerError | None]:
    """The rows up to the first invalid one, and the error of that row."""
    rows: list[_Row] = []
    lines = list(io.StringIO(text, newline=""))
    if drop_last and lines and not lines[-1].endswith("\n"):
        lines.pop()
    offsets = [0, *itertools.accumulate(map(len, lines))]
    reader = csv.reader(lines, strict=True)
    while True:
        n_before = reader.line_num
        try:
            row = next(reader, None)
        except csv.Error as error:  # also for a field of more than 131,072 characters
            where = f"row {len(rows) + 1}, on line {reader.line_num},"
            return rows, AnswerError(f"{where} is not CSV: {error}; expected quotes around the whole field.")
        if row is None:
            return rows, None
        if rows and row and len(row) != len(rows[0].texts):
            return rows, AnswerError(
                f"row {len(rows) + 1}, on line {reader.line_num}, has {len(row)} fields; "
                f"expected {len(rows[0].texts)} as in the header row."
            )
        if row:
            rows.append(_Row(row, offsets[n_before], offsets[reader.line_num]))


def _table(rows: list[_Row]) -> Table:
    cells = [Cell(i, j, text) for i, row in enumerate(rows) for j, text in enumerate(row.texts)]
    return with_header_rows(len(rows), len(rows[0].texts), 1, cells)


def write_csv(table: Table) -> str:
    """Writes a line for each row, including header rows, with line breaks between rows.

    A spanning cell repeats its text in every slot, as in pandas.read_html and docling's data frames. Raises
    AnswerError if that makes the text too long.
    """
    table.check_repeated()
    return "\n".join(map(write_csv_row, table.texts()))


def write_csv_row(texts: Sequence[str]) -> str:
    """One line, without its line break."""
    return ",".join(map(_field, texts)) if len(texts) > 1 else _only_field(texts[0])


def _field(text: str) -> str:
    # not csv.writer: which line breaks it quotes depends on the Python version
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _only_field(text: str) -> str:
    return _field(text) if text.strip() else f'"{text}"'  # a blank line would not be read as a row
