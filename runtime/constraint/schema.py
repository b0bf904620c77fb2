"""JSON schemas of answers: checked, translated for llguidance, and tried.

An answer is one line as Python's json.dumps writes it, so keys and what stands between values are never the model's
choice.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from granite4v.errors import ConstraintError
from granite4v.runtime.constraint.grammar_text import lark_grammar, validation_problem
from granite4v.runtime.constraint.json_schema import InvalidSchema, read_schema, subschemas
from granite4v.runtime.constraint.leaves import Impossible
from granite4v.runtime.constraint.translation import Translation
from granite4v.runtime.constraint.trial import try_grammars

Schema = dict[str, Any]

_MANY = 50  # schemas in one, that are each tried by themselves
_WHAT_TO_DO = "Change the schema, or let answers be free (--free; free=True in Python)."


class Definite(NamedTuple):
    """The schema that answers are held to, as JSON text, and what it leaves to be checked afterwards."""

    text: str
    warnings: tuple[str, ...]


def definite(schema: object) -> Definite:
    """The schema as llguidance takes it, its objects closed and its properties that may be null required.

    Raises ConstraintError unless it is a valid schema, and where no answer could satisfy it.
    """
    try:
        translation = Translation(read_schema(schema))
    except InvalidSchema as error:
        raise ConstraintError(f"the JSON schema {error}") from None
    except Impossible as error:
        raise ConstraintError(f"no answer can satisfy the JSON schema at {error}. {_WHAT_TO_DO}") from None
    endless = _endless(translation)
    if endless:
        raise ConstraintError(endless)
    if len(translation.merged_patterns) > 2:  # llguidance may take any time to intersect them
        grammar = lark_grammar(json.dumps(translation.made))
        if try_grammars([grammar])[0]:
            translation.leave_out_merged_patterns()
    problem = validation_problem(json.dumps(translation.made))
    if problem:
        where = _culprit(translation)
        raise ConstraintError(f"answers cannot be held to the JSON schema at '{where}': {problem}. {_WHAT_TO_DO}")
    return Definite(json.dumps(translation.made), translation.warnings)


def _alone(translation: Translation, made: Schema) -> str:
    """A part of the schema as a schema, with what it refers to."""
    return json.dumps({**made, "$defs": translation.defs})


def _culprit(translation: Translation) -> str:
    """The field of the innermost schema that llguidance cannot hold an answer to."""
    made: Any = translation.made
    field = "$"
    while True:
        inner = [one for keys, one in subschemas(made) if keys[0] != "$defs" and isinstance(one, dict)]
        if "$ref" in made:
            inner.append(translation.defs[made["$ref"].removeprefix("#/$defs/")])
        wrong = next((one for one in inner[:_MANY] if validation_problem(_alone(translation, one))), None)
        if wrong is None or wrong is made or ("$ref" in wrong and wrong["$ref"] == made.get("$ref")):
            return field
        made = wrong
        field = translation.fields.get(id(made), field)


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
                f"every value of '{translation.fields.get(id(node), '$')}' in the JSON schema holds another one, "
                "without end; let the part that refers back be optional, or null, or an empty list."
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
