"""Tests of the files of a document, read back by other programs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from docling_core.types.doc.utils import parse_otsl_table_content

from granite4v.runtime.extract.document_files import Form, as_text, remove_stale, spreadsheet_text, write_answers
from granite4v.runtime.extract.record import Record
from granite4v.runtime.formats import read

HTML = (
    '<table><tr><th colspan="2">A, "B"</th></tr><tr><td>1</td><td>x &lt; y</td></tr></table>'
    "<table><tr><th>C</th></tr><tr><td>ü</td></tr></table>"
)
CHART = "Year,Sales\n2020,5\n2021,7\n"


def record(task: str, text: str, page: int = 1, n_pages: int = 1) -> Record:
    return Record("in/a.pdf", page, n_pages, task, text=text, value=read(task, text), valid=True)


def written(tmp_path: Path, records: list[Record], *formats: str) -> dict[str, str]:
    remarks: list[str] = []
    paths = write_answers(tmp_path, "a", records, Form(formats), remarks.append).paths
    assert not remarks and sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def test_each_task_has_a_form_of_its_own(tmp_path: Path) -> None:
    tables = read("tables_html", HTML)
    records = [
        record("tables_html", HTML),
        Record("a", 1, 1, "tables_otsl", value=tables, valid=True),
        Record("a", 1, 1, "tables_json", value=tables, valid=True),
        record("chart2csv", CHART),
        record("chart2code", "```python\nprint(1)\n```"),
        record("chart2summary", "It rises."),
        record("kvp", '{"a": null, "b": ["é"]}'),
        Record("a", 1, 1, "prompt", value="Yes.", valid=True),
    ]
    files = written(tmp_path, records)
    assert sorted(files) == [
        "a.chart2code.py", "a.chart2csv.csv", "a.chart2summary.md", "a.kvp.json", "a.prompt.md", "a.tables_html.html",
        "a.tables_json.json", "a.tables_otsl.otsl",
    ]  # fmt: skip
    assert json.loads(files["a.kvp.json"]) == {"a": None, "b": ["é"]} and "é" in files["a.kvp.json"]
    assert files["a.chart2code.py"] == "print(1)\n" and files["a.prompt.md"] == "Yes.\n"
    assert list(csv.reader(io.StringIO(files["a.chart2csv.csv"]))) == [["Year", "Sales"], ["2020", "5"], ["2021", "7"]]


@pytest.mark.parametrize("task", ["tables_html", "tables_json", "tables_otsl"])
def test_any_form_of_any_table(tmp_path: Path, task: str) -> None:
    tables = read("tables_html", HTML)
    pages = [Record("a", n, 2, task, value=tables, valid=True) for n in (1, 2)]
    files = written(tmp_path, pages, "csv", "html", "json", "otsl", "md")
    frames = pandas.read_html(io.StringIO(files[f"a.{task}.html"]))
    assert [frame.shape for frame in frames] == [(1, 2), (1, 1)] * 2
    assert [len(table["cells"]) for table in json.loads(files[f"a.{task}.json"])] == [3, 2] * 2
    for line, (rows, cols) in zip(files[f"a.{task}.otsl"].splitlines(), [(2, 2), (2, 1)] * 2, strict=True):
        data = parse_otsl_table_content(line)
        assert (data.num_rows, data.num_cols) == (rows, cols)
    assert files[f"a.{task}.md"].count("| ü") == 2
    for page in (1, 2):
        first, second = (files[f"a.{task}.page{page}-{n}.csv"] for n in (1, 2))
        assert list(csv.reader(io.StringIO(first)))[1] == ["1", "x < y"]
        assert list(csv.reader(io.StringIO(second))) == [["C"], ["ü"]]


def test_pages_without_a_value_are_left_out(tmp_path: Path) -> None:
    failed = Record("a", 2, 3, "kvp", error="it is blank")
    files = written(tmp_path, [record("kvp", '{"a": 1}', 1, 3), failed, record("kvp", "[2]", 3, 3)], "csv")
    assert json.loads(files["a.kvp.json"]) == [{"page": 1, "fields": {"a": 1}}, {"page": 3, "fields": [2]}]
    assert written(tmp_path / "none", [failed]) == {} if (tmp_path / "none").mkdir() is None else None


def test_a_page_without_tables_is_an_empty_file_not_none(tmp_path: Path) -> None:
    empty: Any = Record("a", 1, 1, "tables_json", value=[], valid=True)
    assert json.loads(written(tmp_path, [empty])["a.tables_json.json"]) == []


def test_prose_and_code_of_several_pages(tmp_path: Path) -> None:
    records = [record("chart2code", "a = 1", 1, 2), record("chart2summary", "One.", 1, 2)]
    records += [record("chart2code", "b = 2", 2, 2), record("chart2summary", "Two.", 2, 2)]
    files = written(tmp_path, records)
    compile(files["a.chart2code.py"], "code", "exec")
    assert files["a.chart2summary.md"] == "## Page 1\n\nOne.\n\n## Page 2\n\nTwo.\n"


def test_a_table_that_a_form_cannot_carry_is_said_and_the_others_stay(tmp_path: Path) -> None:
    remarks: list[str] = []
    table = "<table><tr><td>a&lt;fcel&gt;b</td></tr></table>"
    records = [record("tables_html", text, page, 2) for page, text in ((1, table), (2, HTML))]
    write_answers(tmp_path, "a", records, Form(["otsl", "json"]), remarks.append)
    assert len(remarks) == 1 and "in/a.pdf, page 1: tables_html has no .otsl" in remarks[0]
    assert len((tmp_path / "a.tables_html.otsl").read_text().splitlines()) == 2
    assert len(json.loads((tmp_path / "a.tables_html.json").read_text())) == 3


def test_one_record_as_text() -> None:
    assert as_text(record("kvp", '{"a": 1}')) == '{\n  "a": 1\n}'
    assert as_text(record("chart2csv", CHART)) == CHART.strip()
    assert as_text(record("chart2csv", CHART), "md").startswith("| Year")
    assert as_text(record("tables_html", HTML), "csv").startswith('"A, ""B"""')
    assert as_text(Record("a", 1, 1, "tables_json", value=[], valid=True)) == "[]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("+1 555 0100", "+1 555 0100"), ("+A1", "'+A1"),
        ("-cmd|' /C calc", "'-cmd|' /C calc"),
        ("\t=1", "'\t=1"), ("\r=1", "'\r=1"), ("-5", "-5"), ("-1,234.50", "-1,234.50"), ("+3 %", "'+3 %"),
        ("-3%", "-3%"), ("-", "'-"),
        ("-1+2", "'-1+2"), ("a=b", "a=b"), ("'x", "'x"), ("", ""), ("- item", "'- item"),
    ],
)  # fmt: skip
def test_cells_that_a_spreadsheet_would_compute(text: str, expected: str) -> None:
    assert spreadsheet_text(text) == expected


def test_csv_for_spreadsheets_and_csv_that_reads_back(tmp_path: Path) -> None:
    chart = record("chart2csv", 'Name,"=Sum"\n@x,-5\n\u00e9,"=HYPERLINK(""http://x"",""y"")"\n')
    for safe in (False, True):
        (path,) = write_answers(tmp_path, "a", [chart], Form(csv_safe=safe), print).paths
        content = path.read_bytes()
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
        mark = "'" if safe else ""
        assert content.startswith(b"\xef\xbb\xbf") == safe
        assert rows == [
            ["Name", f"{mark}=Sum"], [f"{mark}@x", "-5"], ["\u00e9", f'{mark}=HYPERLINK("http://x","y")']
        ]  # fmt: skip


def test_one_file_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    remarks: list[str] = []
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.kvp.json").mkdir()
    records = [record("kvp", '{"a": 1}'), record("tables_html", HTML), record("chart2csv", CHART)]
    written_ = write_answers(tmp_path, "sub/a", records, Form(), remarks.append)
    assert written_.n_failed == 1 and [path.name for path in written_.paths] == [
        "a.tables_html.html",
        "a.chart2csv.csv",
    ]
    assert len(remarks) == 1 and remarks[0].startswith("'sub/a.kvp.json' is not written: cannot write")
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == [
        "a.chart2csv.csv", "a.kvp.json", "a.tables_html.html"
    ]  # fmt: skip


def test_a_value_nested_too_deep_is_told(tmp_path: Path) -> None:
    """An earlier version may have stored it."""
    value: Any = 1
    for _ in range(5000):
        value = {"a": value}
    remarks: list[str] = []
    records = [Record("a", 1, 1, "kvp", value=value, valid=True), record("tables_html", HTML)]
    assert [path.name for path in write_answers(tmp_path, "a", records, Form(), remarks.append).paths] == [
        "a.tables_html.html"
    ]
    assert remarks == ["'a.kvp.json' is not written: it is nested too deeply."]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tables_html.html"]


def test_only_files_of_the_document_are_removed(tmp_path: Path) -> None:
    ours = ["a.kvp.json", "a.tables_html.page3.csv", "a.tables_html-2.csv", "a.prompt.md", "a.docling.json"]
    others = ["a-2.kvp.json", "a.b.kvp.json", "ab.kvp.json", "a.notes.md", "a.kvp.json.bak", "b.kvp.json", "a.kvp.txt"]
    for name in [*ours, *others, "a.chart2csv.csv"]:
        (tmp_path / name).write_text("")
    remove_stale(tmp_path, "a", [tmp_path / "a.chart2csv.csv"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "a.chart2csv.csv"])
    remove_stale(tmp_path, "gone/a", [])
