"""The answers of documents in every format, read back by code that knows nothing of ours."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import sys
from html.parser import HTMLParser
from random import Random
from typing import Any

import pytest

from scripts.nano import corpus, formats
from scripts.nano.truth import Cell, Chart, Table
from tests.helpers.nano_truths import BARS, FORM, N_SAMPLES, PIE, TABLE, tables


def read_otsl(text: str) -> set[tuple[int, int, int, int, str]]:
    """Returns (row, col, rowspan, colspan, text) of every cell, by the grammar's own rules."""
    assert text.startswith("<otsl>") and text.endswith("<nl></otsl>")
    rows = [re.findall(r"<(\w+)>([^<]*(?:<b>)?)", row) for row in text[len("<otsl>") : -len("</otsl>")].split("<nl>")]
    grid = [[tag for tag, _ in row] for row in rows[:-1]]
    assert len({len(row) for row in grid}) == 1
    found = set()
    for i, row in enumerate(grid):
        for j, tag in enumerate(row):
            if tag in ("lcel", "ucel", "xcel"):
                assert rows[i][j][1] == ""
                assert tag != "lcel" or (j and row[j - 1] not in ("ucel", "xcel"))
                assert tag != "ucel" or (i and grid[i - 1][j] not in ("lcel", "xcel"))
                assert tag != "xcel" or (row[j - 1] in ("ucel", "xcel") and grid[i - 1][j] in ("lcel", "xcel"))
                continue
            assert tag in ("ched", "rhed", "fcel", "ecel") and (tag == "ecel") == (rows[i][j][1] == "")
            colspan = 1 + run([row[k] for k in range(j + 1, len(row))], "lcel")
            rowspan = 1 + run([grid[k][j] for k in range(i + 1, len(grid))], "ucel")
            found.add((i, j, rowspan, colspan, rows[i][j][1]))
    return found


def run(tags: list[str], wanted: str) -> int:
    """Counts how many of the first tags are the wanted one."""
    return next((n for n, tag in enumerate(tags) if tag != wanted), len(tags))


class HtmlCells(HTMLParser):
    """The cells of a table by the HTML rules: a cell takes the first free slot of its row."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.cells: list[tuple[int, int, int, int, str]] = []
        self.tags: list[tuple[str, str]] = []
        self.row = -1
        self.taken: set[tuple[int, int]] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.row += 1
        if tag in ("td", "th"):
            spans = {name: int(value or 0) for name, value in attrs}
            assert all(value > 1 for value in spans.values())
            rowspan, colspan = spans.get("rowspan", 1), spans.get("colspan", 1)
            col = next(j for j in range(99) if (self.row, j) not in self.taken)
            self.taken |= {(self.row + i, col + j) for i in range(rowspan) for j in range(colspan)}
            self.cells.append((self.row, col, rowspan, colspan, ""))
            self.tags.append((self.open[1], tag))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert self.open[-1] in ("td", "th")
        self.cells[-1] = (*self.cells[-1][:4], self.cells[-1][4] + data)


def as_set(table: Table) -> set[tuple[int, int, int, int, str]]:
    return {(cell.row, cell.col, cell.rowspan, cell.colspan, cell.text) for cell in table.cells}


def test_otsl_of_a_table_with_every_kind_of_slot() -> None:
    assert formats.otsl(TABLE) == (
        "<otsl><ecel><ched>Price & tax<lcel><nl><ucel><ched>Net<ecel><nl>"
        "<rhed>A <b><fcel>12.00<lcel><nl><ecel><ucel><xcel><nl></otsl>"
    )


def test_html_of_a_table_with_every_kind_of_cell() -> None:
    assert formats.html(TABLE) == (
        '<table><thead><tr><th rowspan="2"></th><th colspan="2">Price &amp; tax</th></tr>'
        "<tr><th>Net</th><th></th></tr></thead>"
        '<tbody><tr><th>A &lt;b&gt;</th><td colspan="2" rowspan="2">12.00</td></tr><tr><td></td></tr></tbody></table>'
    )
    assert formats.html(Table(1, 1, 0, (Cell(0, 0, "x"),))) == "<table><tbody><tr><td>x</td></tr></tbody></table>"


def test_json_of_a_table() -> None:
    text = formats.tables_json(TABLE)
    assert text.startswith('{"dimensions": {"rows": 2, "columns": 3, "header_rows": 2, "total_rows": 4}, "cells": [{')
    cells = json.loads(text)["cells"]
    assert list(cells[1].items()) == [
        ("row", 1),
        ("col", 2),
        ("colspan", 2),
        ("rowspan", 1),
        ("type", "header"),
        ("header_level", 1),
        ("content", "Price & tax"),
    ]
    assert [cell["header_level"] for cell in cells] == [1, 1, 2, 2, 0, 0, 0]
    assert [cell["type"] for cell in cells] == ["header"] * 5 + ["data"] * 2


def test_all_three_formats_tell_the_whole_table() -> None:
    for table in tables():
        assert read_otsl(formats.otsl(table)) == as_set(table)
        parsed = HtmlCells(formats.html(table))
        assert set(parsed.cells) == as_set(table) and parsed.open == []
        in_head = [cell.row < table.n_header_rows for cell in table.cells]
        is_header = [head or cell.header for head, cell in zip(in_head, table.cells, strict=True)]
        sections = [
            ("thead" if head else "tbody", "th" if th else "td") for head, th in zip(in_head, is_header, strict=True)
        ]
        assert parsed.tags == sections
        content = json.loads(formats.tables_json(table))
        cells = {(c["row"] - 1, c["col"] - 1, c["rowspan"], c["colspan"], c["content"]) for c in content["cells"]}
        assert cells == as_set(table)


def test_csv_has_quotes_only_where_it_must() -> None:
    assert formats.chart_csv(BARS) == 'Year,Net,Tax\n2019,"1,200",3\n2020,-4.50,30%'
    rng = Random(1)
    for chart in (corpus.random_chart(rng) for _ in range(N_SAMPLES)):
        rows = list(csv.reader(io.StringIO(formats.chart_csv(chart))))
        assert rows[0] == [chart.axis, *chart.series]
        assert rows[1:] == [[label, *row] for label, row in zip(chart.labels, chart.values, strict=True)]


@pytest.mark.parametrize("kind", ["bar", "line", "pie"])
def test_code_holds_the_charts_data(kind: str) -> None:
    chart = PIE if kind == "pie" else Chart(kind, *list(vars(BARS).values())[1:])
    text = formats.chart_code(chart)
    assert 4 <= len(text.splitlines()) <= 7
    found = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.List, ast.Dict))]
    assert str(list(chart.labels)) in found
    assert ("[40, 60]" if kind == "pie" else "{'Net': [1200, -4.5], 'Tax': [3, 30]}") in found
    assert f"plt.{'plot' if kind == 'line' else kind}(" in text and f'title="{chart.title}"' in text


def test_code_draws_what_the_chart_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs it with a fake matplotlib that records the calls."""
    calls: list[tuple[str, Any, Any]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return Noted(name)

        def __call__(self, *args: Any, **named: Any) -> Noted:
            calls.append((self._name, args, named))
            return Noted(self._name)

    noted = Noted("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib", noted)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", noted)
    exec(formats.chart_code(BARS), {})
    assert [name for name, *_ in calls] == ["bar", "bar", "gca", "set", "legend", "show"]
    assert [args[1] for _, args, _ in calls[:2]] == [[1200, -4.5], [3, 30]]
    assert calls[1][1][0] == [0.2, 1.2] and calls[1][2]["tick_label"] == ["2019", "2020"]
    assert calls[3][2] == {"title": "Sales", "xlabel": "Year"}


def test_summary_compares_the_drawn_values() -> None:
    assert formats.chart_summary(BARS) == (
        'The bar chart "Sales" shows Net and Tax by Year. '
        "The highest value is 1,200 (2019, Net) and the lowest value is -4.50 (2020, Net)."
    )
    assert formats.chart_summary(PIE).endswith("is 60% (Lima) and the lowest value is 40% (Oslo).")


@pytest.mark.parametrize(
    ("text", "literal"), [("$1,234.50", "1234.50"), ("-3", "-3"), ("007", "7"), ("12.5 kg", "12.5")]
)
def test_numbers_as_python_writes_them(text: str, literal: str) -> None:
    assert formats.number(text) == literal
    with pytest.raises(ValueError, match="no number"):
        formats.number("n/a")


def test_forms() -> None:
    assert formats.form_json(FORM) == '{"invoice_number": "A-1 \\"b\\"", "due_date": null, "total": "é 3"}'
    prompt = formats.kvp_prompt(formats.form_schema(FORM))
    schema = json.loads(prompt.split("schema:\n\n")[1].split("\n\nReturn null")[0])
    assert schema["properties"]["due_date"] == {"type": ["string", "null"]}
    assert prompt.startswith(
        "Extract structured data from this document.\nReturn a JSON object matching this schema:\n\n{\n"
    )
    assert prompt.endswith(
        "}\n\nReturn null for fields you cannot find.\nReturn ONLY valid JSON.\n"
        "Return an instance of the JSON with extracted values, not the schema itself."
    )
    assert formats.field_question("invoice_number") == "What is the invoice number?"
    assert formats.field_answer(FORM, "total") == "é 3" and formats.field_answer(FORM, "due_date") == "not found"


def test_an_answer_belongs_to_its_kind_of_truth() -> None:
    assert formats.answer_for("<tables_otsl>", TABLE) == formats.otsl(TABLE)
    assert formats.answer_for("<chart2csv>", PIE) == formats.chart_csv(PIE)
    assert formats.answer_for(formats.KVP, FORM) == formats.form_json(FORM)
    with pytest.raises(TypeError, match="no task of a Table"):
        formats.answer_for("<chart2csv>", TABLE)
