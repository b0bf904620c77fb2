"""The check that pages are read once passes, and detects a page that is read twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import page_reuse
from tests.acceptance.conftest import Ran
from tests.acceptance.page_reuse import share_problems


@pytest.mark.slow
def test_it_says_what_it_saw(model: Path, run: Callable[..., Ran]) -> None:
    arguments = ("--max-tokens", 8, "--runs", 1, "--task", "kvp", "--task", "tables_html")
    status, told, err = run(page_reuse.main, "--model", model, *arguments)
    assert (status, told["ok"], told["tasks"]) == (0, True, ["kvp", "tables_html"])
    assert told["n_encoded"] == {"together": [1, 0], "apart": [1, 1]}
    assert told["n_reused"]["together"][1] >= told["n_image"]["together"][1] > 0
    for what in ("page_s", "all_s"):
        assert set(told[what]) == {"together", "apart", "ratio"}
    assert "together 1 picture encoded" in err


def records(**changes: Any) -> list[dict[str, Any]]:
    """Returns three records of one page, with changes to the last one."""
    first = {"n_image": 100, "n_encoded": 1, "n_reused": 0, "prefill_image_s": 1.0}
    later = {"n_image": 100, "n_encoded": 0, "n_reused": 120, "prefill_image_s": 0.0}
    found = [
        {"task": f"task {i}", "text": "said", "finish_reason": "stop", "error": None, "timings": timings}
        for i, timings in enumerate((first, later, later))
    ]
    timings = {key: value for key, value in changes.items() if key in first}
    others = {key: value for key, value in changes.items() if key not in first}
    return [*found[:2], {**found[2], **others, "timings": {**later, **timings}}]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"n_encoded": 1}, "encoded [1, 0, 1] pictures"),
        ({"n_reused": 99}, "task 2 reused 99 prompt tokens"),
        ({"prefill_image_s": 0.1}, "task 2 reused 120"),
        ({"text": "other"}, "task 2 answers otherwise"),
        ({"error": "no room"}, "task 2, together: no room"),
    ],
)
def test_a_page_that_is_read_twice_is_a_broken_promise(changes: dict[str, Any], problem: str | None) -> None:
    problems = share_problems({"together": records(**changes), "apart": records()})
    assert [problem in text for text in problems] == [True] if problem else problems == []
