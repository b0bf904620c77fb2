"""The measurement of a chat's follow-up question: what it asks, and its ratios."""

from __future__ import annotations

import json

import pytest

from granite4v.default_model import embedded_model
from scripts import chat_follow_up


def test_no_question_but_the_first_reads_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    chat_follow_up.main([str(embedded_model(str)), "--runs", "1", "--max-tokens", "4"])
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [told["prompts"][name]["n_encoded"] for name in chat_follow_up.QUESTIONS] == [1, 0, 0, 0]
    assert all(told["prompts"][name]["n_reused"] > 0 for name in ("follow_up", "after_undo", "task"))
    assert set(told["ratio"]) == {"follow_up", "after_undo", "task"}


def test_ratios_by_hand() -> None:
    def run(first: float, others: float) -> dict[str, dict[str, float]]:
        counts = {"n_prompt": 9, "n_reused": 8, "n_encoded": 0}
        return {
            name: {"first_token_s": first if name == "first" else others, **counts} for name in chat_follow_up.QUESTIONS
        }

    told = chat_follow_up.summary([run(10.0, 1.0), run(20.0, 0.2), run(40.0, 0.4)])
    assert told["ratio"] == {"follow_up": 0.02, "after_undo": 0.02, "task": 0.02}
    assert told["first_token_s"]["first"] == {"median": 20.0, "range": [10.0, 40.0]}
