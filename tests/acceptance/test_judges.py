"""The judges distinguish valid answers from invalid ones."""

from __future__ import annotations

import json

import pytest

from tests.acceptance.judges import has_whole_row, judge, relaxed
from tests.acceptance.schemas import SCHEMAS

FLAT = {"invoice_number": "1", "date": "d", "total": "t"}


def cells(*placed: tuple[int, int, int, int], rows: int = 2, columns: int = 2) -> str:
    keys = ("row", "col", "rowspan", "colspan")
    found = [{**dict(zip(keys, one, strict=True)), "type": "data", "header_level": 0, "content": "x"} for one in placed]
    size = {"rows": rows, "columns": columns, "header_rows": 0, "total_rows": rows}
    return json.dumps({"dimensions": size, "cells": found})


@pytest.mark.parametrize(
    ("task", "text", "valid"),
    [
        ("tables_otsl", "<otsl><ched>p<lcel><nl><fcel>a < 5<ecel><nl></otsl>", True),
        ("tables_otsl", "[<otsl><ecel><nl></otsl>, <otsl><ecel><nl></otsl>]", True),
        ("tables_otsl", "[]", True),
        ("tables_otsl", "", False),
        ("tables_otsl", "<otsl><ecel><nl>", False),
        ("tables_otsl", "<otsl><ecel><nl></otsl> and more", False),
        ("tables_otsl", "<otsl><fcel>a<fcel>b<nl><fcel>c<nl></otsl>", False),
        ("tables_html", "<table><thead><tr><th>a<br>&lt;</th></tr></thead><tr><td>5 < 6</td></tr></table>", True),
        ("tables_html", '<table><tr><td rowspan="2">a</td><td>b</td></tr><tr><td>c</td></tr></table>', True),
        ("tables_html", '<table><tr><td rowspan="2">a</td><td>b</td></tr></table>', False),
        ("tables_html", "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", False),
        ("tables_html", "<table><tr><td>a</tr></table>", False),
        ("tables_html", "<table></table>", False),
        ("tables_json", cells((1, 1, 2, 1), (1, 2, 1, 1), (2, 2, 1, 1)), True),
        ("tables_json", cells((1, 1, 2, 1), (1, 2, 1, 1)), False),
        ("tables_json", cells((1, 1, 2, 2), (1, 2, 1, 1)), False),
        ("tables_json", cells((1, 1, 3, 2)), False),
        ("tables_json", '{"cells": []}', False),
        ("chart2csv", 'a,b\n"1,5",2\n', True),
        ("chart2csv", "```csv\na,b\n1,2\n```", True),
        ("chart2csv", "a,b\n1\n", False),
        ("chart2csv", "", False),
        ("kvp", json.dumps(FLAT), True),
        ("kvp", "{", False),
        ("kvp", '"half a pair: \ud83d"', False),
    ],
)  # fmt: skip
def test_judges(task: str, text: str, valid: bool) -> None:
    problem = judge(task, text, SCHEMAS["flat"] if task == "kvp" else None)
    assert (problem is None) == valid, problem


def test_formats_are_judged() -> None:
    schema = {"type": "string", "format": "ipv4"}
    assert judge("kvp", '"1.2.3.4"', schema) is None
    assert "is not a 'ipv4'" in (judge("kvp", '"1.2.3.400"', schema) or "")


def test_a_relaxed_schema_forgives_what_is_missing_alone() -> None:
    schema = relaxed(SCHEMAS["items"])
    assert judge("kvp", '{"items": []}', schema) is judge("kvp", '{"items": [{"price": 1}]}', schema) is None
    assert judge("kvp", '{"items": [{"price": "1"}]}', schema) is not None
    assert relaxed({"properties": {"required": {"type": "string"}}}) == {"properties": {"required": {"type": "string"}}}
    assert judge("kvp", "{}", relaxed(SCHEMAS["one of three"])) is None
    assert SCHEMAS["items"]["required"] == ["items"]


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("tables_html", "<table><tr><td>a</td></tr><tr>", True),
        ("tables_html", "<table><tr><td>a</td>", False),
        ("chart2csv", "a,b\n1,2\n3", True),
        ("chart2csv", "a,b\n1", False),
        ("chart2csv", 'a,"b\n\n', False),
        ("tables_json", cells((1, 1, 2, 2)), False),
    ],
)
def test_rows_that_are_certainly_whole(task: str, text: str, expected: bool) -> None:
    assert has_whole_row(task, text) == expected
