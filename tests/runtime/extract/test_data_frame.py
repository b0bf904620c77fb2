"""Tests of results as data frames, compared with the records."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from dataclasses import fields, replace
from pathlib import Path

import pandas
import pytest

import granite4v
from granite4v.errors import Granite4vError, OutputError
from granite4v.runtime.extract.parquet import write_table
from granite4v.runtime.extract.record import Record, encode
from granite4v.runtime.formats import Cell, Table, read, write

HTML = '<table><tr><th>A</th><th>B</th></tr><tr><td colspan="2">=1+1</td></tr><tr><td></td><td>ü</td></tr></table>'
RECORDS = [
    Record("a.pdf", 1, 2, "tables_html", (6, 8), 72.0, "d", value=read("tables_html", HTML), valid=True),
    Record("a.pdf", 2, 2, "kvp", value={"n": 5}, valid=True, confidence={"/n": {"mean": 0.5, "least": 0.25}}),
    Record("b.png", None, None, "kvp", error="cannot be read", error_type="DocumentError"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results.jsonl").write_bytes(b"".join(map(encode, RECORDS)))
    return tmp_path


def test_a_row_for_each_record(folder: Path) -> None:
    frame = granite4v.read_results(folder)
    assert list(frame.columns) == [field.name for field in fields(Record)]
    for name in frame.columns:
        expected = [getattr(record, name) for record in RECORDS]
        missing = [pandas.api.types.is_scalar(value) and pandas.isna(value) for value in frame[name]]
        assert [None if no else value for value, no in zip(frame[name], missing, strict=True)] == expected


DTYPES = dict.fromkeys((field.name for field in fields(Record)), "object") | {
    "page": "Int64", "n_pages": "Int64", "dpi": "Float64", "valid": "bool", "salvaged": "bool"
}  # fmt: skip
ARROW_TYPES = {"Int64": "int64", "Float64": "double", "bool": "bool", "object": "string"}


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], RECORDS[2:], []])
def test_types_do_not_depend_on_the_records(records: list[Record], tmp_path: Path) -> None:
    """The marker of missing values does not depend on them either."""
    (tmp_path / "results.jsonl").write_bytes(b"".join(map(encode, records)))
    frame = granite4v.read_results(tmp_path)
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == DTYPES
    for row, record in zip(frame.itertuples(), records, strict=True):
        for name, dtype in DTYPES.items():
            expected = getattr(record, name)
            found = getattr(row, name)
            assert found is (pandas.NA if dtype != "object" else None) if expected is None else found == expected
    assert [row.error for row in frame.itertuples() if row.error] == [one.error for one in records if one.error]
    assert len(frame[frame["error"].notna()]) == sum(one.error is not None for one in records)
    table = granite4v.read_results(tmp_path, arrow=True)
    types = {name: ARROW_TYPES[dtype] for name, dtype in DTYPES.items()}
    assert dict(zip(table.column_names, map(str, table.schema.types), strict=True)) == types
    assert table.column("error").to_pylist() == [one.error for one in records]


def test_the_last_of_the_same_key_counts_and_a_torn_line_does_not(folder: Path) -> None:
    with (folder / "results.jsonl").open("ab") as file:
        file.write(encode(replace(RECORDS[1], value={"n": 6})) + encode(RECORDS[0])[:40])
    assert list(granite4v.read_results(folder)["value"])[1:] == [{"n": 6}, None]


def test_a_folder_without_records(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no '.*results.jsonl'; expected the folder"):
        granite4v.read_results(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(b"")
    assert granite4v.read_results(tmp_path).shape == (0, len(fields(Record)))
    (tmp_path / "results.jsonl").write_bytes(b"{}\n")
    with pytest.raises(OutputError, match="line 1 of '.*' is not a record of ours"):
        granite4v.read_results(tmp_path)


def test_arrow(folder: Path) -> None:
    table = granite4v.read_results(folder, arrow=True)
    for row, record in zip(table.to_pylist(), RECORDS, strict=True):
        nested = {name for name, value in record.as_dict().items() if isinstance(value, dict | list | tuple)}
        assert {name: json.loads(v) if name in nested else v for name, v in row.items()} == json.loads(encode(record))


def test_arrow_has_every_value_and_no_lone_surrogates(tmp_path: Path) -> None:
    odd = [Record("a\udcff.png", i, 1, "kvp", value=value) for i, value in enumerate(["\ud800", 5, True, ["\ud800"]])]
    (tmp_path / "results.jsonl").write_bytes(b"".join(map(encode, odd)))
    table = granite4v.read_results(tmp_path, arrow=True)
    assert table.column("value").to_pylist() == ["\ufffd", "5", "true", '["\ufffd"]']
    assert set(table.column("source").to_pylist()) == {"a\ufffd.png"}


def test_a_table_is_as_its_csv_and_its_parquet(tmp_path: Path) -> None:
    (table,) = read("tables_html", HTML)
    head, *rows = csv.reader(io.StringIO(write(table, "csv")))
    frame = table.to_pandas()
    assert list(frame.columns) == head == ["A", "B"] and frame.to_numpy().tolist() == rows
    assert list(replace(table, n_header_rows=0).to_pandas().columns) == ["column 1", "column 2"]
    two = replace(table, n_header_rows=2).to_pandas()
    assert list(two.columns) == ["A - =1+1", "B - =1+1"] and two.to_numpy().tolist() == [["", "ü"]]
    texts = [["A", "a", ""], ["1", "\ud800", ""]]
    cells = tuple(Cell(i, j, text) for i, row in enumerate(texts) for j, text in enumerate(row))
    same = Table(2, 3, 1, cells)
    for one in (table, same, replace(same, n_header_rows=0)):
        write_table(tmp_path / "a.parquet", one)
        pandas.testing.assert_frame_equal(one.to_pandas(), pandas.read_parquet(tmp_path / "a.parquet"))
    assert list(replace(same, n_header_rows=2).to_pandas().dtypes) == list(same.to_pandas().dtypes)
    assert list(same.to_pandas().columns) == ["A", "a 2", "column 3"]
    assert same.to_pandas().to_numpy().tolist() == [["1", "\ufffd", ""]]


def test_without_pandas_it_is_said_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("pandas", "pyarrow") else find(name))
    for call in (lambda: granite4v.read_results(folder), Table(1, 1, 0, (Cell(0, 0, ""),)).to_pandas):
        with pytest.raises(Granite4vError, match=r"needs pandas; install it with pip install 'granite4v\[pandas\]'"):
            call()
    with pytest.raises(Granite4vError, match=r"granite4v\[arrow\]"):
        granite4v.read_results(folder, arrow=True)
