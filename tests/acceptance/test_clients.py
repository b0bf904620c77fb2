"""The check of third-party clients passes with curl, which needs no environment, and detects a wrong answer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.acceptance.clients.__main__ import Check, grid, judge, main
from tests.acceptance.harness import Result
from tests.helpers.nano_truths import TABLE


@pytest.mark.slow
def test_curl_gets_the_right_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curl"]) == 0
    assert json.loads(capsys.readouterr().out) == {"check": "clients", "ok": True, "curl": 6, "broken": []}


def test_a_wrong_answer_and_a_client_that_fails_break_the_promise() -> None:
    def checks() -> Iterator[Check]:
        yield "one", "a", "a"
        yield "two", "a", "b"
        raise RuntimeError("status 1: no route")

    result = Result("clients")
    judge(result, "curl", checks())
    assert result.figures == {"curl": 1}
    assert result.broken == ["curl, two: 'a' instead of 'b'", "curl: RuntimeError: status 1: no route"]


def test_a_grid_repeats_cells_that_span() -> None:
    assert grid(TABLE) == [
        ["", "Price & tax", "Price & tax"],
        ["", "Net", ""],
        ["A <b>", "12.00", "12.00"],
        ["", "12.00", "12.00"],
    ]
