"""Tables as JSON: `dimensions`, and `cells` with rows and columns that count from 1."""

from __future__ import annotations

import json
import re
from typing import Any

from granite4v.errors import AnswerError
from granite4v.runtime.formats.json_prefix import read_prefix
from granite4v.runtime.formats.json_text import json_places, load_json
from granite4v.runtime.formats.place import Place
from granite4v.runtime.formats.rows import Rows
from granite4v.runtime.formats.table import MAX_SLOTS, Cell, Table, as_many_as_fit, bounded
from granite4v.runtime.formats.wrapping import unfence

MAX_COUNT = 1_000_000_000  # of a row, a column or a span: far above those of any table
_KINDS = {"header": True, "data": False}
TABLES_JSON_ROWS = Rows(
    "}",
    re.compile(r'"content": *""|"type": *"\w*"|"\w+": *\d+|[\[\]{},\s]+'),
    group=re.compile(r'"row": *(\d+)'),
    position=re.compile(r'"row": *\d+'),
)


def read_tables_json(text: str) -> list[Table]:
    """Parses the tables of an answer, one object or a list of them. Raises AnswerError."""
    root = load_json(text, parse_float=str)
    tables = root if isinstance(root, list) else [root]
    return list(bounded(_table(found, number) for number, found in enumerate(tables, 1)))


def salvage_tables_json(text: str) -> tuple[list[Table], bool]:
    """The tables up to the last complete and valid row, and whether that is the complete answer."""
    prefix = read_prefix(unfence(text, "json").text.lstrip(), parse_float=str)
    found = prefix.value if isinstance(prefix.value, list) else [prefix.value]
    n_closed = next((i for i, one in enumerate(found) if _is_one_of(one, prefix.unclosed)), len(found))
    tables, fit = as_many_as_fit(_table(one, number) for number, one in enumerate(found[:n_closed], 1))
    if fit and n_closed == len(found):
        return tables, prefix.complete
    last = _whole_rows(found[len(tables)], prefix.unclosed)
    return as_many_as_fit([*tables, last] if last else tables)[0], False


def tables_json_places(text: str) -> list[Place]:
    """The place of the `content` of each cell."""
    root = read_prefix(unfence(text, "json").text.lstrip(), parse_float=str).value
    tables = root if isinstance(root, list) else [root]
    places: list[Place] = []
    for path, start, end in json_places(text):
        inner = path if isinstance(root, list) else (0, *path)
        if len(inner) != 4 or inner[1] != "cells" or inner[3] != "content" or not isinstance(inner[0], int):
            continue
        try:
            cell = _cell(tables[inner[0]]["cells"][inner[2]], "a cell")
        except (AnswerError, LookupError, TypeError):  # invalid, or truncated
            continue
        places.append(Place((inner[0], cell.row, cell.col), start, end))
    return places


def _is_one_of(value: Any, containers: list[Any]) -> bool:
    return any(value is container for container in containers)


def write_tables_json(table: Table) -> str:
    """Writes one object on one line; `rows` counts the rows below the header."""
    return json.dumps(_object(table), ensure_ascii=False)


def write_tables_json_list(tables: list[Table]) -> str:
    """Writes a list of objects on one line."""
    return json.dumps([_object(table) for table in tables], ensure_ascii=False)


def _object(table: Table) -> dict[str, Any]:
    return {
        "dimensions": {
            "rows": table.n_rows - table.n_header_rows,
            "columns": table.n_cols,
            "header_rows": table.n_header_rows,
            "total_rows": table.n_rows,
        },
        "cells": [
            {
                "row": cell.row + 1,
                "col": cell.col + 1,
                "colspan": cell.colspan,
                "rowspan": cell.rowspan,
                "type": "header" if cell.header else "data",
                "header_level": cell.header_level,
                "content": cell.text,
            }
            for cell in table.cells
        ],
    }


def _table(found: Any, number: int) -> Table:
    where = f"table {number}"
    if not isinstance(found, dict) or not isinstance(found.get("cells"), list):
        raise AnswerError(f"{where} is {found!r:.60}; expected an object with 'dimensions' and 'cells'.")
    cells = [_cell(one, f"cell {k} of {where}") for k, one in enumerate(found["cells"], 1)]
    size = found.get("dimensions")
    if not isinstance(size, dict):
        raise AnswerError(f"'dimensions' of {where} is {size!r:.60}; expected an object.")
    there = f"'dimensions' of {where}"
    n_rows, n_cols = _n_rows(size, cells, there), _count(size, "columns", there, 1)
    n_header_rows = _count(size, "header_rows", there, 0, default=0)
    try:
        return Table(n_rows, n_cols, n_header_rows, tuple(cells))
    except AnswerError as error:
        raise AnswerError(f"{where}: {error}") from None


def _n_rows(size: dict[str, Any], cells: list[Cell], where: str) -> int:
    """The number of all rows. `rows` may or may not include the header rows, but must agree with the other values."""
    reached = max((cell.row + cell.rowspan for cell in cells), default=0)
    total = _count(size, "total_rows", where, 1, default=reached)
    body = total - _count(size, "header_rows", where, 0, default=0)
    if "rows" in size and _count(size, "rows", where, 0) not in (body, total):
        raise AnswerError(
            f"'rows' of {where} is {size['rows']}; expected {body} (those below the header) or {total} (all)."
        )
    return total


def _cell(found: Any, where: str) -> Cell:
    if not isinstance(found, dict):
        raise AnswerError(f"{where} is {found!r:.60}; expected an object.")
    kind, text = found.get("type", "data"), found.get("content")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise AnswerError(f"'type' of {where} is {kind!r:.60}; expected 'header' or 'data'.")
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)  # a model may leave out the quotes around a number
    if not isinstance(text, str | None):
        raise AnswerError(f"'content' of {where} is {text!r:.60}; expected text.")
    return Cell(
        _count(found, "row", where, 1) - 1,
        _count(found, "col", where, 1) - 1,
        text or "",
        _count(found, "rowspan", where, 1, default=1),
        _count(found, "colspan", where, 1, default=1),
        _KINDS[kind],
        _count(found, "header_level", where, 0, default=0),
    )


def _count(found: dict[str, Any], key: str, where: str, least: int, default: int | None = None) -> int:
    value = found.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise AnswerError(f"'{key}' of {where} is {value!r:.60}; expected an integer of {least} or more.")
    if value > MAX_COUNT:
        raise AnswerError(f"'{key}' of {where} is {value!r:.60}; expected at most {MAX_COUNT:,}.")
    return value


def _whole_rows(found: Any, unclosed: list[Any]) -> Table | None:
    """The table of the leading rows that are covered from the left to the right edge; None if there are none."""
    if not isinstance(found, dict) or not isinstance(found.get("cells"), list):
        return None
    cells: list[Cell] = []
    for one in found["cells"]:
        if _is_one_of(one, unclosed):
            break
        try:
            cells.append(_cell(one, "a cell"))
        except AnswerError:
            break
    size = found.get("dimensions")
    size = size if isinstance(size, dict) else {}
    columns, n_header_rows = size.get("columns"), size.get("header_rows", 0)
    if not isinstance(columns, int) and any(cell.row > 0 for cell in cells):
        columns = sum(cell.colspan for cell in cells if cell.row == 0)  # no dimensions before the cells
    if not isinstance(columns, int) or columns < 1 or not isinstance(n_header_rows, int):
        return None
    n_rows = _n_covered_rows(cells, columns)
    kept = [
        Cell(c.row, c.col, c.text, min(c.rowspan, n_rows - c.row), c.colspan, c.header, c.header_level)
        for c in cells
        if c.row < n_rows
    ]
    return Table(n_rows, columns, max(0, min(n_header_rows, n_rows)), tuple(kept)) if n_rows else None


def _n_covered_rows(cells: list[Cell], columns: int) -> int:
    """How many rows from the top have every slot covered once.

    Goes straight to the next row where a cell begins or ends, since a span may be as large as MAX_COUNT.
    """
    n_rows = 0
    waiting = sorted(cells, key=lambda cell: cell.row, reverse=True)
    across: list[Cell] = []  # the cells that cross the current row; they change only where one begins or ends
    while True:
        across = [cell for cell in across if cell.row + cell.rowspan > n_rows]
        while waiting and waiting[-1].row <= n_rows:
            across.append(waiting.pop())
        across.sort(key=lambda cell: cell.col)
        ends = [0, *(cell.col + cell.colspan for cell in across)]
        if ends[-1] != columns or ends[:-1] != [cell.col for cell in across]:
            return n_rows
        changes = [cell.row + cell.rowspan for cell in across] + [cell.row for cell in waiting[-1:]]
        n_rows = min(min(changes), MAX_SLOTS // columns)
        if (n_rows + 1) * columns > MAX_SLOTS:
            return n_rows
