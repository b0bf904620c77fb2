"""The check of a server under load passes with small numbers, and detects errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.acceptance import requests
from tests.acceptance.questions import Question, bad_questions, good_questions
from tests.acceptance.requests import Seen, answered, middle, refused
from tests.helpers.serving import Server


@pytest.mark.slow
def test_it_says_what_it_saw(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--requests", "60", "--from-request", "30", "--documents", "1", "--tolerance", "5")
    status = requests.main(["--model", str(model), *arguments])
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert (status, told["ok"], told["requests"]) == (0, True, 60), err
    outcomes = told["outcomes"]
    assert outcomes["answered"] + outcomes["hung up"] + outcomes["refused"] == 60


@pytest.mark.slow
def test_another_answer_and_a_refusal_without_a_reason_are_noticed(model: Path) -> None:
    good, bad, seen = good_questions(1, 0)[0], bad_questions()[0], Seen()
    with Server("--model", str(model)) as server:
        answered(server.port, good, {good.name: "something else"}, seen)
        answered(server.port, bad, {bad.name: "an answer"}, seen)
        refused(server.port, Question("fine", good.path, good.body, method="GET", headers={}, status=400), seen)
        assert len(seen.problems) == 3
        refused(server.port, bad, seen)
        assert len(seen.problems) == 3 and seen.outcomes == {"answered": 2, "refused": 2}


def test_memory_around_a_request_is_the_middle_of_samples() -> None:
    samples = [float(i) for i in range(80)]
    assert middle(samples, 200) == 5.5 and middle(samples, 2000) == 77.5 and middle(samples, 25) == 0
