"""The check of interrupted batches passes with small numbers, and detects wrong records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance import interrupts
from tests.acceptance.conftest import Ran
from tests.acceptance.harness import Json
from tests.acceptance.interrupts import strangers


@pytest.mark.slow
def test_it_says_what_it_saw(side_by_side: Path, run: Callable[..., Ran]) -> None:
    # a loaded machine may exceed the promised time
    arguments = ("--pages", 6, "--interrupts", 2, "--max-tokens", 40, "--within", 30, "--parallel", 3)
    status, told, err = run(interrupts.main, "--model", side_by_side, *arguments)
    assert (status, told["check"], told["ok"], told["broken"]) == (0, "interrupts", True, [])
    assert told["pages"] == 6 and told["records"] == 21 and len(told["kept"]) == 2 and told["ended_s"]
    assert "interrupts: ok" in err


def record(page: int, text: str = "a") -> Json:
    return {"source": "x", "page": page, "task": "kvp", "text": text}


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([], None),
        ([record(1), record(3)], None),
        ([record(3), record(1)], "out of order"),
        ([record(1), record(1)], "twice"),
        ([record(2, "b")], "differs in text"),
        ([record(4)], "has not"),
    ],
)
def test_what_may_be_on_the_disk(found: list[Json], problem: str | None) -> None:
    problems = strangers([record(1), record(2), record(3)], found)
    assert problems == [] if problem is None else problem in problems[0]
