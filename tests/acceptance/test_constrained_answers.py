"""The check of constrained answers passes with small numbers, and detects invalid answers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from granite4v.runtime.formats.task_grammar import grammar_for
from tests.acceptance import constrained_answers
from tests.acceptance.answering import TASKS, Case, Said, Talker, case_of
from tests.acceptance.conftest import Ran
from tests.acceptance.constrained_answers import verdict
from tests.acceptance.schemas import SCHEMAS


@pytest.mark.slow
def test_it_says_what_it_saw(model: Path, run: Callable[..., Ran]) -> None:
    status, told, err = run(constrained_answers.main, "--model", model, "--generations", 16, "--max-tokens", 120)
    assert (status, told["ok"], told["generations"], told["broken"]) == (0, True, 16, [])
    assert set(told["tasks"]) == set(TASKS) and told["schemas"] == len(SCHEMAS) >= 20
    for one in (*told["tasks"].values(), told["all"]):
        kinds = ("finished", "closed", "repetition", "cut", "broken")
        assert one["n"] == sum(one[kind] for kind in kinds) and one["valid"] <= one["n"]
    assert told["all"]["n"] == 16 and told["all"]["finished"] > 0
    assert "constrained_answers: kvp              8:" in err


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_every_schema_is_one_that_answers_can_be_held_to(name: str) -> None:
    assert grammar_for("kvp", SCHEMAS[name]) is not None


def test_a_generation_can_be_repeated() -> None:
    cases = [case_of(number, 5, 300) for number in range(len(SCHEMAS) * 2)]
    assert cases == [case_of(number, 5, 300) for number in range(len(SCHEMAS) * 2)]
    assert {case.schema for case in cases if case.task == "kvp"} == set(SCHEMAS)
    assert {case.max_tokens < 300 for case in cases} == {case.fast_forward for case in cases} == {True, False}


KVP = Case(0, "kvp", "flat", 1, 50, True)
OTSL = replace(KVP, task="tables_otsl", schema=None)
FLAT = {"invoice_number": "1", "date": "d", "total": "t"}


def said_to(text: str, finish_reason: str, **more: Any) -> Said:
    return Said(text=text, finish_reason=finish_reason, **{"n_tokens": 50, **more})


@pytest.mark.parametrize(
    ("case", "said", "kind", "problem"),
    [
        (KVP, said_to(json.dumps(FLAT), "stop", valid=True, written=json.dumps(FLAT)), "finished", None),
        (KVP, said_to(json.dumps(FLAT), "stop", n_tokens=51, valid=True), "broken", "has 51 tokens"),
        (KVP, said_to(json.dumps(FLAT), "stop", valid=False), "broken", "taken for one that is not"),
        (KVP, said_to('{"date": 1}', "stop", valid=True), "broken", "a finished answer is not valid"),
        (KVP, said_to("", "cancelled"), "broken", "ended as 'cancelled'"),
        (KVP, said_to(json.dumps(FLAT), "length", closing='", "total": "t"}'), "closed", None),
        (KVP, said_to('{"date": "x"}', "length", closing='"}'), "broken", "brought to an end is not valid"),
        (KVP, said_to('{"date": "x", "to', "length", n_least=60, written='{"date": "x"}'), "cut", None),
        (KVP, said_to('{"date": "x", "to', "length", n_least=40), "broken", "a whole one has 40"),
        (KVP, said_to('{"date": "x", "to', "repetition", written='{"date": "x"}'), "repetition", None),
        (KVP, said_to('{"date": 1, "to', "length", n_least=60, written='{"date": 1}'), "broken", "what was kept"),
        (KVP, said_to('{"da', "length", n_least=60), "cut", None),
        (KVP, Said(error="no answer after 3 s"), "broken", "no answer after 3 s"),
        (OTSL, said_to("<otsl><fcel>a<nl><fc", "length", n_least=60), "broken", "whole rows were lost"),
        (OTSL, said_to("<otsl><fcel>a<nl></otsl>", "length", closing="<nl></otsl>"), "closed", None),
        (OTSL, said_to("<otsl><fcel>a", "length", n_least=60), "cut", None),
    ],
)
def test_verdicts(case: Case, said: Said, kind: str, problem: str | None) -> None:
    found = verdict(case, said)
    assert found[0] == kind
    assert problem in (found[1] or "") if problem else found[1] is None


def serve_badly(pipe: Connection, what: str) -> None:
    pipe.send("ready")
    case = pipe.recv()
    if what == "hang":
        time.sleep(60)
    if what == "die" and case.number == 1:
        os._exit(3)
    pipe.send(Said(text=f"said {case.number}"))


@pytest.mark.slow
def test_what_hangs_or_dies_is_noticed_and_the_next_ones_still_come() -> None:
    with Talker(("hang",), serve_badly) as talker:
        assert talker.ask(KVP, 0.2) == Said(error="no answer after 0.2 s")
    with Talker(("die",), serve_badly) as talker:
        assert talker.ask(replace(KVP, number=1), 20) == Said(error="the process died with status 3")
        assert talker.ask(replace(KVP, number=2), 20) == Said(text="said 2")


@pytest.mark.slow
def test_an_answer_that_is_not_held_to_its_form_is_a_broken_promise(
    model: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.setattr(Talker, "ask", lambda self, case, timeout_s: Said("<otsl>", "stop", 3, valid=True))
    status, told, err = run(constrained_answers.main, "--model", model, "--generations", 2, "--first", 1, "--seed", 7)
    assert (status, told["all"]["broken"]) == (1, 2)
    assert "again with --seed 7 --max-tokens 500 --first 1 --generations 1" in err
