"""Prepares JSON Schemas of answers: checks them, translates them for llguidance, and compiles them once as a test.

An answer is one line as Python's json.dumps writes it, so the model never chooses white space or punctuation.
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

_MAX_LEVELS = 200  # of nested schemas; llguidance needs up to 16 KB of stack for each
_MAX_TRIED = 50  # subschemas of one schema, each tried alone to find the faulty one
_WHAT_TO_DO = "Change the schema, or turn the constraint off (--unconstrained; unconstrained=True in Python)."


class Definite(NamedTuple):
    """The schema that is enforced, as JSON text, and warnings about what has to be validated afterwards."""

    text: str
    warnings: tuple[str, ...]


def checked_schema(value: object) -> JsonSchema:
    """Reads a schema from plain data. Raises ConstraintError for an invalid one."""
    try:
        return read_schema(value)
    except InvalidSchema as error:
        raise ConstraintError(f"the JSON schema {error}") from None


def definite(schema: object) -> Definite:
    """The schema as llguidance can enforce it, with closed objects and every property that may be null required.

    `schema`: plain data, or a JsonSchema. Raises ConstraintError for a schema that is invalid, that no answer can
    satisfy, or that llguidance cannot enforce.
    """
    try:
        checked = schema if isinstance(schema, JsonSchema) else checked_schema(schema)
        with Trials() as trials:
            translation, problem = _tried(checked, trials, close_ranges=True)
            if "too large" in problem:  # llguidance's words; it has no error codes
                translation, problem = _tried(checked, trials, close_ranges=False)
    except InvalidSchema as error:
        raise ConstraintError(f"the JSON schema {error}") from None
    except Impossible as error:
        raise ConstraintError(f"no answer can satisfy the JSON schema at {error}.", _WHAT_TO_DO) from None
    if problem:
        if translation.impossible:
            problem += f"; no value is possible at {translation.impossible[0]}"
        where = _culprit(translation)
        raise ConstraintError(f"the JSON schema cannot be enforced at '{where}': {problem}.", _WHAT_TO_DO)
    return Definite(json.dumps(translation.made), translation.warnings)


def _tried(schema: JsonSchema, trials: Trials, *, close_ranges: bool) -> tuple[Translation, str]:
    """A translation, and the reason why llguidance cannot enforce it; empty if it can."""
    translation = Translation(schema, trials, close_ranges=close_ranges)
    _check_levels(translation)
    endless = _endless(translation)
    if endless:
        raise InvalidSchema(endless)
    if translation.n_merged_patterns > 2 and trials.problem(translation.made, costly=True):
        translation.leave_out_patterns()  # there is no bound on the time llguidance may take to intersect them
    problem = compile_problem(json.dumps(translation.made))
    if "fuel" in problem or "complex" in problem:  # llguidance's words; it has no error codes
        translation.leave_out_patterns()
        problem = compile_problem(json.dumps(translation.made))
    return translation, problem


def _check_levels(translation: Translation) -> None:
    """Raises InvalidSchema for a chain of references that would overflow llguidance's stack.

    llguidance compiles each schema once, recursively, inside the first one that refers to it.
    """
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
    """A part of the schema as a schema of its own, with the definitions it refers to."""
    return json.dumps({**made, "$defs": translation.defs})


def _culprit(translation: Translation) -> str:
    """The field of the innermost schema that llguidance cannot enforce."""
    made, field = translation.made, "$"
    seen: set[int] = set()
    while id(made) not in seen:
        seen.add(id(made))
        field = translation.fields.get(id(made), field)
        inner = [one for keys, one in subschemas(made) if keys[0] != "$defs"]
        if "$ref" in made:
            inner.append(translation.defs[made["$ref"].removeprefix("#/$defs/")])
        parts = [one for one in inner[:_MAX_TRIED] if isinstance(one, dict)]
        made = next((one for one in parts if validation_problem(_alone(translation, one))), made)
    return field


def _endless(translation: Translation) -> str:
    """Says which part of a schema always requires another instance of itself, so that no instance is finite; empty if
    none.

    Finds the schemas that do have a finite instance, in rounds: one is added when all that it requires is known to.
    """
    nodes: list[Schema] = []
    waiting: list[Any] = [translation.made]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            nodes.append(node)
            waiting += [inner for _, inner in subschemas(node)]
    ending: set[int] = set()  # ids of the nodes known to have a finite instance
    n_before = -1
    nodes.reverse()  # inner ones first, so that few rounds are needed
    while len(ending) > n_before:
        n_before = len(ending)
        ending |= {id(node) for node in nodes if id(node) not in ending and _ends(node, translation.defs, ending)}
    for node in reversed(nodes):
        if id(node) not in ending:
            return (
                f"has no finite value: every value of '{translation.fields.get(id(node), '$')}' contains another one, "
                "without end. Let the part that refers back be optional, or null, or an empty list."
            )
    return ""


def _ends(node: Schema, defs: dict[str, Any], ending: set[int]) -> bool:
    """Whether a schema has a finite instance, given the ids of those known to have one."""

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
