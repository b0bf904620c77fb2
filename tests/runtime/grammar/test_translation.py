"""Schemas that people have: what answers are held to, what is left to be checked, and that nothing is narrowed.

jsonschema, `decimal` and `datetime` are the references.
"""

from __future__ import annotations

import datetime
import json
import random
from decimal import Decimal
from typing import Any

import jsonschema
import pytest

from granite4v.errors import ConstraintError
from granite4v.runtime.grammar.json_schema import read_schema
from granite4v.runtime.grammar.validation import Validator
from tests.helpers.constrained import allows, generated
from tests.runtime.grammar.test_schema import SHORT, kvp, of


def holds(schema: Any, yes: list[Any], no: list[Any]) -> None:
    """Whether answers of the form {"a": value} are allowed, values given as JSON text or as data."""
    grammar = kvp(of(["a"], a=schema))
    for wanted, values in ((True, yes), (False, no)):
        for value in values:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            assert allows("toy", grammar, f'{{"a": {text}}}') == wanted, (text, wanted)


def problem(schema: Any, value: Any) -> str | None:
    return Validator(read_schema(schema)).problem(value)


def warning(schema: Any) -> str:
    (found,) = kvp(schema).warnings
    return found


# --- multiples within bounds ---


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


# --- keywords that answers are not held to ---


@pytest.mark.parametrize(
    ("schema", "keyword", "good", "bad"),
    [
        ({"type": "array", "items": SHORT, "uniqueItems": True}, "uniqueItems", ["x", "y"], ["x", "x"]),
        ({"not": {"type": "null"}}, "not", 1, None),
        (
            {"type": "object", "properties": {"k": SHORT, "n": {"type": "integer"}}, "required": ["k"],
             "if": {"properties": {"k": {"const": "x"}}}, "then": {"required": ["n"]}},
            "if/then/else", {"k": "x", "n": 1}, {"k": "x"},
        ),
        ({"type": "array", "contains": {"const": 1}}, "contains", [1], [2]),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames", {"abc": 1}, {"abcd": 1}),
        (
            {"type": "object", "properties": {"x": SHORT, "y": SHORT}, "dependentRequired": {"x": ["y"]}},
            "dependentRequired", {"x": "1", "y": "2"}, {"x": "1"},
        ),
        (
            {"type": "object", "properties": {"x": SHORT}, "dependentSchemas": {"x": {"required": ["y"]}}},
            "dependentSchemas", {"x": "1", "y": 2}, {"x": "1"},
        ),
        (
            {"anyOf": [of(x=SHORT), of(y=SHORT)], "unevaluatedProperties": False},
            "unevaluatedProperties", {"x": "1"}, {"z": "1"},
        ),
        ({"oneOf": [SHORT, {"type": "string", "minLength": 3}]}, "oneOf", "ab", "abcd"),
        ({**of(x=SHORT, y=SHORT), "maxProperties": 1}, "maxProperties", {"x": "1"}, {"x": "1", "y": "2"}),
        ({"type": "string", "pattern": r"^(?=.*[0-9])[A-Z0-9]{4,8}$"}, "pattern", "AB12", "ABCD"),
        ({"type": "string", "pattern": r"^(.)\1$"}, "pattern", "aa", "ab"),
        ({"type": "string", "pattern": r"\bno\b"}, "pattern", "a no b", "another"),
        ({"type": "integer", "multipleOf": 2**40}, "multipleOf", 2**41, 2**39),
        ({"type": "number", "multipleOf": 0.0123457}, "multipleOf", 0.0246914, 0.0246915),
        ({"const": 2**53 + 1}, "const", 2**53 + 1, 2**53),
        ({"enum": ["x", 12345678901234567890123]}, "enum", 12345678901234567890123, 12345678901234567890122),
        ({"type": "integer", "minimum": 2**53 + 1}, "minimum", 2**53 + 1, 2**53),
        ({"type": "integer", "maximum": -(2**60)}, "maximum", -(2**60), -(2**60) + 1),
        ({"type": "integer", "minimum": 1e308}, "minimum", 10**308, 10**307),
    ],
)  # fmt: skip
def test_what_answers_cannot_be_held_to_is_said_and_checked_afterwards(
    schema: Any, keyword: str, good: Any, bad: Any
) -> None:
    whole = of(["a"], a=schema)
    assert warning(whole).startswith(f"'{keyword}' at '$.a' ")
    assert warning(whole).endswith("; the answer is checked against it afterwards.")
    assert allows("toy", kvp(whole), json.dumps({"a": good}))
    assert problem(whole, {"a": good}) is None
    assert "'$.a" in str(problem(whole, {"a": bad}))


def test_fields_with_the_same_warning_share_one() -> None:
    many = {f"f{i}": {"type": "array", "items": SHORT, "uniqueItems": True} for i in range(6)}
    assert "'$.f0', '$.f1', '$.f2', '$.f3' and 2 more is not enforced" in warning(of([], **many))


def test_a_field_is_named_by_its_place_in_the_answer() -> None:
    schema = {
        "$defs": {"line": of(["code"], code={"type": "string", "pattern": r"(.)\1"})},
        **of(["lines"], lines={"type": "array", "items": {"$ref": "#/$defs/line"}}),
    }
    assert (
        "'pattern' at '$.lines[*].code' cannot be enforced during generation (backreferences are not supported)"
        in warning(schema)
    )


@pytest.mark.parametrize("name", ["currency", "iban", "decimal", "x-own"])
def test_unknown_formats_are_remarks(name: str) -> None:
    schema = of(["a"], a={"type": "string", "format": name})
    assert warning(schema) == f"format '{name}' at '$.a' is unknown, so any text is accepted."
    holds({"type": "string", "format": name}, ['"any text"'], ["1"])
    assert problem(schema, {"a": "any text"}) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "password"}, {"type": "string", "format": "binary"},
        {"type": "string", "format": "path"}, {"type": "number", "format": "double"},
        {"type": "integer", "format": "int64"}, {"type": "array", "uniqueItems": False},
        {"type": "string", "contentEncoding": "base64"}, {"type": "string", "example": "x", "xml": {}},
    ],
)  # fmt: skip
def test_what_restricts_no_answer_is_no_reason_to_warn(schema: Any) -> None:
    assert kvp(of(["a"], a=schema)).warnings == ()


# --- keywords that have other words in llguidance ---


def test_names_of_keys_that_are_listed_are_held() -> None:
    schema = {"type": "object", "propertyNames": {"enum": ["EUR", "USD"]}, "additionalProperties": {"type": "integer"}}
    assert kvp(of(["a"], a=schema)).warnings == ()
    holds(schema, ["{}", '{"EUR": 1}', '{"EUR": 1, "USD": 2}', '{"USD": 2}'], ['{"CHF": 1}', '{"EUR": "1"}'])


def test_names_of_keys_that_have_a_pattern_are_held() -> None:
    schema = {
        "type": "object",
        "propertyNames": {"type": "string", "pattern": "^[A-Z]{3}$"},
        "additionalProperties": {"type": "integer"},
    }
    assert kvp(of(["a"], a=schema)).warnings == ()
    holds(schema, ['{"EUR": 1, "ABC": 2}'], ['{"eur": 1}', '{"EUR": "1"}'])


def test_an_object_of_several_schemas_is_closed_where_it_says_so() -> None:
    schema = {
        "$defs": {"base": of(["x"], x=SHORT)},
        "allOf": [{"$ref": "#/$defs/base"}, of(["y"], y=SHORT)],
        "unevaluatedProperties": False,
    }
    assert kvp(schema).warnings == ()
    assert allows("toy", kvp(schema), '{"x": "1", "y": "2"}')
    assert not allows("toy", kvp(schema), '{"x": "1", "y": "2", "z": "3"}')


def test_properties_that_conditions_speak_of_are_not_closed_out() -> None:
    schema = {
        **of(["kind"], kind={"enum": ["card", "wire"]}),
        "if": {"properties": {"kind": {"const": "wire"}}},
        "then": {"properties": {"iban": SHORT}, "required": ["iban"]},
        "else": {"required": ["number"]},
    }
    for text in ('{"kind": "wire", "iban": "x"}', '{"kind": "card", "number": 1}'):
        assert allows("toy", kvp(schema), text) and problem(schema, json.loads(text)) is None
    assert not allows("toy", kvp(schema), '{"kind": "wire", "other": "x"}')


def test_a_set_of_few_values_has_no_more_items_than_there_are() -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}
    holds(schema, ['["a", "b"]', '["a"]'], ['["a", "b", "a"]'])


def test_constants_that_what_stands_beside_them_forbids_are_left_out() -> None:
    holds({"enum": ["a", "abcd", 7], "type": "string", "minLength": 3}, ['"abcd"'], ['"a"', "7"])
    holds({"enum": ["2024-02-29", "2023-02-29"], "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"'])
    holds({"enum": [1, 2, 2.5], "multipleOf": 0.5, "minimum": 2}, ["2", "2.5"], ["1"])


@pytest.mark.parametrize("required", [True, False])
def test_unions_with_a_discriminator_are_held_and_need_no_check(required: bool) -> None:
    def variant(kind: str, name: str) -> dict[str, Any]:
        return of(["kind", name] if required else [name], kind={"const": kind, "default": kind}, **{name: SHORT})

    schema = {
        "$defs": {"A": variant("a", "x"), "B": variant("b", "y")},
        **of(
            ["p"],
            p={
                "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
                "discriminator": {"propertyName": "kind", "mapping": {"a": "#/$defs/A", "b": "#/$defs/B"}},
            },
        ),
    }
    assert kvp(schema).warnings == ()
    assert allows("toy", kvp(schema), '{"p": {"kind": "a", "x": "1"}}')
    assert allows("toy", kvp(schema), '{"p": {"kind": "b", "y": "1"}}')
    assert not allows("toy", kvp(schema), '{"p": {"kind": "b", "x": "1"}}')
    assert not allows("toy", kvp(schema), '{"p": {"x": "1"}}')


# --- texts ---


def test_dates_exist() -> None:
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


def test_an_offset_can_be_demanded() -> None:
    schema = {"type": "string", "format": "date-time", "pattern": "(Z|[+-][0-9]{2}:[0-9]{2})$"}
    holds(schema, ['"2024-01-05T10:30:00Z"', '"2024-01-05T10:30:00+01:00"'], ['"2024-01-05T10:30:00"'])


def test_leap_seconds_are_times_but_no_answers() -> None:
    assert problem({"format": "date-time"}, "2016-12-31T23:59:60Z") is None
    assert problem({"format": "date-time"}, "2016-12-31t23:59:00z") is None  # RFC 3339 has both
    holds({"type": "string", "format": "time"}, ['"23:59:59"'], ['"23:59:60"'])


def test_a_format_a_pattern_and_a_length_hold_at_once() -> None:
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
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",  # pydantic 2.12 and 2.13, of Decimal
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,8}|(?=[\d.]{1,11}0*$)\d{0,8}\.\d{0,2}0*$)",  # max_digits=10, decimal_places=2
]


@pytest.mark.parametrize("pattern", DECIMALS)
def test_amounts_that_pydantic_declares_as_decimal(pattern: str) -> None:
    schema = of(["a"], a={"anyOf": [{"type": "number"}, {"type": "string", "pattern": pattern}, {"type": "null"}]})
    assert "'pattern' at '$.a' is enforced without its lookarounds" in warning(schema)
    for text in ('"19.99"', '"-0.50"', "19.99", "null"):
        assert allows("toy", kvp(schema), f'{{"a": {text}}}') and problem(schema, {"a": json.loads(text)}) is None
    if pattern.endswith(r"\d*$"):  # the other one ends anywhere: it matches '12 EUR'
        for text in ('"12 EUR"', '"abc"'):
            assert not allows("toy", kvp(schema), f'{{"a": {text}}}')
    assert "'$.a'" in str(problem(schema, {"a": "-"}))


# --- numbers ---


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
            assert (Decimal(text) % Decimal(str(step)) == 0) == valid  # the test is right
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
def test_bounds_hold_exactly_and_are_never_too_narrow(kind: str) -> None:
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


def test_numbers_within_bounds_can_be_said_as_they_are_printed() -> None:
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
    assert problem({"const": 1e30}, 10**30) is None  # the same number, written in another way


def test_numbers_that_json_has_not_are_invalid() -> None:
    assert "inf, which is not a number in JSON" in str(problem({"type": "number"}, float("inf")))
    assert "nan, which" in str(problem({"type": "object"}, {"a": [float("nan")]}))


# --- other drafts and dialects ---


def test_nullable_of_openapi_means_or_null() -> None:
    for schema in (
        {"type": "string", "nullable": True},
        {"type": "string", "enum": ["x", "y"], "nullable": True},
        {"anyOf": [SHORT], "nullable": True},
        {"$ref": "#/$defs/name", "nullable": True},
    ):
        whole = {"$defs": {"name": SHORT}, **of([], a=schema)}
        assert read_schema(whole).notes == ("'nullable' of OpenAPI is read as \"or null\" at '$.properties.a'.",)
        assert allows("toy", kvp(whole), '{"a": null}') and allows("toy", kvp(whole), '{"a": "x"}')
        assert not allows("toy", kvp(whole), "{}")  # what may be null is there
        assert problem(whole, {"a": None}) is None and problem(whole, {"a": "x"}) is None
    assert not allows("toy", kvp(of(["a"], a={"type": "string", "nullable": False})), '{"a": null}')


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, 1, 0),  # OpenAPI 3.0
        ({"$schema": "http://json-schema.org/draft-04/schema#", "type": "number", "maximum": 9,
          "exclusiveMaximum": True}, 8, 9),
        ({"type": "array", "items": [{"type": "string"}, {"type": "integer"}], "additionalItems": False},
         ["x", 1], ["x", 1, 2]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"m": {"type": "integer"}},
          "properties": {"v": {"$ref": "#/definitions/m", "maximum": 3}}, "required": ["v"]}, {"v": 5}, {"v": "x"}),
        ({"type": "object", "properties": {"v": {"type": "string", "required": True}}}, {"v": "x"}, {}),  # draft 3
        ({"$schema": "https://spec.openapis.org/oas/3.1/dialect/base", "type": "string"}, "x", 1),
        ({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"type": "string"}}}, "x", 1),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "string"}}}, "x", 1),
        ({"$ref": "#name", "$defs": {"m": {"$anchor": "name", "type": "string"}}}, "x", 1),
        ({"$id": "https://example.com/a.json", "$ref": "https://example.com/a.json#/$defs/m",
          "$defs": {"m": {"type": "string"}}}, "x", 1),
        ({"$id": "https://example.com/a.json", "$ref": "b.json",
          "$defs": {"m": {"$id": "b.json", "type": "string"}}}, "x", 1),
        ({"$dynamicRef": "#m", "$defs": {"m": {"$dynamicAnchor": "m", "type": "string"}}}, "x", 1),
        ({"allOf": [{"$ref": "#/$defs/m"}], "default": "EUR", "$defs": {"m": {"enum": ["EUR"]}}}, "EUR", "USD"),
        ({"type": "object", "properties": {"$ref": {"type": "string"}}, "required": ["$ref"]}, {"$ref": "x"}, {}),
        ({"enum": [{"$ref": "https://example.com"}]}, {"$ref": "https://example.com"}, {}),
    ],
)  # fmt: skip
def test_words_of_other_drafts_and_all_kinds_of_references(schema: Any, good: Any, bad: Any) -> None:
    grammar = kvp(schema)
    assert grammar.warnings == ()
    assert allows("toy", grammar, json.dumps(good)) and not allows("toy", grammar, json.dumps(bad))
    assert problem(schema, good) is None and problem(schema, bad) is not None


def test_answers_of_noise_satisfy_what_they_are_not_held_to_or_are_found_out() -> None:
    schema = of(["a"], a={"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "uniqueItems": True})
    reference = jsonschema.Draft202012Validator(schema)
    verdicts = set()
    for seed in range(12):
        answer = json.loads(generated("toy", kvp(schema), seed, max_tokens=100, patience=3).text)
        verdicts.add(reference.is_valid(answer))
        assert (problem(schema, answer) is None) == reference.is_valid(answer)
    assert verdicts == {True, False}
