"""Tests of the table of all documents' fields, read back by other programs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import duckdb
import openpyxl
import pandas
import pytest

from granite4v.errors import AnswerError
from granite4v.runtime.extract.document_files import spreadsheet_text
from granite4v.runtime.extract.fields_table import write_fields_table
from granite4v.runtime.extract.record import Record

VALUES: list[Any] = [
    {"id": "007", "total": 3, "n": 1, "paid": True, "seller": {"name": "=A1", "a.b": None}, "lines": [{"x": 1.5}]},
    {"id": "x", "total": 2.5, "n": None, "paid": False, "seller": None, "source": "scan", "lines": []},
    {"id": None, "total": None, "n": 2**60, "mixed": 1},
    {"mixed": "one"},
]
RECORDS = [
    *(Record("a.pdf", page, 4, "kvp", value=value, valid=True) for page, value in enumerate(VALUES, 1)),
    Record("a.pdf", 1, 4, "tables_html", value=[], valid=True),
    Record("b.png", None, None, "kvp", error="cannot be read", error_type="DocumentError"),
    Record("c.png", 1, 1, "kvp", value=["é"], validity_error="not an object"),
]
HEADER = [
    "source", "page", "valid", "problem", "id", "total", "n", "paid", "seller.name", 'seller."a.b"', "lines",
    '"source"', "mixed", "value",
]  # fmt: skip
ROWS: list[list[Any]] = [
    ["a.pdf", 1, True, None, "007", 3.0, "1", True, "=A1", None, '[{"x": 1.5}]', None, None, None],
    ["a.pdf", 2, True, None, "x", 2.5, None, False, None, None, "[]", "scan", None, None],
    ["a.pdf", 3, True, None, None, None, str(2**60), None, None, None, None, None, "1", None],
    ["a.pdf", 4, True, None, None, None, None, None, None, None, None, None, "one", None],
    ["b.png", None, False, "cannot be read", *[None] * 10],
    ["c.png", 1, False, "not an object", *[None] * 9, '["é"]'],
]


def as_csv(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def test_as_csv(tmp_path: Path) -> None:
    path = tmp_path / "kvp.csv"
    write_fields_table(path, "kvp", lambda: RECORDS)
    header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    assert header == HEADER
    texts = [[as_csv(value) for value in row] for row in ROWS]
    texts[0][HEADER.index("total")] = "3"
    assert rows == texts
    frame = pandas.read_csv(path)
    assert frame["total"].tolist()[:2] == [3.0, 2.5] and frame["page"].dropna().tolist() == [1, 2, 3, 4, 1]


def test_as_parquet(tmp_path: Path) -> None:
    path = tmp_path / "kvp.parquet"
    write_fields_table(path, "kvp", lambda: RECORDS)
    frame = pandas.read_parquet(path)
    assert list(frame.columns) == HEADER and frame.astype(object).where(frame.notna(), None).to_numpy().tolist() == ROWS
    found = duckdb.sql(f"select * from '{path}'")
    assert [list(row) for row in found.fetchall()] == ROWS
    types = dict(zip(HEADER, map(str, found.types), strict=True))
    assert [types[name] for name in ("page", "valid", "total", "n", "paid", "lines")] == [
        "BIGINT", "BOOLEAN", "DOUBLE", "VARCHAR", "BOOLEAN", "VARCHAR"
    ]  # fmt: skip


def test_as_workbook_every_cell_says_what_the_csv_says(tmp_path: Path) -> None:
    for suffix in ("csv", "xlsx"):
        write_fields_table(tmp_path / f"kvp.{suffix}", "kvp", lambda: RECORDS)
    (sheet,) = openpyxl.load_workbook(tmp_path / "kvp.xlsx")
    assert sheet.title == "kvp"
    texts = [["" if cell.value is None else str(cell.value) for cell in row] for row in sheet.rows]
    assert texts == list(csv.reader(io.StringIO((tmp_path / "kvp.csv").read_text(encoding="utf-8"))))
    assert {cell.data_type for row in sheet.rows for cell in row if cell.value == "=A1"} == {"s"}
    assert sheet["F2"].value == 3 and sheet["F3"].value == 2.5 and sheet["E2"].value == "007"


def test_csv_for_spreadsheets(tmp_path: Path) -> None:
    path = tmp_path / "kvp.csv"
    write_fields_table(path, "kvp", lambda: RECORDS, spreadsheet_text)
    content = path.read_bytes()
    assert content.startswith(b"\xef\xbb\xbf") and b",'=A1," in content


def test_no_records_of_the_task_is_a_header(tmp_path: Path) -> None:
    write_fields_table(tmp_path / "kvp.csv", "kvp", lambda: RECORDS[4:5])
    assert (tmp_path / "kvp.csv").read_text() == "source,page,valid,problem\n"


def test_what_no_sheet_holds_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AnswerError, match="a cell of 40,000 characters"):
        write_fields_table(
            tmp_path / "kvp.xlsx", "kvp", lambda: [Record("a", 1, 1, "kvp", value={"a": "x" * 40000}, valid=True)]
        )
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_workbook_can_be_added_up(tmp_path: Path) -> None:
    totals = [100, -40, 2.5, -1.25, 123456789012, 0.1, 3]
    records = [Record("a.pdf", n, 9, "kvp", value={"total": total}, valid=True) for n, total in enumerate(totals, 1)]
    write_fields_table(tmp_path / "kvp.xlsx", "kvp", lambda: records)
    (sheet,) = openpyxl.load_workbook(tmp_path / "kvp.xlsx")
    cells = [row[4] for row in sheet.iter_rows(min_row=2)]
    assert [cell.value for cell in cells] == totals and {cell.data_type for cell in cells} == {"n"}
    assert [cell.number_format for cell in cells] == ["0", "0", "0.0", "0.00", "0", "0.0", "0"]  # all digits are shown
