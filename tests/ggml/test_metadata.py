"""Typed access to metadata: what each accessor accepts, and its message for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from granite4v.errors import ModelFileError
from granite4v.ggml.metadata import GgufMetadata


def of(value: Any) -> GgufMetadata:
    return GgufMetadata("model.gguf", {"key": value})


TAKEN: list[tuple[Callable[[GgufMetadata], Any], Any, Any]] = [
    (lambda m: m.integer("key", 1, 8), 8, 8),
    (lambda m: m.number("key", 0, 1), 0.5, 0.5),
    (lambda m: m.number("key", 0, 1), 1, 1.0),
    (lambda m: m.number("key", 0, 1), "0.00392156862745098", 0.00392156862745098),
    (lambda m: m.text("key"), "", ""),
    (lambda m: m.flag("key"), False, False),
    (lambda m: m.integers("key", -1, 3), [-1, 3], [-1, 3]),
    (lambda m: m.numbers("key", 2, 0, 1), [0, 0.5], [0.0, 0.5]),
    (lambda m: m.texts("key"), ["a", ""], ["a", ""]),
    (lambda m: m.integer("absent", 1, 8, 7), 1, 7),
    (lambda m: m.text("absent", None), 1, None),
    (lambda m: m.integers("absent", 1, 8, []), 1, []),
]


def test_a_value_within_its_bounds_is_returned() -> None:
    for accessor, value, expected in TAKEN:
        assert accessor(of(value)) == expected, value


REFUSED: list[tuple[Callable[[GgufMetadata], Any], tuple[Any, ...], str]] = [
    (lambda m: m.integer("key", 1, 8), (0, 9, -1, True, 1.0, "1", [1], math.nan, 1 << 70), "an integer from 1 to 8"),
    (lambda m: m.number("key", 0, 1), (-0.1, 2, math.nan, math.inf, True, "x", "nan", [0.5], 10**400), "from 0 to 1"),
    (lambda m: m.text("key"), (1, ["a"], False), "expected text"),
    (lambda m: m.flag("key"), (1, 0, "true"), "expected true or false"),
    (lambda m: m.integers("key", 0, 3), ([], 1, "12", [1, 4], [1.0], [True], ["1"]), "a list of 1 to"),
    (lambda m: m.integers("key", 0, 3, max_length=2), ([1, 1, 1],), "a list of 1 to 2 integers from 0 to 3"),
    (lambda m: m.numbers("key", 2, 0, 1), ([0.5], [0, 0, 0], 1, [0, 2], [0, math.nan]), "a list of 2 numbers"),
    (lambda m: m.texts("key"), ("a", [1], [b"a"]), "expected a list of texts"),
]


@pytest.mark.parametrize(("accessor", "values", "expected"), REFUSED, ids=[expected for *_, expected in REFUSED])
def test_everything_else_is_refused_by_name(
    accessor: Callable[[GgufMetadata], Any], values: tuple[Any, ...], expected: str
) -> None:
    for value in values:
        with pytest.raises(ModelFileError) as caught:
            accessor(of(value))
        message = str(caught.value)
        assert message.startswith("'model.gguf': 'key' ") and expected in message and "granite4v convert" in message
        assert len(message) < 300


def test_a_missing_key_says_what_was_expected() -> None:
    with pytest.raises(
        ModelFileError, match=r"'model.gguf' has no key 'absent'; convert it again .* \(expected an int"
    ):
        of(1).integer("absent", 1, 8)
