"""Tests of the regular expressions of schemas: their size, lookarounds, and the time that matching takes."""

from __future__ import annotations

import pytest

from granite4v.runtime.grammar.json_schema import read_schema
from granite4v.runtime.grammar.patterns import matches, pattern_problem, pattern_size, without_look_around
from granite4v.runtime.grammar.validation import Validator


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("abc", 3), ("[a-z]{5}", 5), ("(ab){3}c", 7), ("((a{10}){10}){10}", 1000), (r"\d{2,4}x*", 6), ("a{3,}", 3),
        (r"[(){9}]{2}", 2), (r"\({3}", 3), ("(a|bc){2}", 8), ("", 0),
    ],
)  # fmt: skip
def test_the_size_of_a_pattern_with_its_counts_written_out(pattern: str, size: int) -> None:
    assert pattern_size(pattern) == size


@pytest.mark.parametrize(
    ("pattern", "looser"),
    [
        ("^(?=x)ab$", "^ab$"), ("a(?!b(c)d)e", "ae"), (r"(?<!\()x", "x"), ("(?<=[)])x", "x"), ("(?:a)(?<n>b)", None),
        (r"\(?=x", None), ("[(?=a]", None), ("(?=a(?!b)c)d", "d"),
    ],
)  # fmt: skip
def test_a_pattern_without_its_look_around_matches_more(pattern: str, looser: str | None) -> None:
    assert without_look_around(pattern) == (pattern if looser is None else looser)


def test_patterns_that_backtrack_without_end_are_given_up() -> None:
    problem = Validator(read_schema({"type": "string", "pattern": "(a|aa)+b$"})).problem("a" * 80)
    assert problem is not None and "takes more than a second" in problem


def test_patterns_of_ecma_that_python_spells_in_another_way() -> None:
    for pattern, text in ((r"^\u{1F600}$", "\U0001f600"), (r"^\cJ$", "\n"), ("^[^]$", "\n"), (r"^(?<y>a)\k<y>$", "aa")):
        assert pattern_problem(pattern) == "" and matches(pattern, text)
        assert not matches(pattern, "zz")
