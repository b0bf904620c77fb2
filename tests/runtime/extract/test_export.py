"""Tests of exporting a results folder to other formats, compared with the files of the run and with its CSV."""

from __future__ import annotations

import csv
import io
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import openpyxl
import pandas
import pytest
from PIL import Image

import granite4v
from granite4v.errors import OutputError
from granite4v.runtime.extract import ArgumentError
from granite4v.runtime.extract.output_directory import OutputDirectory
from granite4v.runtime.extract.record import Record, encode
from granite4v.runtime.formats import Cell, Table
from tests.helpers.fake_model import FakeModel, run

OWN = {"results.jsonl", "run.json", ".granite4v.lock", ".granite4v-attempts.json"}
TEXTS = (
    "=1+1",
    "+A1",
    "-1+2",
    "@x",
    "-5",
    "007",
    "1.50",
    "1,000",
    "",
    "é",
    'a"b',
    "a\nb",
    "#N/A",
    "12",
    "0.5",
    " x ",
)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in OWN)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def random_table(rng: random.Random) -> Table:
    n_rows, n_cols, n_header = rng.randint(1, 6), rng.randint(1, 5), rng.randint(0, 1)
    cells = [Cell(i, j, rng.choice(TEXTS)) for i in range(n_rows) for j in range(n_cols)]
    if n_header and n_cols > 1:
        cells[0:2] = [replace(cells[0], colspan=2, header=True, header_level=1)]
    return Table(n_rows, n_cols, n_header, tuple(cells))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of two documents: random tables, a chart, fields and an answer in prose."""
    rng = random.Random(3)
    records = [
        Record("in/a.pdf", page, 3, "tables_html", value=[random_table(rng) for _ in range(page)], valid=True, stem="a")
        for page in (1, 2, 3)
    ]
    records += [
        Record("in/b.png", 1, 1, "chart2csv", value=random_table(rng), valid=True, stem="sub/b"),
        Record("in/b.png", 1, 1, "kvp", value={"x": 5}, valid=True, stem="sub/b"),
        Record("in/b.png", 1, 1, "prompt", value="Yes.", valid=True, stem="sub/b"),
    ]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.jsonl").write_bytes(b"".join(map(encode, records)))
    return tmp_path / "results"


def rows_of(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))


def test_the_same_files_as_the_run_writes(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    formats = ("csv", "html", "json", "otsl", "md", "docling")
    list(run(model, [scans], out=tmp_path / "all", formats=formats))
    list(run(model, [scans], out=tmp_path / "plain"))
    exported = granite4v.export_results(tmp_path / "plain", formats, out=tmp_path / "other")
    assert exported.n_failed == 0
    assert files(tmp_path / "other") == files(tmp_path / "all") and len(exported.paths) == len(
        files(tmp_path / "other")
    )
    assert granite4v.export_results(tmp_path / "plain", formats).n_failed == 0
    assert files(tmp_path / "plain") == files(tmp_path / "all")


def test_without_a_format_each_task_has_its_own(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    list(run(model, [scans], out=tmp_path / "plain"))
    granite4v.export_results(tmp_path / "plain", out=tmp_path / "other")
    assert files(tmp_path / "other") == files(tmp_path / "plain")


def test_parquet_and_workbooks_are_as_the_csv(folder: Path, tmp_path: Path) -> None:
    for name in ("csv", "parquet", "xlsx"):
        granite4v.export_results(folder, name, out=tmp_path / name)  # type: ignore[arg-type]
    tables = {name.removesuffix(".csv"): rows_of(content) for name, content in files(tmp_path / "csv").items()}
    assert len(tables) == 1 + 2 + 3 + 1 + 1
    assert {name.removesuffix(".parquet") for name in files(tmp_path / "parquet")} == set(tables)
    for name, rows in tables.items():
        path = tmp_path / "parquet" / f"{name}.parquet"
        if name != "kvp":
            body = [list(row) for row in duckdb.sql(f"select * from '{path}'").fetchall()]
            assert pandas.read_parquet(path).to_numpy().tolist() == body
            assert body == rows[len(rows) - len(body) :] and len(rows) - len(body) in (0, 1)
    sheets = {
        f"{path.name.removesuffix('.tables.xlsx')} {sheet.title}": sheet
        for path in (tmp_path / "xlsx").rglob("*.xlsx")
        for sheet in openpyxl.load_workbook(path)
    }
    assert len(sheets) == len(tables)
    for title, sheet in sheets.items():
        found = [["" if cell.value is None else str(cell.value) for cell in row] for row in sheet.iter_rows()]
        assert "f" not in {cell.data_type for row in sheet.iter_rows() for cell in row}
        assert found == tables[csv_name(title)], title


def csv_name(title: str) -> str:
    """'a.tables_html.page3-2' for 'a p3-2 tables_html'."""
    found = re.fullmatch(r"(\w+) p(\d)(?:-(\d))? (\w+)", title)
    if found is None:
        return "kvp"
    stem, page, number, task = found.groups()
    if stem == "b":
        return f"sub/b.{task}"
    return f"{stem}.{task}.page{page}" + ("" if page == "1" else f"-{number or 1}")


def test_a_format_writes_nothing_else(folder: Path, tmp_path: Path) -> None:
    granite4v.export_results(folder, "json", out=tmp_path / "json")
    assert sorted(files(tmp_path / "json")) == ["a.tables_html.json", "sub/b.chart2csv.json", "sub/b.kvp.json"]
    granite4v.export_results(folder, "xlsx", out=tmp_path / "xlsx")
    assert sorted(files(tmp_path / "xlsx")) == ["a.tables.xlsx", "kvp.xlsx", "sub/b.tables.xlsx"]


def test_files_of_an_earlier_state_go(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("csv", "xlsx"):
        granite4v.export_results(folder, name, out=out)  # type: ignore[arg-type]
    (out / "notes.csv").write_text("mine")
    before = files(out)
    with (folder / "results.jsonl").open("ab") as file:
        file.write(encode(Record("in/a.pdf", 2, 3, "tables_html", error="it is blank", stem="a")))
    granite4v.export_results(folder, "csv", out=out)
    gone = {"a.tables_html.page2-1.csv", "a.tables_html.page2-2.csv"}
    assert files(out) == {name: content for name, content in before.items() if name not in gone}


@pytest.mark.parametrize("place", ["folder", "file", "results"])
def test_what_is_not_ours_is_not_written_to(folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    other = {"folder": tmp_path / "folder", "file": tmp_path / "file", "results": tmp_path / "other"}[place]
    if place == "results":
        other.mkdir()
        (other / "results.jsonl").write_bytes((folder / "results.jsonl").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((OutputError, ArgumentError), match=f"'{other}'"):
        granite4v.export_results(folder, "csv", out=other)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_results_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("gone", "."):
        with pytest.raises(OutputError, match=r"there is no '.*results.jsonl'; expected the folder that"):
            granite4v.export_results(tmp_path / name, "csv")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "results.jsonl").write_bytes(b"")
    with pytest.raises(OutputError, match="holds no records yet"):
        granite4v.export_results(tmp_path, "csv")


def test_a_format_that_no_task_has(folder: Path, tmp_path: Path) -> None:
    for name, message in (("xls", "there is no format 'xls'"), (5, "'formats' holds 5")):
        with pytest.raises(ArgumentError, match=message):
            granite4v.export_results(folder, name, out=tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="add 'csv' to the formats"):
        granite4v.export_results(folder, "json", out=tmp_path / "out", csv_safe=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_a_run_writes_to(folder: Path, tmp_path: Path) -> None:
    claimed = OutputDirectory.claim_for_export(folder, folder)
    with pytest.raises(OutputError, match="another process is writing to"):
        granite4v.export_results(folder, "csv")
    torn = encode(Record("in/c.png", 1, 1, "kvp"))[:50]
    with (folder / "results.jsonl").open("ab") as file:
        file.write(torn)
    granite4v.export_results(folder, "csv", out=tmp_path / "out")  # exports what is finished
    assert (folder / "results.jsonl").read_bytes().endswith(torn)
    claimed.release()


def test_one_table_of_all_fields_comes_with_the_run_and_follows_it(
    model: FakeModel, scans: Path, tmp_path: Path
) -> None:
    options: Any = {"out": tmp_path / "out", "tasks": ("kvp",)}
    list(run(model, [scans], formats=("csv", "parquet", "xlsx"), **options))
    frame = pandas.read_csv(tmp_path / "out" / "kvp.csv")
    assert frame["shade"].dropna().tolist() == [10, 20, 30, 20, 20] and len(frame) == 6
    assert pandas.read_parquet(tmp_path / "out" / "kvp.parquet")["shade"].dropna().tolist() == [10, 20, 30, 20, 20]
    Image.new("RGB", (20, 30), (40,) * 3).save(scans / "e.png")
    list(run(model, [scans], resume=True, **options))
    for name in ("kvp.csv", "kvp.parquet", "kvp.xlsx"):
        read = {"csv": pandas.read_csv, "parquet": pandas.read_parquet, "xlsx": pandas.read_excel}[name.split(".")[1]]
        assert read(tmp_path / "out" / name)["shade"].dropna().tolist() == [10, 20, 30, 20, 20, 40]
    assert {"a.kvp.json", "kvp.csv"} < {path.name for path in (tmp_path / "out").iterdir()}


def test_csv_for_spreadsheets_stays_so_when_it_is_only_brought_up_to_date(folder: Path) -> None:
    with (folder / "results.jsonl").open("ab") as file:
        file.write(encode(Record("in/c.png", 1, 1, "kvp", value={"x": "=1"}, valid=True, stem="c")))
    granite4v.export_results(folder, "csv", csv_safe=True)
    safe = (folder / "kvp.csv").read_bytes()
    assert safe.startswith(b"\xef\xbb\xbf") and b",'=1\n" in safe
    granite4v.export_results(folder, "xlsx")
    assert (folder / "kvp.csv").read_bytes() == safe
    granite4v.export_results(folder, "csv")
    assert b",=1\n" in (folder / "kvp.csv").read_bytes()


def test_pandas_reads_the_html_file_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    table = Table(1, 2, 0, (Cell(0, 0, "é 日本"), Cell(0, 1, "¼")))
    (folder / "results.jsonl").write_bytes(
        encode(Record("a.pdf", 1, 1, "tables_html", value=[table], valid=True, stem="a"))
    )
    granite4v.export_results(folder, "html")
    [frame] = pandas.read_html(folder / "a.tables_html.html")
    assert frame.to_numpy().tolist() == [["é 日本", "¼"]]


def test_a_table_that_a_format_cannot_represent_is_counted(folder: Path) -> None:
    wide = Table(1, 1, 0, (Cell(0, 0, "x" * 40_000),))
    with (folder / "results.jsonl").open("ab") as file:
        file.write(encode(Record("in/c.png", 1, 1, "tables_html", value=[wide], valid=True, stem="c")))
    messages: list[str] = []
    written = granite4v.export_results(folder, "xlsx", say=messages.append)
    assert written.n_failed == 1 and "tables_html has no .xlsx: a cell of 40,000 characters" in " ".join(messages)


def test_an_incomplete_last_line_is_told(folder: Path) -> None:
    with (folder / "results.jsonl").open("ab") as file:
        file.write(encode(Record("in/c.png", 1, 1, "kvp"))[:50])
    messages: list[str] = []
    granite4v.export_results(folder, "json", say=messages.append)
    assert len(messages) == 1 and "the last line of its records is incomplete and left out" in messages[0]
