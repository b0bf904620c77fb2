"""Tests of automata, byte by byte."""

from __future__ import annotations

import random

import pytest

from granite4v.runtime.grammar.automaton import advance, next_bytes, start
from tests.helpers.grammars import TASKS, rule_of


@pytest.mark.parametrize("task", TASKS[1:])
def test_next_bytes_are_those_that_advance_accepts(task: str) -> None:
    for seed in range(20):
        rng, position = random.Random(seed), start(rule_of(task))
        for _ in range(30):
            found = {byte for byte in range(256) if advance(position, bytes((byte,))) is not None}
            assert next_bytes(position) == found
            following = advance(position, bytes((rng.choice([b for b in found if b < 128] or [0]),)))
            if following is None:
                break
            position = following
