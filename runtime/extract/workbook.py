"""Writes texts as sheets of an .xlsx workbook, through openpyxl (the extra 'xlsx').

Every cell shows the same text as in a CSV file of the table. No cell is a formula, a date or an error, whatever its
text looks like; text that begins with '=', '+', '-' or '@' stays text, even '-5'. Values that are numbers stay numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from granite4v.errors import AnswerError
from granite4v.paths import complete_file
from granite4v.runtime.formats.json_values import replace_surrogates

MAX_ROWS, MAX_COLUMNS, MAX_CELL, MAX_SHEET_NAME = 1 << 20, 1 << 14, (1 << 15) - 1, 31  # Excel's own
_NOT_XML = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_LINE_BREAK = re.compile("\r\n?")
_NUMBER = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]*[1-9])?")
MAX_NUMBER = 11  # characters that a cell without a number format shows before it rounds


class Workbook:
    """A workbook. Sheets are written to temporary files as they are added, so it takes little memory."""

    def __init__(self, path: Path) -> None:
        import openpyxl

        self.path = path
        self._book = openpyxl.Workbook(write_only=True)

    def add(self, name: str, rows: Iterable[Sequence[str | float]], n_header_rows: int = 1) -> None:
        """Adds one sheet of texts and numbers. Raises AnswerError for rows that no sheet can hold; the sheet is then
        left out."""
        from openpyxl.cell import WriteOnlyCell
        from openpyxl.styles import Font

        bold = Font(bold=True)
        sheet = self._book.create_sheet(name[:MAX_SHEET_NAME])
        sheet.freeze_panes = f"A{n_header_rows + 1}" if n_header_rows else None
        try:
            for number, row in enumerate(rows, 1):
                _check_size(number, row)
                cells = [_cell(WriteOnlyCell(sheet), value) for value in row]
                for cell in cells if number <= n_header_rows else ():
                    cell.font = bold
                sheet.append(cells)
        except BaseException:
            sheet.close()
            self._book.remove(sheet)
            raise
        sheet.close()  # closes its temporary file: a long document has thousands of sheets

    def save(self) -> None:
        """Writes the file, complete or not at all. Raises OutputError."""
        if not self._book.worksheets:
            self._book.create_sheet("no tables")  # a workbook needs at least one sheet
        with complete_file(self.path) as partial:
            self._book.save(partial)


def number_of(text: str) -> float | int | None:
    """Returns the number that a cell shows as exactly this text; None for text such as '007', '1.50', '-5' or
    '1,000'."""
    if len(text) > MAX_NUMBER or not _NUMBER.fullmatch(text):
        return None
    number = float(text) if "." in text else int(text)
    return number if str(number) == text else None


def _cell(cell: Any, value: str | float) -> Any:
    number = number_of(value) if isinstance(value, str) else value
    if number is not None:
        cell.value = number
        if not isinstance(value, str):
            cell.number_format = _shown_as(str(value))
    elif value:
        cell.value = _LINE_BREAK.sub("\n", _NOT_XML.sub("\ufffd", replace_surrogates(value)))
        cell.data_type = "s"  # openpyxl takes '=...' for a formula and '#N/A' for an error
        cell.quotePrefix = True  # as if typed behind an apostrophe: it stays text when somebody edits the cell
    return cell


def _shown_as(text: str) -> str:
    """The number format that shows a number with all of its digits, for instance '0.00' for 1.25."""
    whole, _, decimals = text.partition(".")
    if not (whole.removeprefix("-") + decimals).isdecimal():  # 1e-07
        return "General"
    return f"0.{'0' * len(decimals)}" if decimals else "0"


def _check_size(number: int, row: Sequence[str | float]) -> None:
    if number > MAX_ROWS or len(row) > MAX_COLUMNS:
        raise AnswerError(f"more than {MAX_ROWS:,} rows or {MAX_COLUMNS:,} columns, which no sheet has room for.")
    longest = max((len(value) for value in row if isinstance(value, str)), default=0)
    if longest > MAX_CELL:
        raise AnswerError(f"a cell of {longest:,} characters; a spreadsheet's hold {MAX_CELL:,}. Write it as CSV.")
