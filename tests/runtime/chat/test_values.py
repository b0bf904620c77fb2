"""Tests of tables and fields in answers, and of what is copied from them."""

from __future__ import annotations

import csv
import io
import json

import pytest

from granite4v.runtime.chat import ChatError, Question, Turn, tables_in
from granite4v.runtime.chat.values import fields_table, markdown_tables, to_copy

HTML = (
    "<table><thead><tr><th>Item</th><th>Price</th></tr></thead>"
    "<tbody><tr><td>Paper, A4</td><td>12.00</td></tr></tbody></table>"
)
ROWS = [["Item", "Price"], ["Paper, A4", "12.00"]]
PIPES = "Here it is:\n\n| Item | Price |\n|---|--:|\n| Paper, A4 | 12.00 |\n\nThat is all."


def turn(text: str, task: str = "prompt", finish_reason: str = "stop") -> Turn:
    return Turn(Question(f"<{task}>", task), (), text, finish_reason)


@pytest.mark.parametrize(
    ("text", "task"),
    [
        (HTML, "tables_html"),
        ('Item,Price\n"Paper, A4",12.00\n', "chart2csv"),
        ("<otsl><ched>Item<ched>Price<nl><fcel>Paper, A4<fcel>12.00<nl></otsl>", "tables_otsl"),
        (PIPES, "prompt"),
        (f"The table:\n{HTML}\nDone.", "prompt"),
    ],
)
def test_tables_of_every_format(text: str, task: str) -> None:
    assert [table.texts() for table in tables_in(turn(text, task))] == [ROWS]


def test_an_answer_that_was_stopped_has_its_complete_rows() -> None:
    cut = HTML[: HTML.index("</tbody>")] + "<tr><td>Ink</td><td>4"
    assert [table.texts() for table in tables_in(turn(cut, "tables_html", "cancelled"))] == [ROWS]


def test_text_has_no_tables() -> None:
    assert tables_in(turn("a | b")) == [] and tables_in(turn("It says <tab>.")) == []
    assert tables_in(turn("nonsense", "tables_html")) == []


def test_several_pipe_tables_with_ragged_rows() -> None:
    text = "| a | b |\n|---|---|\n| 1 |\n| 2 | 3 | 4 |\n\n| c |\n|---|\n| **5** |\n"
    assert [table.texts() for table in markdown_tables(text)] == [
        [["a", "b"], ["1", ""], ["2", "3"]],
        [["c"], ["**5**"]],
    ]


def test_fields_are_a_row_each() -> None:
    value = {"total": "9.50", "tax": None, "paid": True, "items": [{"name": "Ink", "n": 2}], "none": [], "": 1}
    assert fields_table(value).texts() == [
        ["field", "value"],
        ["total", "9.50"],
        ["tax", ""],
        ["paid", "true"],
        ["items[0].name", "Ink"],
        ["items[0].n", "2"],
        ["none", "[]"],
        ["value", "1"],
    ]


def test_the_last_table_is_copied() -> None:
    turns = [turn(HTML, "tables_html"), turn("It is 12.")]
    text, what = to_copy(turns, None)
    assert list(csv.reader(io.StringIO(text))) == ROWS and what == "the last table (2 rows, 2 columns) as csv"
    assert "| Paper, A4 |" in " ".join(to_copy(turns, "md")[0].split())
    assert "Paper, A4" in json.dumps(json.loads(to_copy(turns, "json")[0]))


def test_fields_are_copied_as_their_own_json() -> None:
    turns = [turn(HTML, "tables_html"), turn('{"total": "9.50", "tax": null}', "kvp")]
    assert json.loads(to_copy(turns, "json")[0]) == {"total": "9.50", "tax": None}
    assert list(csv.reader(io.StringIO(to_copy(turns, "csv")[0]))) == [
        ["field", "value"],
        ["total", "9.50"],
        ["tax", ""],
    ]


def test_without_a_table_the_answer_is_copied() -> None:
    assert to_copy([turn("It is 12.")], None) == ("It is 12.", "the last answer")
    with pytest.raises(ChatError, match="no answer so far has a table"):
        to_copy([turn("It is 12.")], "csv")
    with pytest.raises(ChatError, match="no answer yet"):
        to_copy([], None)
