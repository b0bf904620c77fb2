"""The files of a document, read back by other programs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from docling_core.types.doc.utils import parse_otsl_table_content

from granite4v.runtime.extraction.documents import MAX_NAME_BYTES, Names, as_text, write_document
from granite4v.runtime.extraction.record import Record
from granite4v.runtime.outputs import read

HTML = (
    '<table><tr><th colspan="2">A, "B"</th></tr><tr><td>1</td><td>x &lt; y</td></tr></table>'
    "<table><tr><th>C</th></tr><tr><td>ü</td></tr></table>"
)
CHART = "Year,Sales\n2020,5\n2021,7\n"


def record(task: str, text: str, page: int = 1, n_pages: int = 1) -> Record:
    return Record("in/a.pdf", page, n_pages, task, text=text, value=read(task, text), valid=True)


def written(tmp_path: Path, records: list[Record], *formats: str) -> dict[str, str]:
    remarks: list[str] = []
    paths = write_document(tmp_path, "a", records, formats, remarks.append)
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
    write_document(tmp_path, "a", records, ["otsl", "json"], remarks.append)
    assert len(remarks) == 1 and "in/a.pdf, page 1: tables_html has no .otsl" in remarks[0]
    assert len((tmp_path / "a.tables_html.otsl").read_text().splitlines()) == 2
    assert len(json.loads((tmp_path / "a.tables_html.json").read_text())) == 3


def test_names_fit_any_disk_and_are_never_the_same() -> None:
    names = Names()
    sources = [
        "x/a.pdf",
        "y/a.pdf",
        "y/A.png",
        "-",
        "...",
        "../..",
        "a/b:c*?.png",
        "é" * 300 + ".pdf",
        "é" * 301,
        "c d",
    ]
    found = [names.name(source) for source in sources]
    assert found[:5] == ["a", "a-2", "A-3", "stdin", "document"] and found[-1] == "c_d"
    assert len({name.casefold() for name in found}) == len(sources)
    assert all(len(name.encode()) <= MAX_NAME_BYTES + 4 and "/" not in name for name in found)
    assert [names.name(source) for source in sources] == found


def test_one_record_as_text() -> None:
    assert as_text(record("kvp", '{"a": 1}')) == '{\n  "a": 1\n}'
    assert as_text(record("chart2csv", CHART)) == CHART.strip()
    assert as_text(record("chart2csv", CHART), "md").startswith("| Year")
    assert as_text(record("tables_html", HTML), "csv").startswith('"A, ""B"""')
    assert as_text(Record("a", 1, 1, "tables_json", value=[], valid=True)) == "[]"
