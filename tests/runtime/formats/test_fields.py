"""Tests of the fields of a key-value prompt: limits of their JSON, and what is kept of a cut answer."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from granite4v.runtime.formats import Salvaged, read, salvage
from granite4v.runtime.formats.json_prefix import read_prefix
from granite4v.runtime.formats.json_values import MAX_NESTING
from tests.helpers.tables import LINES, ODD_TEXTS, assert_error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"x"', "the answer is 'x'; expected a JSON object."),
        ('{"a": NaN}', "JSON that cannot be read: it contains NaN, which is not JSON; expected ordinary numbers."),
        ('{"a": 1e400}',
         "JSON that cannot be read: it contains the number 1e400, which is larger than a double can be; expected "
         "ordinary numbers."),
        ('{"a": ' + "1" * 10_000 + "}",
         "JSON that cannot be read: it contains an integer of 10,000 digits, more than 1,000; expected ordinary "
         "numbers."),
        ("[" * 65 + "]" * 65, "JSON nested deeper than 64 levels; expected a few."),
        ('{"a": ' * 600 + "1" + "}" * 600, "JSON nested deeper than 64 levels; expected a few."),
        ("[" * 100_000 + "]" * 100_000, "JSON nested deeper than 64 levels; expected a few."),
        ('{"a": 1} and so on',
         "invalid JSON at character 9, before 'and so on': Extra data; expected one JSON value."),
    ],
)  # fmt: skip
def test_an_invalid_answer_gives_what_was_found_where_and_what_was_expected(text: str, message: str) -> None:
    assert_error("kvp", text, message)


def is_prefix(found: Any, truth: Any) -> bool:
    if isinstance(truth, dict) and isinstance(found, dict):
        pairs = list(zip(found.items(), truth.items(), strict=False))
        same = all(a == b for a, b in pairs[:-1]) and len(found) <= len(truth)
        return same and all(a[0] == b[0] and is_prefix(a[1], b[1]) for a, b in pairs[-1:])
    if isinstance(truth, list) and isinstance(found, list):
        last = list(zip(found, truth, strict=False))[-1:]
        same = found[:-1] == truth[: max(0, len(found) - 1)] and len(found) <= len(truth)
        return same and all(is_prefix(a, b) for a, b in last)
    return type(found) is type(truth) and bool(found == truth)


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind >= 6:
        items = [random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        return items if kind == 6 else {f'k{k} \\ "': item for k, item in enumerate(items)}
    return [
        None,
        True,
        False,
        rng.randint(-100, 100),
        rng.uniform(-1e9, 1e9),
        rng.choice([*ODD_TEXTS, *LINES, "", "😀"]),
    ][kind]


def test_every_beginning_of_fields_gives_the_first_fields() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        value = {f"field {k}": random_value(rng, 3) for k in range(rng.randint(1, 5))}
        text = json.dumps(value, ensure_ascii=seed % 2 == 0, indent=2 if seed % 3 == 0 else None)
        for end in range(len(text) + 1):
            found = salvage("kvp", text[:end])
            if found is not None:
                assert is_prefix(found.value, value), text[:end]
                assert found.value
                assert found.cut == (end < len(text))
                assert json.loads(json.dumps(found.value)) == found.value
        assert found is not None
        assert found.value == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 12', None),
        ('{"a": 12,', {"a": 12}),
        ('{"a": tru', None),
        ('{"a": "x", "b": "y', {"a": "x"}),
        ('{"a": "x", "b": [1, {"c": 2, "d": {', {"a": "x", "b": [1, {"c": 2}]}),
        ('{"a": "x", "b": [{', {"a": "x"}),
        ('```json\n{"a": "x", "b"', {"a": "x"}),
        ('{"a": 1, b: 2}', {"a": 1}),  # invalid in the middle
        ("{", None),
        ("", None),
        ("sorry", None),
        ("null", None),
        ('"x"', None),
    ],
)
def test_fields_are_kept_up_to_the_last_complete_one(text: str, expected: Any) -> None:
    found = salvage("kvp", text)
    assert (found.value if found else None) == expected
    assert found is None or found.cut


def test_deep_nesting_does_not_crash() -> None:
    assert salvage("kvp", "[" * 200_000) is None
    assert salvage("kvp", '{"a": [1, 2], "b": ' + "[" * 200_000) == Salvaged({"a": [1, 2]}, True)
    found = read_prefix("[1," * 50_000)
    assert len(found.unclosed) == MAX_NESTING and found.end == 3 * MAX_NESTING - 1


@pytest.mark.parametrize("levels", [MAX_NESTING - 1, MAX_NESTING])
def test_values_up_to_the_nesting_limit_are_read(levels: int) -> None:
    text = '{"a": ' * levels + "1" + "}" * levels
    assert read("kvp", text) == json.loads(text)
    assert salvage("kvp", text) == Salvaged(json.loads(text), False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": "\\ud800", "\\udc00b": ["\\ude00\\ud83d"]}', {"a": "\ufffd", "\ufffdb": ["\ufffd\ufffd"]}),
        ('{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}', {"a": "\U0001f600", "b": "\\ud800"}),
        ('{"a": "\ud800"}', {"a": "\ufffd"}),
        ('{"a": "\\u0000", "a": 2}', {"a": 2}),
        ('{"a": ' + "9" * 1000 + ', "b": 1e308, "c": -0.0}', {"a": 10**1000 - 1, "b": 1e308, "c": -0.0}),
    ],
)
def test_values_are_such_as_other_programs_can_read(text: str, expected: Any) -> None:
    assert read("kvp", text) == expected
    found = salvage("kvp", text)
    assert found is not None
    assert found.value == expected
    json.dumps(found.value, allow_nan=False, ensure_ascii=False).encode()


def test_a_number_that_is_too_large_ends_what_is_kept() -> None:
    assert salvage("kvp", '{"a": 1, "b": 1e400, "c": 2}') == Salvaged({"a": 1}, True)
    assert salvage("kvp", '{"a": 1, "b": ' + "1" * 1001 + ', "c": 2}') == Salvaged({"a": 1}, True)
