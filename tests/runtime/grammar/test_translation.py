"""Tests of schemas that people write: what is enforced, what is only checked afterwards, and that nothing is narrowed.

jsonschema is the reference.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from granite4v.runtime.grammar.json_schema import read_schema
from tests.helpers.constrained import allows, generated
from tests.helpers.schema_checks import holds, problem, warning
from tests.helpers.schemas import SHORT, kvp, of


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
def test_what_cannot_be_enforced_is_a_warning_and_checked_afterwards(
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
def test_unknown_formats_are_annotations(name: str) -> None:
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


def test_listed_names_of_keys_are_enforced() -> None:
    schema = {"type": "object", "propertyNames": {"enum": ["EUR", "USD"]}, "additionalProperties": {"type": "integer"}}
    assert kvp(of(["a"], a=schema)).warnings == ()
    holds(schema, ["{}", '{"EUR": 1}', '{"EUR": 1, "USD": 2}', '{"USD": 2}'], ['{"CHF": 1}', '{"EUR": "1"}'])


def test_a_pattern_of_names_of_keys_is_enforced() -> None:
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


def test_closed_objects_allow_the_properties_that_conditions_mention() -> None:
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


def test_constants_that_other_keywords_forbid_are_left_out() -> None:
    holds({"enum": ["a", "abcd", 7], "type": "string", "minLength": 3}, ['"abcd"'], ['"a"', "7"])
    holds({"enum": ["2024-02-29", "2023-02-29"], "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"'])
    holds({"enum": [1, 2, 2.5], "multipleOf": 0.5, "minimum": 2}, ["2", "2.5"], ["1"])


@pytest.mark.parametrize("required", [True, False])
def test_unions_with_a_discriminator_are_enforced_without_a_warning(required: bool) -> None:
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
        assert not allows("toy", kvp(whole), "{}")  # a property that may be null is always present
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
def test_keywords_of_other_drafts_and_all_kinds_of_references(schema: Any, good: Any, bad: Any) -> None:
    grammar = kvp(schema)
    assert grammar.warnings == ()
    assert allows("toy", grammar, json.dumps(good)) and not allows("toy", grammar, json.dumps(bad))
    assert problem(schema, good) is None and problem(schema, bad) is not None


def test_answers_of_noise_satisfy_what_is_not_enforced_or_are_found_invalid() -> None:
    schema = of(["a"], a={"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "uniqueItems": True})
    reference = jsonschema.Draft202012Validator(schema)
    verdicts = set()
    for seed in range(12):
        answer = json.loads(generated("toy", kvp(schema), seed, max_tokens=100, patience=3).text)
        verdicts.add(reference.is_valid(answer))
        assert (problem(schema, answer) is None) == reference.is_valid(answer)
    assert verdicts == {True, False}
