"""Writes all fields of all documents as one table with a row for each page: CSV, Parquet or a workbook.

Records are read one at a time, in two passes: the columns are known only after all records have been seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from granite4v.paths import atomic_text_file
from granite4v.runtime.extract.parquet import write_parquet
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.workbook import Workbook
from granite4v.runtime.formats.csv_ import write_csv_row

FORMATS = ("csv", "parquet", "xlsx")
Records = Callable[[], Iterable[Record]]
# columns before the fields of a page; `problem`: why it has no fields, or why they are not valid
_PAGE = {"source": "string", "page": "int64", "valid": "bool", "problem": "string"}
_ITSELF = "value"  # column of an answer that is not an object
_MAX_WHOLE = 1 << 53  # a double represents every integer up to here


def write_fields_table(path: Path, task: str, records: Records, spelled: Callable[[str], str] | None = None) -> None:
    """Writes the table of a task that gives fields, complete or not at all, in the format of the path's suffix.

    A field of a nested object has a column named by its path, such as 'seller.name'; a list is one column of JSON.
    Columns hold numbers, booleans or text; text if a field has values of several types. In a workbook booleans are
    text, as in CSV. `spelled`: applied to each text of a CSV file, which then begins with a byte order mark.

    Raises OutputError, and AnswerError for what the format cannot represent.
    """
    columns = _columns(_of(task, records))
    if path.suffix == ".parquet":
        write_parquet(path, columns, ([*_typed(row, columns)] for row in _rows(task, records, columns)))
        return
    if path.suffix == ".xlsx":
        book = Workbook(path)
        rows = (_with_numbers(row, columns) for row in _rows(task, records, columns))
        book.add(task, _with_header(list(columns), rows))
        book.save()
        return
    texts = ([_text(value) for value in row] for row in _rows(task, records, columns))
    with atomic_text_file(path) as file:
        file.write("\ufeff" if spelled else "")
        for row in _with_header(list(columns), texts):
            file.write(write_csv_row([spelled(text) for text in row] if spelled else row) + "\n")


def _of(task: str, records: Records) -> Iterator[Record]:
    return (record for record in records() if record.task == task)


def _rows(task: str, records: Records, columns: dict[str, str]) -> Iterator[list[Any]]:
    for record in _of(task, records):
        found = {"source": record.source, "page": record.page, "valid": record.valid, "problem": _problem(record)}
        found.update(_leaves(record.value))
        yield [found.get(name) for name in columns]


def _problem(record: Record) -> str | None:
    return record.validity_error if record.error is None else record.error


def _with_header(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    yield names
    yield from rows


def _columns(records: Iterable[Record]) -> dict[str, str]:
    """Returns the columns in the order of their first occurrence, with types that fit all their values."""
    kinds: dict[str, set[str]] = {}
    for record in records:
        for name, value in _leaves(record.value):
            kinds.setdefault(name, set()).update(() if value is None else (_kind(value),))
    # a field that is null in some records and an object in others needs no column for the nulls
    parents = {name[:at] for name in kinds for at, letter in enumerate(name) if letter == "."}
    return _PAGE | {name: _type(kind) for name, kind in kinds.items() if kind or name not in parents}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the columns of a row: every value that is not an object, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{_quoted(key)}" if name else _quoted(key, (*_PAGE, _ITSELF)))
    elif name or value is not None:
        yield name or _ITSELF, value


def _quoted(key: str, taken: Sequence[str] = ()) -> str:
    """Returns a key, in quotes if it could be taken for a path or for a column in `taken`."""
    return json.dumps(key, ensure_ascii=False) if not key or set(key) & {".", '"'} or key in taken else key


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if abs(value) <= _MAX_WHOLE else "string"
    return "double" if isinstance(value, float) else "string"


def _type(kinds: set[str]) -> str:
    if kinds == {"int64", "double"}:
        return "double"
    return next(iter(kinds)) if len(kinds) == 1 else "string"


def _typed(row: Sequence[Any], columns: dict[str, str]) -> Iterator[Any]:
    for value, kind in zip(row, columns.values(), strict=True):
        yield value if value is None or kind != "string" else _text(value)


def _with_numbers(row: Sequence[Any], columns: dict[str, str]) -> list[Any]:
    kinds = columns.values()
    return [
        value if value is not None and kind in ("int64", "double") else _text(value)
        for value, kind in zip(row, kinds, strict=True)
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
