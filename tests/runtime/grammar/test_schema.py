"""Tests of answers under JSON schemas of all kinds: finished answers are instances to `jsonschema`; schemas that are
invalid or cannot be enforced are refused with a reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import granite4v
from granite4v.errors import ConstraintError
from granite4v.runtime.formats.otsl_grammar import OTSL
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.schema import definite
from tests.helpers.constrained import KINDS, allows, generated
from tests.helpers.schemas import SHORT, kvp, of
from tests.toy.spec import PRESETS

SCHEMAS: dict[str, dict[str, Any]] = {
    "text": of(["a"], a=SHORT),
    "long text": of(["a"], a={"type": "string"}),
    "text of some length": of(["a"], a={"type": "string", "minLength": 2, "maxLength": 4}),
    "no text": of(["a"], a={"type": "string", "maxLength": 0}),
    "integer": of(["a"], a={"type": "integer"}),
    "integer in a range": of(["a"], a={"type": "integer", "minimum": -12, "exclusiveMaximum": 345}),
    "even": of(["a"], a={"type": "integer", "multipleOf": 2, "minimum": 10, "maximum": 99}),
    "number": of(["a"], a={"type": "number"}),
    "number in a range": of(["a"], a={"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}),
    "boolean": of(["a"], a={"type": "boolean"}),
    "null": of(["a"], a={"type": "null"}),
    "text or null": of(["a"], a={"type": ["string", "null"], "maxLength": 5}),
    "number, text or null": of(["a"], a={"type": ["number", "string", "null"], "maxLength": 5}),
    "optional": of(a=SHORT, b={"type": "integer"}, c={"type": "boolean"}),
    "optional or null": of(a={"type": ["string", "null"], "maxLength": 3}, b={"type": ["integer", "null"]}),
    "some required": of(["b"], a=SHORT, b=SHORT, c={"type": ["boolean", "null"]}),
    "required without a property": {"type": "object", "properties": {"a": SHORT}, "required": ["z"]},
    "nested": of(["a"], a=of(["b"], b=of(["c"], c=of(["d"], d={"type": "boolean"})))),
    "enum": of(["a"], a={"enum": ["EUR", "USD", "CHF", None, 3, True, [1], {"x": "y"}]}),
    "const": of(["a", "b"], a={"const": "v1"}, b={"const": {"n": [1, None, "x"]}}),
    "list": of(["a"], a={"type": "array", "items": SHORT, "maxItems": 3}),
    "list of some length": of(["a"], a={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4}),
    "empty list": of(["a"], a={"type": "array", "maxItems": 0}),
    "list of objects": of(
        ["rows"],
        rows={"type": "array", "items": of(["n"], n={"type": "integer"}, text=SHORT), "minItems": 1, "maxItems": 3},
    ),
    "list of lists": of(
        ["a"], a={"type": "array", "maxItems": 2, "items": {"type": "array", "items": SHORT, "maxItems": 2}}
    ),
    "tuple": {"type": "array", "prefixItems": [SHORT, {"type": "integer"}], "items": False, "minItems": 2},
    "a list at the top": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 4},
    "pattern": of(["a"], a={"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"}),
    "pattern within": of(["a"], a={"type": "string", "pattern": "[0-9]{2}-x", "maxLength": 10}),
    "pattern with classes": of(["a"], a={"type": "string", "pattern": r"^\d{2,3}\s\w+$", "maxLength": 12}),
    "date": of(["a"], a={"type": "string", "format": "date"}),
    "time": of(["a"], a={"type": "string", "format": "date-time"}),
    "mail": of(["a"], a={"type": "string", "format": "email", "maxLength": 20}),
    "uuid and address": of(["a", "b"], a={"type": "string", "format": "uuid"}, b={"type": "string", "format": "ipv4"}),
    "one of several": of(["a"], a={"anyOf": [SHORT, {"type": "integer"}, {"type": "null"}]}),
    "exactly one": of(
        ["a"],
        a={
            "oneOf": [
                of(["kind", "r"], kind={"const": "circle"}, r={"type": "integer"}),
                of(["kind", "w"], kind={"const": "box"}, w={"type": "integer"}),
            ]
        },
    ),
    "all of": {"allOf": [of(["a"], a=SHORT), of(["b"], b={"type": "boolean"})]},
    "references": {
        "$defs": {"money": of(["amount", "currency"], amount={"type": "number"}, currency={"enum": ["EUR", "USD"]})},
        **of(["net", "gross"], net={"$ref": "#/$defs/money"}, gross={"$ref": "#/$defs/money"}),
    },
    "reference or null": {
        "definitions": {"name": SHORT},
        **of(a={"anyOf": [{"$ref": "#/definitions/name"}, {"type": "null"}], "default": None}),
    },
    "reference with more": {
        "$defs": {"base": of(["a"], a={"type": "boolean"})},
        **of(["x"], x={"$ref": "#/$defs/base", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}),
    },
    "recursive": {
        "$defs": {
            "node": of(["v"], v={"type": "boolean"}, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
        },
        "$ref": "#/$defs/node",
    },
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    "map by pattern": {"type": "object", "patternProperties": {"^x_[a-z]$": SHORT}, "additionalProperties": False},
    "anything": {"type": "object"},
    "others are numbers": {**of(["a"], a={"type": "boolean"}), "additionalProperties": {"type": "integer"}},
    "at least one": {**of(a={"type": "boolean"}, b={"type": "boolean"}), "minProperties": 1},
    "unicode": of(
        ["größe", "名前", '☂ "quoted" \\ name'],
        **{
            "größe": SHORT,
            "名前": {"enum": ["日本語", "é\u0301", "🧾"]},
            '☂ "quoted" \\ name': {"type": "boolean"},
        },
    ),
    "special tokens": of(["<|end_of_text|>", "<image>"], **{"<|end_of_text|>": {"const": "<|pad|>"}, "<image>": SHORT}),
    "control characters": of(["a"], a={"enum": ["tab\there", "line\nbreak", "\x01"]}),
    "annotations": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A form",
        "description": "what it is for",
        **of(["a"], a={**SHORT, "description": "d", "examples": ["x"], "deprecated": True, "x-own": 1}),
    },
    "no type": {"properties": {"a": {"type": "boolean"}}, "required": ["a"]},
}


def check(schema: dict[str, Any], text: str) -> Any:
    """Asserts that `jsonschema` finds the instance in the text valid; returns it."""
    instance = json.loads(text)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(instance)
    text.encode()  # no lone surrogates
    return instance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(SCHEMAS))
def test_answers_of_noise_are_instances(name: str, kind: str) -> None:
    schema = SCHEMAS[name]
    before = copy.deepcopy(schema)
    n_ended = 0
    for seed in range(6):
        answer = generated(kind, kvp(schema), seed, max_tokens=300, patience=6, fast_forward=seed % 2 == 0)
        assert answer.finish_reason in ("stop", "length") and len(answer.tokens) <= 300
        if answer.finish_reason == "stop":
            check(schema, answer.text)
            n_ended += 1
    assert n_ended
    assert schema == before


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", n_threads=1) as model:
        yield model


def test_a_models_answers_are_instances(model: granite4v.Model) -> None:
    n_ended = 0
    for seed, schema in enumerate(SCHEMAS.values()):
        answer = model.generate("What?", max_tokens=60, temperature=1.0, seed=seed, constraint=kvp(schema))
        assert answer.finish_reason in ("stop", "length", "repetition") and len(answer.tokens) <= 60
        if answer.finish_reason == "stop":
            check(schema, answer.text)
            n_ended += 1
    assert n_ended > len(SCHEMAS) / 3


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_without_sampling_fast_forward_changes_nothing_that_noise_decides(name: str) -> None:
    """Noise depends on the last tokens, so the answers are the same where no tokens are forced."""
    schema = SCHEMAS[name]
    fast, slow = (generated("toy", kvp(schema), 7, max_tokens=200, patience=6, fast_forward=f) for f in (True, False))
    if not fast.timings.n_forced:
        assert fast.tokens == slow.tokens
    for answer in (fast, slow):
        if answer.finish_reason == "stop":
            check(schema, answer.text)


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        # properties that may be null are always present, the others may be absent
        (of(a={"type": ["string", "null"]}, b=SHORT), ['{"a": null}', '{"a": "x", "b": "y"}'], ["{}", '{"b": "y"}']),
        (of(a={"anyOf": [SHORT, {"type": "null"}]}), ['{"a": null}'], ["{}"]),
        (of(a={"enum": [1, None]}, b={"const": None}, c={}), ['{"a": 1, "b": null, "c": [1]}'], ['{"a": 1, "c": 1}']),
        (of(a={"enum": [1, 2], "type": ["integer", "null"]}), ["{}"], ['{"a": null}']),
        # no other properties, unless the schema mentions them
        (of([], a=SHORT), ["{}", '{"a": "x"}'], ['{"b": "x"}', '{"a": "x", "b": 1}']),
        ({**of([], a=SHORT), "additionalProperties": True}, ['{"b": "x"}', '{"a": "x", "b": 1}'], ["[]"]),
        ({"type": "object"}, ["{}", '{"b": {"c": [1, null, "x"]}}'], ["1"]),
        ({"properties": {"a": SHORT}}, ["{}"], ['"x"', "[]"]),
        (SCHEMAS["required without a property"], ['{"a": "x", "z": 1}', '{"z": [null]}'], ["{}", '{"z": 1, "y": 1}']),
        (SCHEMAS["all of"], ['{"a": "x", "b": true}'], ['{"a": "x"}']),
        (SCHEMAS["reference with more"], ['{"x": {"a": true, "b": true}}'], ['{"x": {"a": true}}']),
        (SCHEMAS["reference or null"], ['{"a": null}', '{"a": "x"}'], ["{}"]),
        # one layout, one order
        (of(["a", "b"], a=SHORT, b=SHORT), ['{"a": "x", "b": "é\\n"}'],
         ['{"a":"x","b":"y"}', '{ "a": "x", "b": "y"}', '{"b": "x", "a": "y"}', '{"a": "x", "b": "\\u00e9"}',
          '{"a": "x", "b": "y"} ', '{"a": "x", "b": "y", "a": "z"}', '{"a": "x",\n"b": "y"}']),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, ["[1, 1]"], ["[1,1]"]),
    ],
)  # fmt: skip
def test_objects_are_closed_and_fields_are_there(schema: dict[str, Any], yes: list[str], no: list[str]) -> None:
    for kind in KINDS:
        for text in yes:
            check(schema, text)
            assert allows(kind, kvp(schema), text), text
        for text in no:
            assert not allows(kind, kvp(schema), text), text


def test_closing_an_object_may_not_make_a_schema_impossible() -> None:
    """Where several schemas describe one object, all of them are left open."""
    schema = {
        "allOf": [{"$ref": "#/$defs/a"}, of(["y"], y={"type": "null"})],
        "$defs": {"a": of(["x"], x={"type": "null"})},
    }
    assert allows("toy", kvp(schema), '{"x": null, "y": null}')
    nested = {"anyOf": [of(["x"], x={"type": "null"})], "properties": {"y": {"type": "null"}}, "required": ["y"]}
    assert allows("toy", kvp(nested), '{"x": null, "y": null}') or allows("toy", kvp(nested), '{"y": null, "x": null}')


def test_settings_of_llguidance_in_a_schema_are_ignored() -> None:
    schema = {**of(["a"], a=SHORT), "x-guidance": {"whitespace_flexible": True}}
    assert not allows("toy", kvp(schema), '{"a":"x"}') and allows("toy", kvp(schema), '{"a": "x"}')


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([], "the JSON schema is list []; expected a JSON Schema, an object such as"),
        ("a.json", "the JSON schema is str 'a.json'"),
        (True, "the JSON schema is bool True"),
        ({"type": "strng"}, "is not a valid JSON Schema: at '$.type': 'strng' is not valid"),
        ({"properties": {"a": {"type": "object", "required": "b"}}}, "at '$.properties.a.required'"),
        ({"properties": []}, "at '$.properties'"),
        ({"properties": {"a": 5}}, "at '$.properties.a' is int 5; expected an object, true or false"),
        ({"anyOf": [{}, "string"]}, "at '$.anyOf[1]' is str 'string'"),
        ({"minLength": -1}, "at '$.minLength'"),
        ({"$schema": 5, "type": "string"}, "has int 5 as its '$schema'; expected the URI of a draft"),
        ({"$schema": [], "type": "string"}, "has list [] as its '$schema'"),
        ({"type": "object", "default": {1, 2}}, "has at '$.default' set {1, 2}, which cannot be written as JSON"),
        ({"type": "object", "properties": {1: {}}}, "has the key int 1 at '$.properties'"),
        (of(a={"const": float("nan")}), "has at '$.properties.a.const' nan, which is not a number in JSON"),
        (of(a={"maximum": float("inf")}), "has at '$.properties.a.maximum' inf, which"),
        (of(a={"maximum": 10**400}), "at '$.properties.a.maximum' an integer of more than 400 digits"),
        (of(a={"const": "\ud800"}), "at '$.properties.a.const' a lone surrogate"),
        (of(**{"\ud800": {}}), "a lone surrogate"),
        (of(a={"type": "string", "pattern": "[a-z"}), "at '$.properties.a.pattern': the regular expression '[a-z'"),
        ({"$ref": "https://example.com/other.json"}, "'https://example.com/other.json', which is not in it; granite4v"),
        (of(a={"$ref": "#/$defs/none"}), "'$.properties.a.$ref' refers to '#/$defs/none', which is not in it"),
        (of(a={"$ref": "#nowhere"}), "'$.properties.a.$ref' refers to '#nowhere'"),
        ({"$ref": "#/required", "required": ["a"]}, "which is list ['a']; expected a schema"),
        (of(a={"type": "integer", "minimum": 5, "maximum": 4}), "at '$.a': no integer is at least its minimum"),
        (of(a={"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 5}), "at '$.a': no integer is"),
        (of(a={"type": "number", "exclusiveMinimum": 4, "maximum": 4}), "at '$.a': no number is"),
        (of(a={"type": "string", "minLength": 3, "maxLength": 2}), "at '$.a': its minLength is greater"),
        (of(a={"type": "array", "minItems": 3, "maxItems": 2}), "at '$.a': no list has"),
        (of(a={"type": "string", "format": "date", "maxLength": 9}), "at '$.a': no text has its pattern, its format"),
        (
            {"$defs": {"a": of(["x"], x={"$ref": "#/$defs/a"})}, "$ref": "#/$defs/a"},
            "contains another one, without",
        ),
        (of(["x"], x={"type": "array", "items": {"$ref": "#"}, "minItems": 1}), "contains another one, without"),
        (of(x={"anyOf": [{"$ref": "#/properties/x"}, {"type": "null"}]}), "refers to itself without end"),
        ({"$ref": "#"}, "refers to itself without end at '$'"),
        (
            of(["b"], a={}, b={"type": "null"}) | {"required": ["c"], "additionalProperties": False},
            "at '$': it requires 'c', which is not one of its properties, and allows no others",
        ),
        (of(x=of(["c"], a={}) | {"unevaluatedProperties": False}), "at '$.x': it requires 'c', which is not one"),
        (of(["c"]) | {"unevaluatedProperties": False}, "at '$': it requires 'c', which is not one"),
        (of(["a"], a=False), "required property 'a' is unsatisfiable"),
        (of(a={"enum": []}), "at '$.a': none of its values is allowed"),
        (of(a={"enum": ["x"], "maxLength": 0}), "at '$.a': none of its values is allowed"),
        (of(["b"], b=of(["a"], a={"allOf": [{"type": "string"}, {"type": "integer"}]})), "enforced at '$.b"),
    ],
)
def test_an_invalid_or_impossible_schema_is_refused_and_its_field_named(schema: Any, message: str) -> None:
    with pytest.raises(ConstraintError) as caught:
        grammar_for("kvp", schema)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400 and "%json" not in str(caught.value)


def test_more_forced_text_than_one_run_takes() -> None:
    schema = {"const": ["a long text of some words"] * 400}
    answer = generated("nano", kvp(schema), 1, max_tokens=20_000)
    assert answer.finish_reason == "stop"
    check(schema, answer.text)


def test_tasks() -> None:
    assert grammar_for("chart2code") is grammar_for("<chart2summary>") is grammar_for("prompt") is None
    assert grammar_for("<tables_otsl>") == grammar_for("tables_otsl") == Grammar("tables_otsl", rule=OTSL)
    assert allows("toy", kvp(None), '{"any": ["thing"]}')
    with pytest.raises(ValueError, match="unknown task 'table'; known: chart2csv, "):
        grammar_for("table")
    with pytest.raises(ValueError, match="only 'kvp' takes one"):
        grammar_for("tables_json", {"type": "object"})


def test_a_grammar_is_plain_data() -> None:
    one, two = kvp(SCHEMAS["nested"]), kvp(copy.deepcopy(SCHEMAS["nested"]))
    assert one == two and hash(one) == hash(two) and one != kvp(SCHEMAS["list"])
    assert json.loads(one.schema)["properties"]["a"]["required"] == ["b"]


@pytest.mark.parametrize("nothing", [{"not": {}}, {"not": True}])
def test_a_not_that_excludes_everything_allows_nothing(nothing: dict[str, Any]) -> None:
    with pytest.raises(ConstraintError, match="no answer can satisfy the JSON schema at '\\$'"):
        definite(nothing)
    text, warnings = definite({"type": "object", "properties": {"a": {"type": "string"}, "b": nothing}})
    assert json.loads(text)["properties"]["b"] is False and warnings == ()
