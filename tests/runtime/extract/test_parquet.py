"""Tests of Parquet files, read back by pandas and duckdb."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import duckdb
import pandas
import pytest

from granite4v.runtime.extract.parquet import write_parquet, write_table
from granite4v.runtime.formats import Cell, Table, read, write

HTML = (
    '<table><thead><tr><th colspan="2">A</th><th>b</th></tr><tr><th>x</th><th>y</th><th>b</th></tr></thead>'
    '<tr><td>=1+1</td><td>007</td><td rowspan="2">1.50</td></tr><tr><td></td><td>é, "q"</td></tr></table>'
)


def two_readers(path: Path) -> list[tuple[list[str], list[list[Any]]]]:
    frame = pandas.read_parquet(path)
    found = duckdb.sql(f"select * from '{path}'")
    rows = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
    return [(list(frame.columns), rows), (list(found.columns), [list(row) for row in found.fetchall()])]


def test_a_table_is_as_its_csv(tmp_path: Path) -> None:
    (table,) = read("tables_html", HTML)
    write_table(tmp_path / "a.parquet", table)
    rows = list(csv.reader(io.StringIO(write(table, "csv"))))
    names = ["A - x", "A - y", "b"]
    assert table.n_header_rows == 2
    assert two_readers(tmp_path / "a.parquet") == [(names, rows[2:])] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    ("header", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "A", "a 2", "a"], ["a", "A 2", "a 2 2", "a 3"]),
        (["", "", "column 1"], ["column 1", "column 2", "column 1 2"]),
        (["ß", "SS"], ["ß", "SS 2"]),
    ],
)
def test_columns_have_names_of_their_own(header: list[str], names: list[str], tmp_path: Path) -> None:
    cells = tuple(Cell(0, j, text, header=True, header_level=1) for j, text in enumerate(header))
    table = Table(1, len(header), 1, cells)
    assert table.column_names() == names
    write_table(tmp_path / "a.parquet", table)
    assert two_readers(tmp_path / "a.parquet") == [(names, [])] * 2


def test_a_table_without_header_rows(tmp_path: Path) -> None:
    table = Table(1, 2, 0, (Cell(0, 0, "1"), Cell(0, 1, "\ud800")))
    write_table(tmp_path / "a.parquet", table)
    assert two_readers(tmp_path / "a.parquet") == [(["column 1", "column 2"], [["1", "\ufffd"]])] * 2


def test_many_rows_of_typed_columns(tmp_path: Path) -> None:
    columns = {"n": "int64", "x": "double", "yes": "bool", "text": "string"}
    rows = [[i, i / 4, i % 2 == 0, None if i % 3 else str(i)] for i in range(25_000)]
    write_parquet(tmp_path / "a.parquet", columns, rows)
    assert two_readers(tmp_path / "a.parquet") == [(list(columns), rows)] * 2
