"""Tests of tables in every format: they are read back as written, and keep their first rows when they are cut."""

from __future__ import annotations

import contextlib
import json
import random
import re

import pytest

from granite4v.errors import AnswerError
from granite4v.runtime.formats import (
    FORMATS,
    TASKS,
    Cell,
    Table,
    read,
    read_html,
    read_otsl,
    read_tables_json,
    salvage,
    write,
    write_csv,
    write_html,
    write_otsl,
    write_tables_json,
)
from tests.helpers.tables import (
    LINES,
    ODD_TEXTS,
    SMALL,
    SMALL_HTML,
    SMALL_OTSL,
    carried_by_otsl,
    first_rows,
    random_table,
)


def test_a_small_table_in_every_format() -> None:
    assert write(SMALL, "otsl") == SMALL_OTSL
    assert write(SMALL, "html") == SMALL_HTML
    assert write(SMALL, "csv") == "Item,Price,Price\nTotal,Total,Total\nTea,,3 < 4"
    assert write(SMALL, "markdown") == (
        "| Item | Price | Price |\n| --- | --- | --- |\n| Total | Total | Total |\n| Tea |  | 3 < 4 |"
    )
    found = json.loads(write(SMALL, "json"))
    assert found["dimensions"] == {"rows": 2, "columns": 3, "header_rows": 1, "total_rows": 3}
    assert found["cells"][1] == {
        "row": 1, "col": 2, "colspan": 2, "rowspan": 1, "type": "header", "header_level": 1, "content": "Price",
    }  # fmt: skip


def test_tables_come_back_as_written() -> None:
    for seed in range(300):
        table = random_table(seed, ODD_TEXTS)
        assert read_tables_json(write_tables_json(table)) == [table]
        assert read_html(write_html(table)) == [table]
        if carried_by_otsl(table):
            assert read_otsl(write_otsl(table)) == [table]
        with_lines = random_table(seed, [*ODD_TEXTS, *LINES])
        assert read_html(write_html(with_lines)) == [with_lines]
        assert read_tables_json(write_tables_json(with_lines)) == [with_lines]
        if carried_by_otsl(with_lines):
            assert read_otsl(write_otsl(with_lines)) == [with_lines]


@pytest.mark.parametrize("form", ["otsl", "html", "json"])
@pytest.mark.parametrize("n_tables", [0, 1, 3])
def test_several_tables_come_back_as_written(form: str, n_tables: int) -> None:
    tables = [table for table in (random_table(seed, ODD_TEXTS) for seed in range(50)) if carried_by_otsl(table)]
    if form == "html" and not n_tables:
        return  # no text at all
    assert read(f"<tables_{form}>", write(tables[:n_tables], form)) == tables[:n_tables]


def test_an_unknown_task_or_format_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"unknown task 'x'; known: {', '.join(TASKS)}."):
        read("x", "")
    with pytest.raises(ValueError, match=f"unknown format 'x'; known: {', '.join(FORMATS)}."):
        write(SMALL, "x")


def assert_prefix(found: Table, truth: Table) -> None:
    assert found.texts() == first_rows(truth, found.n_rows)
    assert found.n_cols == truth.n_cols
    assert found.n_header_rows == min(truth.n_header_rows, found.n_rows)
    assert [cell.header for cell in found.cells] == [cell.header for cell in truth.cells if cell.row < found.n_rows]


@pytest.mark.parametrize("form", ["otsl", "html", "json", "otsl strings", "html strings"])
def test_every_beginning_of_tables_gives_their_first_rows(form: str) -> None:
    form, _, strings = form.partition(" ")
    for seed in range(8):
        candidates = (random_table(1000 * seed + k, ODD_TEXTS, most=5) for k in range(50))
        tables = [table for table in candidates if carried_by_otsl(table)][: 1 + seed % 3]
        text = (
            json.dumps([write(one, form) for one in tables])
            if strings
            else write(tables if seed % 2 else tables[0], form)
        )
        tables = read(f"tables_{form}", text)
        n_before = 0
        for end in range(len(text) + 1):
            found = salvage(f"tables_{form}", text[:end])
            if found is None:
                assert not n_before
                continue
            for one, truth in zip(found.value, tables, strict=False):
                assert_prefix(one, truth)
            assert all(one.n_rows == truth.n_rows for one, truth in list(zip(found.value, tables, strict=False))[:-1])
            n_rows = sum(one.n_rows for one in found.value)
            assert n_rows >= n_before
            n_before = n_rows
            if form != "html":  # HTML does not show that another table was to follow
                assert found.cut == (end < len(text))
            assert read(f"tables_{form}", write(found.value, form)) == found.value
        assert found is not None
        assert (found.value, found.cut) == (tables, False)


def test_rows_are_kept_as_soon_as_they_are_complete() -> None:
    for form, last in (("otsl", "<nl>"), ("html", "</tr>"), ("json", "}")):
        text = write(SMALL, form)
        for i, n_rows in enumerate([1, 2, 3] if form != "json" else []):
            ends = [found.end() for found in re.finditer(re.escape(last), text)]
            kept, before = salvage(f"tables_{form}", text[: ends[i]]), salvage(f"tables_{form}", text[: ends[i] - 1])
            assert kept is not None
            assert kept.value[0].n_rows == n_rows
            assert (before.value[0].n_rows if before else 0) == n_rows - 1
    text = write_tables_json(SMALL)
    kept = salvage("tables_json", text[: text.index("Tea")])
    assert kept is not None
    assert first_rows(kept.value[0], 9) == first_rows(SMALL, 2)


def test_spans_of_long_tables_are_read() -> None:
    wide = read_otsl("<otsl>" + "<fcel>" * 8000 + "<nl>" + "<ucel>" * 8000 + "<nl></otsl>")[0]
    assert (wide.n_rows, wide.n_cols, len(wide.cells)) == (2, 8000, 8000)
    assert {cell.rowspan for cell in wide.cells} == {2}
    tall = read_html("<table><tr><td rowspan=12000>x<td>y" + "<tr><td>z" * 11_999 + "</table>")[0]
    assert (tall.n_rows, tall.n_cols, tall.cells[0].rowspan) == (12_000, 2, 12_000)
    begun = '{"dimensions": {"columns": 1}, "cells": [{"row": 1, "col": 1, "content": "a", "rowspan": 900000}'
    found = salvage("tables_json", begun + ', {"row": 900001, "col": 1, "content": "b"}' * 1500)
    assert found is not None
    assert [(table.n_rows, len(table.cells)) for table in found.value] == [(900_000, 1)]


@pytest.mark.parametrize("form", ["csv", "markdown"])
def test_repeated_texts_are_bounded(form: str) -> None:
    table = Table(1000, 1000, 0, (Cell(0, 0, "x" * 60, 1000, 1000),))
    with pytest.raises(AnswerError, match=r"^a table that has 60,000,000 characters when cells repeat their text in "):
        write(table, form)
    assert read_html(write_html(table)) == [table]


@pytest.mark.parametrize(
    ("task", "text", "rows"),
    [
        ("tables_otsl", "<otsl><fcel>a<fcel>b<nl><fcel>c<nl><fcel>d<fcel>e<nl></otsl>", [["a", "b"]]),
        ("tables_html", "<table><tr><td>a</td></tr><tr><td>b</td><td>c</td></tr></table>", [["a"]]),
        ("tables_json", '{"dimensions": {"columns": 1}, "cells": [{"row": 1, "col": 1, "content": "a"}, 7]}', [["a"]]),
    ],
)
def test_an_answer_that_is_wrong_in_the_middle_is_kept_up_to_there(task: str, text: str, rows: list[list[str]]) -> None:
    found = salvage(task, text)
    assert found is not None
    assert found.cut
    assert [table.texts() for table in found.value] == [rows]


PIECES = ["", *'<>"[]{},', "\n", "```", "\\", "\0", "<nl>", "<xcel>", "</tr>", "<table>", "-1", "9e9", "null"]
FORM = {"chart2csv": "csv", "tables_html": "html", "tables_json": "json", "tables_otsl": "otsl"}


def test_damaged_answers_raise_answer_error_and_salvaged_ones_can_be_written() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        table = random_table(seed, ODD_TEXTS, most=4)
        texts = {"tables_otsl": write_otsl(table), "tables_html": write_html(table), "chart2csv": write_csv(table)}
        texts["tables_json"] = texts["kvp"] = write_tables_json(table)
        for task, text in texts.items():
            for _ in range(20):
                damaged = text
                for _ in range(rng.randint(1, 4)):
                    at, n_lost = rng.randint(0, len(damaged)), rng.randint(0, 12)
                    damaged = damaged[:at] + rng.choice(PIECES) + damaged[at + n_lost :]
                with contextlib.suppress(AnswerError):
                    read(task, damaged)
                found = salvage(task, damaged)
                if found is not None and task != "kvp":
                    assert read(task, write(found.value, FORM[task])) is not None
