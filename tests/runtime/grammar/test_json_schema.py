"""Tests of schemas that would blow up: refused, or answered in a few steps, before any other work."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from granite4v.errors import ConstraintError
from granite4v.runtime.grammar import validation
from granite4v.runtime.grammar.json_schema import InvalidSchema, read_schema
from granite4v.runtime.grammar.validation import Validator
from tests.helpers.constrained import compiler, end_of_text
from tests.helpers.schemas import SHORT, kvp, of

NULLABLE = {"anyOf": [SHORT, {"type": "null"}]}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = SHORT
    for _ in range(levels):
        schema = of(["a"], a=schema)
    return schema


def chain(n: int, last: Any = SHORT) -> dict[str, Any]:
    defs = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{n}": last}}


def chain_of_objects(n: int) -> dict[str, Any]:
    defs = {f"d{i}": of([], a={"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{n}": SHORT}}


def lattice(n: int, link: str) -> dict[str, Any]:
    """Returns a chain of schemas, each of which refers to the next twice, so 2^n paths lead to the last."""
    defs = {f"d{i}": {link: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{n}": of(["a"], a=SHORT)}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (chain(5000), "has more than 5,000 schemas"),
        (chain(1000), "refers from one schema to the next more than 80 times, at '$"),
        (chain_of_objects(1000), "refers from one schema to the next through more than 200 levels, at '$.a.a"),
        (nested(81), "has more than 80 levels of schemas in one another, at '$.properties.a.properties.a"),
        ({"default": json.loads("[" * 250 + "]" * 250)}, "is nested more than 200 levels deep, at '$.default[0]"),
        (of([], **{f"p{i}": SHORT for i in range(5000)}), "has more than 5,000 schemas"),
        (of([f"p{i}" for i in range(20_000)]), "has more than 5,000 schemas and required names"),
        ({"enum": ["x" * 1000] * 1000}, "is longer than 1,000,000 characters; ask for fewer fields"),
        ({"description": "x" * 1_000_001}, "is longer than 1,000,000 characters"),
        ({"type": "string", "pattern": "((a{1000}){1000}){1000}"}, "repeats its parts up to 1,000,000,000 times"),
        ({"type": "string", "pattern": "a" * 30_000}, "is 30,000 characters long"),
        ({"$ref": {}}, "at '$.$ref': dict {}; expected a reference such as '#/$defs/NAME'"),
        ({"allOf": [{"$ref": "#/allOf/1"}, {"$ref": "#/allOf/0"}]}, "refers to itself without end"),
    ],
)
def test_too_large_schemas_are_refused_with_what_was_found_and_the_limit(schema: Any, message: str) -> None:
    with pytest.raises(ConstraintError, match=re.escape(message)) as caught:
        kvp(schema)
    assert len(str(caught.value)) < 400


def test_data_that_contains_itself_is_refused() -> None:
    schema: dict[str, Any] = of([], a=SHORT)
    schema["properties"]["b"] = schema
    with pytest.raises(InvalidSchema, match="nested more than 200 levels"):
        read_schema(schema)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (nested(79), '{"a": ' * 79 + '"x"' + "}" * 79),
        (chain(70), '"x"'),
        (chain_of_objects(90), '{"a": {}}'),
        (lattice(30, "anyOf"), '{"a": "x"}'),
        (lattice(8, "allOf"), '{"a": "x"}'),
        ({"$defs": {"n": {"anyOf": [*(of([f"k{i}"], **{f"k{i}": {"$ref": "#/$defs/n"}}) for i in range(800)),
                                    {"type": "null"}]}}, "$ref": "#/$defs/n"}, '{"k7": {"k9": null}}'),
        ({"$defs": {"n": NULLABLE}, **of([], **{f"p{i}": {"$ref": "#/$defs/n"} for i in range(1500)})},
         json.dumps({f"p{i}": None for i in range(1500)})),
        (of([], **{f"p{i}": SHORT for i in range(2000)}), '{"p3": "x", "p1999": "y"}'),
        ({"enum": [f"v{i}" for i in range(30_000)]}, '"v29999"'),
        (of(["a"], a={"type": "string", "maxLength": 10**9}), '{"a": "x"}'),
        (of(["a"], a={"type": "array", "items": SHORT, "maxItems": 10**12}), '{"a": ["x"]}'),
        ({"$defs": {f"d{i}": of([], **{f"r{j}": {"$ref": f"#/$defs/d{j}"} for j in range(40)}) for i in range(40)},
          "$ref": "#/$defs/d0"}, '{"r1": {"r2": {}}}'),
    ],
)  # fmt: skip
def test_large_schemas_are_answered(schema: Any, text: str) -> None:
    grammar = kvp(schema)
    state = compiler("nano").begin(grammar)
    for byte in text.encode():
        token = compiler("nano").index.byte_tokens[byte]
        assert state.allowed([end_of_text("nano")])[token]
        state.accept(token)
    assert state.is_accepting
    assert Validator(read_schema(schema)).problem(json.loads(text)) is None


def test_checking_a_value_ends_whatever_the_schema_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_STEPS", 5000)
    problem = Validator(read_schema(lattice(30, "allOf"))).problem({"a": "x"})
    assert problem == "checking it takes more than 5,000 steps; make the schema simpler"
    assert Validator(read_schema(lattice(6, "allOf"))).problem({"a": "x"}) is None


def test_a_value_that_is_nested_too_deep_is_a_problem_and_no_traceback() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    value: Any = {}
    for _ in range(900):
        value = {"a": value}
    assert Validator(read_schema(schema)).problem(value) == "it is nested too deeply to be checked"
