"""JSON schemas of answers: checked, translated for llguidance, and tried.

An answer is one line as Python's json.dumps writes it, so keys and what stands between values are never the model's
choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from granite4v.errors import ConstraintError
from granite4v.runtime.grammar.grammar_text import compile_problem, validation_problem
from granite4v.runtime.grammar.json_schema import InvalidSchema, JsonSchema, read_schema, subschemas
from granite4v.runtime.grammar.leaves import Impossible
from granite4v.runtime.grammar.translation import Translation
from granite4v.runtime.grammar.trial import Trials

Schema = dict[str, Any]

_MAX_LEVELS = 200  # llguidance needs up to 16 KB of the stack for each
_MANY = 50  # schemas in one, that are each tried by themselves
_WHAT_TO_DO = "Change the schema, or turn the constraint off (--unconstrained; unconstrained=True in Python)."


class Definite(NamedTuple):
    """The schema that answers are held to, as JSON text, and what it leaves to be checked afterwards."""

    text: str
    warnings: tuple[str, ...]


def definite(schema: object) -> Definite:
    """The schema as llguidance takes it, its objects closed and its properties that may be null required.

    `schema`: plain data, or a JsonSchema. Raises ConstraintError unless it is a valid schema, and where no answer could
    satisfy it.
    """
    try:
        checked = schema if isinstance(schema, JsonSchema) else read_schema(schema)
        with Trials() as trials:
            translation, problem = _tried(checked, trials, close_ranges=True)
            if "too large" in problem:
                translation, problem = _tried(checked, trials, close_ranges=False)
    except InvalidSchema as error:
        raise ConstraintError(f"the JSON schema {error}") from None
    except Impossible as error:
        raise ConstraintError(f"no answer can satisfy the JSON schema at {error}. {_WHAT_TO_DO}") from None
    if problem:
        if translation.impossible:
            problem += f"; no value is possible at {translation.impossible[0]}"
        where = _culprit(translation)
        raise ConstraintError(f"answers cannot be held to the JSON schema at '{where}': {problem}. {_WHAT_TO_DO}")
    return Definite(json.dumps(translation.made), translation.warnings)


def _tried(schema: JsonSchema, trials: Trials, *, close_ranges: bool) -> tuple[Translation, str]:
    """A translation, and why llguidance cannot hold answers to it."""
    translation = Translation(schema, trials, close_ranges=close_ranges)
    _check_levels(translation)
    endless = _endless(translation)
    if endless:
        raise InvalidSchema(endless)
    if translation.n_merged_patterns > 2 and trials.problem(translation.made, costly=True):
        translation.leave_out_patterns()  # llguidance may take any time to intersect them
    problem = compile_problem(json.dumps(translation.made))
    if "fuel" in problem or "complex" in problem:
        translation.leave_out_patterns()
        problem = compile_problem(json.dumps(translation.made))
    return translation, problem


def _check_levels(translation: Translation) -> None:
    """llguidance compiles what a schema refers to inside it, once each, on the stack."""
    entered: set[int] = set()
    stack: list[Iterator[Any]] = [iter([translation.made])]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
        elif isinstance(node, dict) and id(node) not in entered:
            entered.add(id(node))
            inner = [one for keys, one in subschemas(node) if keys[0] != "$defs"]
            if "$ref" in node:
                inner.append(translation.defs[node["$ref"].removeprefix("#/$defs/")])
            stack.append(iter(inner))
            if len(stack) > _MAX_LEVELS:
                field = translation.fields.get(id(node), "$")
                raise InvalidSchema(
                    f"refers from one schema to the next through more than {_MAX_LEVELS} levels, at '{field:.60}...'; "
                    "make it flatter."
                )


def _alone(translation: Translation, made: Schema) -> str:
    """A part of the schema as a schema, with what it refers to."""
    return json.dumps({**made, "$defs": translation.defs})


def _culprit(translation: Translation) -> str:
    """The field of the innermost schema that llguidance cannot hold an answer to."""
    made, field = translation.made, "$"
    seen: set[int] = set()
    while id(made) not in seen:
        seen.add(id(made))
        field = translation.fields.get(id(made), field)
        inner = [one for keys, one in subschemas(made) if keys[0] != "$defs"]
        if "$ref" in made:
            inner.append(translation.defs[made["$ref"].removeprefix("#/$defs/")])
        parts = [one for one in inner[:_MANY] if isinstance(one, dict)]
        made = next((one for one in parts if validation_problem(_alone(translation, one))), made)
    return field


def _endless(translation: Translation) -> str:
    """Says which part of a schema demands another of itself, so that no instance has an end; empty if none does."""
    nodes: list[Schema] = []
    waiting: list[Any] = [translation.made]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            nodes.append(node)
            waiting += [inner for _, inner in subschemas(node)]
    ending: set[int] = set()  # ids of the nodes with an instance that has an end
    n_before = -1
    nodes.reverse()  # inner ones first, so that few rounds are needed
    while len(ending) > n_before:
        n_before = len(ending)
        ending |= {id(node) for node in nodes if id(node) not in ending and _ends(node, translation.defs, ending)}
    for node in reversed(nodes):
        if id(node) not in ending:
            return (
                f"has no value that ends: every value of '{translation.fields.get(id(node), '$')}' holds another one, "
                "without end. Let the part that refers back be optional, or null, or an empty list."
            )
    return ""


def _ends(node: Schema, defs: dict[str, Any], ending: set[int]) -> bool:
    def known(inner: Any) -> bool:
        return not isinstance(inner, dict) or id(inner) in ending

    properties = node.get("properties", {})
    demanded = [properties[name] for name in node.get("required", []) if name in properties]
    if node.get("minItems", 0) > 0:
        first = node.get("prefixItems", [])
        demanded += [*first[: node["minItems"]], *([node.get("items")] if len(first) < node["minItems"] else [])]
    if "$ref" in node:
        demanded.append(defs[node["$ref"].removeprefix("#/$defs/")])
    demanded += node.get("allOf", [])
    if not all(known(inner) for inner in demanded):
        return False
    return all(any(known(inner) for inner in node[key]) for key in ("anyOf", "oneOf") if node.get(key))
