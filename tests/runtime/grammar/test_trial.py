"""Tests of trials: grammars that would keep llguidance busy are tried in a child process, for a limited time."""

from __future__ import annotations

import pytest

from granite4v.runtime.grammar import json_schema, trial
from granite4v.runtime.grammar.trial import Trials
from tests.helpers.schemas import kvp, of


def test_what_keeps_llguidance_busy_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 1)
    patterns = [{"pattern": f".*{i % 10}.{{{i + 5}}}"} for i in range(30)]
    grammar = kvp(of(["a"], a={"type": "string", "allOf": patterns}))
    (warning,) = grammar.warnings
    assert warning.startswith(
        "'pattern' at '$.a' cannot be enforced during generation together with the others; the answer"
    )


def test_a_trial_that_takes_too_long_is_stopped_and_later_ones_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 1)
    hanging = {"allOf": [{"type": "string", "pattern": f".*{i % 10}.{{{i + 5}}}"} for i in range(30)]}
    with Trials() as trials:
        assert trials.problem({"type": "string", "pattern": "^a$"}, costly=True) == ""
        assert trials.problem(hanging, costly=True) == "compiling it takes too much time or memory"
        assert trials.problem({"type": "string", "pattern": "^b$"}, costly=True) == ""
        assert "backreferences" in trials.problem({"type": "string", "pattern": r"(.)\1"}, costly=True)
    monkeypatch.setattr(trial, "MAX_SECONDS", 1)
    with Trials() as trials:
        assert "too much time" in trials.problem(hanging, costly=True)
        assert trials.problem({"type": "string", "pattern": "^c$"}, costly=True).startswith("it was not tried")


def test_without_a_process_what_looks_costly_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "")
    grammar = kvp(of(["a"], a={"type": "string", "pattern": "^a{5000}$"}))
    assert "could not be tried: there is no Python executable" in grammar.warnings[0]


def test_many_warnings_are_cut() -> None:
    schema = of([], **{f"p{i}": {"type": "string", "format": f"f{i}"} for i in range(30)})
    assert len(kvp(schema).warnings) == 21 and kvp(schema).warnings[-1] == "10 more warnings are not shown."


def test_messages_name_the_limits_as_they_are() -> None:
    assert (json_schema.MAX_SUBSCHEMAS, json_schema.MAX_LEVELS, json_schema.MAX_NESTING) == (5000, 80, 200)
