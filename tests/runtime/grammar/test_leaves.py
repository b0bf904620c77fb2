"""Tests of numbers and strings: grammars allow what `decimal`, `datetime` and jsonschema allow, and narrow nothing."""

from __future__ import annotations

import datetime
import json
import random
from decimal import Decimal

import jsonschema
import pytest

from granite4v.errors import ConstraintError
from tests.helpers.constrained import allows, generated
from tests.helpers.schema_checks import holds, problem, warning
from tests.helpers.schemas import kvp, of


@pytest.mark.parametrize(
    ("step", "low", "high"),
    [
        ("0.1", "0.3", "0.35"),
        ("0.25", "1.25", "2.8"),
        ("0.15", "-0.7", "0.2"),
        ("0.12", "0.5", "1.3"),
        ("1", "2", "2.5"),
    ],
)
def test_every_multiple_within_bounds_is_allowed_however_short_it_is(step: str, low: str, high: str) -> None:
    schema = {"type": "number", "multipleOf": float(step), "minimum": float(low), "maximum": float(high)}
    hundredths = [Decimal(i) / 100 for i in range(-100, 301)]
    inside = [value for value in hundredths if Decimal(low) <= value <= Decimal(high) and value % Decimal(step) == 0]
    texts = {f"{value.normalize() + 0:f}" for value in inside}
    assert texts
    holds(schema, sorted(texts), [str(Decimal(low) - 1), str(Decimal(high) + 1)])


@pytest.mark.parametrize(
    ("step", "low", "high"), [(0.1, 0.3, 0.35), (0.1, -0.35, -0.3), (0.25, 1.3, 1.9), (0.07, 0.07, 0.21)]
)
def test_answers_to_multiples_within_bounds_end(step: float, low: float, high: float) -> None:
    grammar = kvp(of(["a"], a={"type": "number", "multipleOf": step, "minimum": low, "maximum": high}))
    for seed in range(4):
        assert low <= json.loads(generated("toy", grammar, seed).text)["a"] <= high


def test_bounds_with_no_multiple_between_them_are_refused() -> None:
    schema = {"type": "number", "multipleOf": 0.1, "minimum": 1.31, "maximum": 1.39}
    with pytest.raises(ConstraintError, match=r"'\$\.a': no multiple of 0\.1 is at least its minimum"):
        kvp(of(["a"], a=schema))


def test_a_step_beyond_the_largest_float() -> None:
    assert json.loads(generated("toy", kvp(of(["a"], a={"type": "integer", "multipleOf": 10**350})), 0).text)
    with pytest.raises(ConstraintError, match=r"'\$\.a': no multiple of 10{39} is at least its minimum"):
        kvp(of(["a"], a={"type": "number", "multipleOf": 10**350, "minimum": 1, "maximum": 2}))


def test_dates_are_real_dates() -> None:
    grammar = kvp({"type": "string", "format": "date"})
    rng = random.Random(1)
    days = [(year, month, day) for year in (0, 1, 4, 100, 400, 1899, 1900, 1999, 2000, 2023, 2024, 2100, 9999)
            for month in (0, 1, 2, 4, 12, 13) for day in (0, 1, 28, 29, 30, 31, 32)]  # fmt: skip
    days += [(rng.randrange(10000), 2, 29) for _ in range(60)]
    for year, month, day in days:
        text = f"{year:04}-{month:02}-{day:02}"
        try:
            datetime.date(year, month, day)
            exists = True
        except ValueError:
            exists = False
        assert (problem({"format": "date"}, text) is None) == exists, text
        assert allows("toy", grammar, json.dumps(text)) == exists, text


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        (
            "date-time",
            ["2024-02-29T10:30:00", "2024-01-05T23:59:59Z", "2024-01-05T10:30:00.123456+01:00"],
            ["2023-02-29T10:30:00", "2024-01-05T10:30", "2024-01-05 10:30:00", "2024-01-05T24:00:00", "2024-01-05"],
        ),
        ("time", ["10:30:00", "10:30:00Z", "10:30:00.5-05:30"], ["10:30", "25:00:00", "10:30:00+24:00", "10:61:00"]),
        ("date", ["2024-02-29"], ["2024-2-9", "24-02-09", "2024-02-09x", "29.02.2024"]),
    ],
)
def test_times_need_no_offset_as_pydantic_declares_them(name: str, yes: list[str], no: list[str]) -> None:
    holds({"type": "string", "format": name}, [json.dumps(text) for text in yes], [json.dumps(text) for text in no])
    for text in yes:
        assert problem({"format": name}, text) is None
    for text in no:
        assert problem({"format": name}, text) == f"at '$': {text!r} is not a {name!r}"


def test_a_pattern_can_require_an_offset() -> None:
    schema = {"type": "string", "format": "date-time", "pattern": "(Z|[+-][0-9]{2}:[0-9]{2})$"}
    holds(schema, ['"2024-01-05T10:30:00Z"', '"2024-01-05T10:30:00+01:00"'], ['"2024-01-05T10:30:00"'])


def test_leap_seconds_are_times_but_no_answers() -> None:
    assert problem({"format": "date-time"}, "2016-12-31T23:59:60Z") is None
    assert problem({"format": "date-time"}, "2016-12-31t23:59:00z") is None  # RFC 3339 allows lower case, too
    holds({"type": "string", "format": "time"}, ['"23:59:59"'], ['"23:59:60"'])


def test_a_format_a_pattern_and_a_length_are_enforced_together() -> None:
    schema = {"type": "string", "format": "date", "pattern": "^20", "minLength": 10, "maxLength": 10}
    holds(schema, ['"2024-02-29"'], ['"1999-01-01"', '"20240229"'])
    schema = {"type": "string", "format": "uri", "minLength": 1, "maxLength": 20}
    holds(schema, ['"https://example.com"'], ['"https://example.com/long"', '""'])


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r"^\p{L}+$", ["Größe", "价格"], ["a1", ""]),
        (r"^\p{Lu}\p{Ll}+$", ["Éa"], ["éa"]),
        (r"^(?<year>\d{4})$", ["2024"], ["24"]),
        (r"^[A-Z]{2}\/\d{4}\-\d{2}$", ["AB/2024-01"], ["AB-2024-01"]),
        (r"^a$|^b$", ["a", "b"], ["ab"]),
        (r"^USD\$$", ["USD$"], ["USD"]),
        (r"[0-9]{3}", ["x123y"], ["12"]),
        (r"^A\u00e9$", ["Aé"], ["Ae"]),
    ],
)
def test_patterns_of_ecma(pattern: str, yes: list[str], no: list[str]) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert kvp(of(["a"], a=schema)).warnings == ()
    holds(schema, [json.dumps(text, ensure_ascii=False) for text in yes], [json.dumps(text) for text in no])
    for texts, valid in ((yes, True), (no, False)):
        for text in texts:
            assert (problem(schema, text) is None) == valid, text


DECIMALS = [
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",  # pydantic 2.12 and 2.13, for Decimal
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,8}|(?=[\d.]{1,11}0*$)\d{0,8}\.\d{0,2}0*$)",  # max_digits=10, decimal_places=2
]


@pytest.mark.parametrize("pattern", DECIMALS)
def test_amounts_that_pydantic_declares_as_decimal(pattern: str) -> None:
    schema = of(["a"], a={"anyOf": [{"type": "number"}, {"type": "string", "pattern": pattern}, {"type": "null"}]})
    assert "'pattern' at '$.a' is enforced without its lookarounds" in warning(schema)
    for text in ('"19.99"', '"-0.50"', "19.99", "null"):
        assert allows("toy", kvp(schema), f'{{"a": {text}}}') and problem(schema, {"a": json.loads(text)}) is None
    if pattern.endswith(r"\d*$"):  # the other one may end anywhere, so it matches '12 EUR'
        for text in ('"12 EUR"', '"abc"'):
            assert not allows("toy", kvp(schema), f'{{"a": {text}}}')
    assert "'$.a'" in str(problem(schema, {"a": "-"}))


@pytest.mark.parametrize(
    ("step", "yes", "no"),
    [
        (0.01, ["19.99", "0.07", "1234.56", "5", "-0.01", "0", "99999999.99"], ["19.995", "0.001"]),
        (0.1, ["0.3", "0.7", "1.1"], ["0.35"]),
        (1e-7, ["0.0000003", "1"], ["0.00000001"]),
        (2.5, ["2.5", "7.5", "5"], ["3"]),
        (3, ["9", "-9", "0"], ["10"]),
        (1000000, ["3000000"], ["3000001"]),
    ],
)
def test_multiples_are_decimal(step: float, yes: list[str], no: list[str]) -> None:
    schema = {"type": "number", "multipleOf": step}
    holds(schema, yes, no)
    for texts, valid in ((yes, True), (no, False)):
        for text in texts:
            assert (Decimal(text) % Decimal(str(step)) == 0) == valid  # checks the test's own data
            assert (problem(schema, json.loads(text)) is None) == valid, text


def test_multiples_of_numbers_that_are_too_large_for_floats() -> None:
    step = 10**30 + 1
    assert problem({"multipleOf": step}, step * 3) is None
    assert problem({"multipleOf": step}, step * 3 + 1) == f"at '$': {step * 3 + 1} is not a multiple of {step}"
    assert problem({"multipleOf": 0.01}, 19.990) is None
    assert problem({"multipleOf": 1e-300}, 1e300) is None
    assert problem({"multipleOf": 0.01}, 19.995) == "at '$': 19.995 is not a multiple of 0.01"


def test_integers_among_the_multiples_of_a_fraction() -> None:
    holds({"type": "integer", "multipleOf": 2.5}, ["5", "10", "0"], ["3", "2.5"])
    holds({"type": "integer", "multipleOf": 0.01}, ["5", "7"], ["5.5"])


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_bounds_are_exact_and_never_too_narrow(kind: str) -> None:
    rng = random.Random(3)
    for _ in range(60):
        digits, places = rng.randint(1, 9), rng.choice([0, 0, 1, 2, 3])
        low = Decimal(rng.randint(-(10**digits), 10**digits)).scaleb(-places)
        high = low + Decimal(rng.randint(2, 10**digits)).scaleb(-places) + 1
        excluded = rng.random() < 0.5
        names = ("exclusiveMinimum", "exclusiveMaximum") if excluded else ("minimum", "maximum")
        schema = {"type": kind, names[0]: float(low), names[1]: float(high)}
        grammar = kvp(schema)
        assert not grammar.warnings
        for near in (low, high):
            for step in (Decimal(0), Decimal("0.001"), Decimal("-0.001"), Decimal(1), Decimal(-1)):
                value = near + step
                if kind == "integer":
                    value = value.to_integral_value()
                inside = low < value < high if excluded else low <= value <= high
                text = f"{value:f}"
                text = text.rstrip("0").rstrip(".") if "." in text else text
                text = "0" if text == "-0" else text
                assert allows("toy", grammar, text) == inside, (schema, text)
                assert (problem(schema, json.loads(text)) is None) == inside, (schema, text)


def test_numbers_within_bounds_can_be_generated_as_they_are_printed() -> None:
    for schema, texts in (
        ({"type": "number", "exclusiveMinimum": 0}, ["0.50", "0.05", "19.90", "1"]),
        ({"type": "number", "minimum": 0, "maximum": 0.25}, ["0.2", "0.20", "0", "0.00"]),
        ({"type": "number", "maximum": 99.875}, ["99.8", "99.87", "-0.50", "-0.05", "99"]),
        ({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 0.646}, ["0.6", "0.64", "0.10", "null"]),
        ({"type": "number", "minimum": -1.375, "exclusiveMaximum": 0}, ["-1.3", "-1.37", "-0.50", "-1"]),
    ):
        holds(schema, texts, [])
    holds({"type": "number", "exclusiveMinimum": 0, "maximum": 0.25}, [], ["0", "0.00", "0.26", "0.3", "-0.1", "1"])


def test_bounds_beyond_floats_are_widened_and_never_narrowed() -> None:
    rng = random.Random(4)
    for _ in range(60):
        bound = rng.choice([1, -1]) * rng.randint(2**53 + 1, 10 ** rng.randint(17, 300))
        name = rng.choice(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
        schema = of(["a"], a={"type": rng.choice(["integer", "number"]), name: bound})
        assert "too large" in warning(schema)
        for value in (bound - 1, bound, bound + 1, bound * 2, -bound):
            valid = jsonschema.Draft202012Validator(schema).is_valid({"a": value})
            assert (problem(schema, {"a": value}) is None) == valid
            if valid:
                assert allows("toy", kvp(schema), json.dumps({"a": value})), (schema, value)


def test_large_constants_are_valid_as_they_are_written() -> None:
    for value in (2**53 + 1, -(2**63), 2**63, 10**25, 1e30, 12345678.123456789):
        schema = of(["a"], a={"const": value})
        text = json.dumps({"a": value if value != 1e30 else 10**30})  # llguidance writes no exponents within bounds
        assert allows("toy", kvp(schema), text)
        assert problem(schema, json.loads(text)) is None
    assert problem({"const": 1e30}, 10**30) is None  # the same number, written differently


def test_numbers_that_json_has_not_are_invalid() -> None:
    assert "inf, which is not a number in JSON" in str(problem({"type": "number"}, float("inf")))
    assert "nan, which" in str(problem({"type": "object"}, {"a": [float("nan")]}))
