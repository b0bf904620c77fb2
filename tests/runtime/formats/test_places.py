"""Tests of the places of cells and fields in an answer: the text at each place reads as the cell or field."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from granite4v.runtime.formats import Table, places, read, read_html, salvage, write
from tests.helpers.tables import LINES, ODD_TEXTS, PLAIN_TEXTS, SMALL, SMALL_HTML, SMALL_OTSL, random_table


def spans(task: str, text: str, value: Any) -> dict[Any, str]:
    return {place.key: text[place.start : place.end] for place in places(task, text, value)}


def html_text(span: str) -> str:
    assert span.endswith("<")
    return read_html(f"<table><tr><td>{span[:-1]}</td></tr></table>")[0].cells[0].text


def otsl_text(span: str) -> str:
    found = re.fullmatch(r"<(?:fcel|ecel|ched|rhed|srow)>(.*)<", span, re.DOTALL)
    assert found
    return found[1].strip()


def csv_text(span: str) -> str:
    return (next(csv.reader([span[:-1] if span[-1:] in (",", "\n") else span]), None) or [""])[0]


def json_text(span: str) -> str:
    assert span[0] == span[-1] == '"'
    return str(json.loads(span))


READ_BACK: dict[str, Callable[[str], str]] = {
    "tables_html": html_text,
    "tables_otsl": otsl_text,
    "tables_json": json_text,
    "chart2csv": csv_text,
}
FORMAT = {"tables_html": "html", "tables_otsl": "otsl", "tables_json": "json", "chart2csv": "csv"}


def check(task: str, text: str, value: Any) -> int:
    """Asserts that the answer has each cell of the value at its place, exactly once; returns the number of cells."""
    found = spans(task, text, value)
    tables = [value] if isinstance(value, Table) else value
    cells = {(t, cell.row, cell.col): cell.text for t, table in enumerate(tables) for cell in table.cells}
    assert found.keys() == cells.keys()
    assert {key: READ_BACK[task](span) for key, span in found.items()} == cells
    return len(cells)


def test_a_small_table_by_hand() -> None:
    assert spans("tables_html", SMALL_HTML, [SMALL]) == {
        (0, 0, 0): "Item<",
        (0, 0, 1): "Price<",
        (0, 1, 0): "Total<",
        (0, 2, 0): "Tea<",
        (0, 2, 1): "<",
        (0, 2, 2): "3 &lt; 4<",
    }
    assert spans("tables_otsl", SMALL_OTSL, [SMALL]) == {
        (0, 0, 0): "<ched>Item<",
        (0, 0, 1): "<ched>Price<",
        (0, 1, 0): "<srow>Total<",
        (0, 2, 0): "<rhed>Tea<",
        (0, 2, 1): "<ecel><",
        (0, 2, 2): "<fcel>3 < 4<",
    }
    text = 'a,"b ""c"""\n,1\n'
    assert spans("chart2csv", text, read("chart2csv", text)) == {
        (0, 0, 0): "a,",
        (0, 0, 1): '"b ""c"""\n',
        (0, 1, 0): ",",
        (0, 1, 1): "1\n",
    }


@pytest.mark.parametrize("task", FORMAT)
@pytest.mark.parametrize("wrap", ["{}", "```{language}\n{}\n```", "Here it is:\n```{language}\n{}\n```\nThat was it."])
def test_cells_of_random_tables(task: str, wrap: str) -> None:
    n_cells = 0
    for seed in range(60):
        text = write(random_table(seed, [*PLAIN_TEXTS, *LINES] if task != "tables_html" else ODD_TEXTS), FORMAT[task])
        if task == "tables_html" and "`" in wrap:
            answer = wrap.replace("{language}", "html").replace("{}", text)
        else:
            answer = wrap.replace("{language}", FORMAT[task]).replace("{}", text)
        if not answer.strip():
            continue
        n_cells += check(task, answer, read(task, answer))
    assert n_cells > 400


@pytest.mark.parametrize("task", ["tables_html", "tables_otsl"])
def test_tables_in_a_list_of_json_strings(task: str) -> None:
    """Characters are escaped in JSON strings, in more than one way."""
    for seed in range(60):
        written = [write(random_table(10 * seed + i, [*PLAIN_TEXTS, "𝄞", *LINES]), FORMAT[task]) for i in range(3)]
        for ascii_only in (True, False):
            text = json.dumps(written, ensure_ascii=ascii_only, indent=seed % 3 or None)
            value = read(task, text)
            assert len(value) == 3
            found, tables = spans(task, text, value), dict(enumerate(value))
            for (t, row, col), span in found.items():
                # the span's last character may be the backslash of an escape
                inner = json.loads(f'"{span}"') if not span.endswith("\\") else json.loads(f'"{span[:-1]}"') + "<"
                assert READ_BACK[task](inner) == tables[t].grid()[row][col].text
            assert len(found) == sum(len(table.cells) for table in value)


def test_tables_in_a_json_list() -> None:
    tables = [random_table(seed, PLAIN_TEXTS) for seed in range(3)]
    text = f" ```json\n{write(tables, 'json')}```"
    assert check("tables_json", text, read("tables_json", text)) == sum(len(table.cells) for table in tables)


@pytest.mark.parametrize("task", FORMAT)
def test_cells_of_answers_that_were_cut(task: str) -> None:
    n_cells = 0
    for seed in range(6):
        text = write(random_table(seed, [*PLAIN_TEXTS, *LINES], most=5), FORMAT[task])
        for n in range(len(text)):
            saved = salvage(task, text[:n])
            if saved is not None and saved.value:
                n_cells += check(task, text[:n], saved.value)
    assert n_cells > 300


def leaves(value: Any, pointer: str = "") -> dict[str, Any]:
    """Returns every text, number, literal and empty container by its JSON pointer."""
    if not isinstance(value, dict | list) or not value:
        return {pointer: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for name, item in items:
        found |= leaves(item, f"{pointer}/{str(name).replace('~', '~0').replace('/', '~1')}")
    return found


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind >= 5 or depth == 0:
        n = rng.randrange(4)
        if kind % 2:
            return [random_value(rng, depth + 1) for _ in range(n)]
        names = ["a", "b/c", "d~1", "", 'e"f', "ü", "0"]
        return {name: random_value(rng, depth + 1) for name in rng.sample(names, n)}
    return rng.choice([None, True, -12, 0.5, 1e30, "", "text", 'a "b" \\ {', "𝄞ü\n"])


@pytest.mark.parametrize("wrap", ["{}", "\n  {}\n", "```json\n{}\n```"])
def test_fields_of_random_values(wrap: str) -> None:
    n_fields = 0
    for seed in range(300):
        value = random_value(random.Random(seed))
        text = json.dumps(value, ensure_ascii=seed % 2 == 0, indent=seed % 4 or None)
        text = wrap.replace("{}", text)
        found = spans("kvp", text, read("kvp", text))
        expected = leaves(value)
        assert found.keys() == expected.keys()
        for pointer, span in found.items():
            number = isinstance(expected[pointer], int | float) and not isinstance(expected[pointer], bool)
            assert json.loads(span[:-1] if number else span) == expected[pointer]
        n_fields += len(found)
    assert n_fields > 600


def test_fields_of_an_answer_that_was_cut() -> None:
    text = '{"a": "x", "b": [1, {"c": null}, {}], "d": 12}'
    for n in range(len(text)):
        saved = salvage("kvp", text[:n])
        if saved is not None:
            found = spans("kvp", text[:n], saved.value)
            assert {key for key, value in leaves(saved.value).items() if value not in ({}, [])} <= found.keys()
            assert found.keys() <= leaves(saved.value).keys()


def test_of_a_key_given_twice_the_last_counts() -> None:
    text = '{"a": {"b": 1}, "a": 2}'
    assert spans("kvp", text, read("kvp", text)) == {"/a": "2}"}
    text = '{"a": 1, "a": {"b": "2"}}'
    assert spans("kvp", text, read("kvp", text)) == {"/a/b": '"2"'}


def test_prose_and_code_are_one_place() -> None:
    assert spans("chart2summary", " It rose. ", "It rose.") == {"": " It rose. "}
    assert spans("prompt", "x", "x") == {"": "x"}


def test_an_unknown_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown task"):
        places("tables_xml", "", [])
