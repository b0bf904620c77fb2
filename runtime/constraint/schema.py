"""JSON schemas: checked, made definite, and written as llguidance takes them.

An answer is one line as Python's json.dumps writes it, so keys and what stands between values are never the model's
choice. Objects have the properties their schema names and no others, unless it speaks of others; a property that may
be null is always there. Both leave only instances that the schema allows, and are what the prompt asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from granite4v.errors import ConstraintError

Schema = dict[str, Any]

# no \u escapes: half a surrogate pair is JSON, but no text
_LAYOUT = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_OF_ONE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains")
_COMBINING = ("anyOf", "oneOf", "allOf", "$ref", "$dynamicRef")
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "required")
_WITHOUT_EFFECT = {"uniqueItems": False, "minContains": 0, "unevaluatedProperties": True, "unevaluatedItems": True}
_MOST_REFERENCES = 20  # one leading to the next


def definite(schema: object) -> str:
    """The schema as JSON text, its objects closed and its properties that may be null required.

    Raises ConstraintError unless it is a schema, or when it asks for what answers cannot be held to.
    """
    checked = _checked(schema)
    text = json.dumps(checked)
    if not _refers_where_merged(checked):  # there, whether an object can be closed depends on who refers to it
        closed = json.dumps(_closed(checked, checked))
        if not _problem(closed):
            return closed
    problem = _problem(text)
    if problem:
        raise ConstraintError(problem)
    return text


def _checked(schema: object) -> Schema:
    import jsonschema

    if not isinstance(schema, dict):
        raise ConstraintError(f"the JSON schema is {_shown(schema)}; expected an object such as {{'type': 'object'}}.")
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        json.dumps(schema, allow_nan=False)
        endless = _endless(schema)
    except jsonschema.SchemaError as error:
        where = "".join(f"/{part}" for part in error.absolute_path) or "its top"
        raise ConstraintError(f"this is no JSON schema, at '{where}': {error.message}. Correct the schema.") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"the JSON schema cannot be written as JSON ({error}); give it as JSON data.") from None
    if endless:
        raise ConstraintError(endless)
    return schema


def lark_grammar(schema_text: str) -> str:
    """llguidance's grammar of the instances of a schema. Masks hold every spelling, not the tokenizer's alone."""
    schema = {**_pruned(json.loads(schema_text)), "x-guidance": _LAYOUT}
    return '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps(schema)


def _problem(schema_text: str) -> str:
    """Why llguidance cannot hold an answer to a schema; empty if it can."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(lark_grammar(schema_text), None)
    if not failed:
        return ""
    found = re.search(r"failed to compile JSON schema: (.*?)(?=\n +\d+ \| |\Z)", messages[0], re.DOTALL)
    reason = found[1].strip() if found else messages[0]
    keys = re.search(r"Unimplemented keys: \[(.*)\]", reason)
    if keys:
        named = keys[1].replace('"', "'")
        return f"answers cannot be held to the keyword {named} of the JSON schema; leave it out, or answer freely."
    if "oneOf" in reason:
        reason = "the alternatives of a 'oneOf' can be true at once; write 'anyOf' where that does no harm"
    return f"answers cannot be held to the JSON schema: {reason}. Change the schema, or answer freely."


def _endless(schema: Schema) -> str:
    """Says which part of a schema demands another of itself, so that no instance has an end; empty if none does."""
    nodes: list[Schema] = []

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            nodes.append(node)
            _mapped(node, collect)

    collect(schema)
    ending: set[int] = set()  # ids of the nodes with an instance that has an end
    n_before = -1
    while len(ending) > n_before:
        n_before = len(ending)
        ending |= {id(node) for node in nodes if _ends(node, schema, ending)}
    for node in nodes:
        if id(node) not in ending:
            return (
                f"every instance of {json.dumps(node):.120} holds another one, without end; let the part that refers "
                "back be optional, or null, or an empty list."
            )
    return ""


def _ends(node: Schema, root: Schema, ending: set[int]) -> bool:
    def known(inner: Any) -> bool:
        return not isinstance(inner, dict) or id(inner) in ending

    properties = node.get("properties", {})
    demanded = [properties[name] for name in node.get("required", []) if name in properties]
    if node.get("minItems", 0) > 0:
        first = node.get("prefixItems", [])
        demanded += [*first[: node["minItems"]], *([node.get("items")] if len(first) < node["minItems"] else [])]
    if "$ref" in node:
        demanded.append(_resolved(node["$ref"], root))
    demanded += node.get("allOf", [])
    if not all(known(inner) for inner in demanded):
        return False
    return all(any(known(inner) for inner in node[key]) for key in ("anyOf", "oneOf") if node.get(key))


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


# --- from a schema to what it says for certain ---


def _mapped(node: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a node with `change` applied to every schema directly in it."""
    if not isinstance(node, dict):
        return node
    made = dict(node)
    for key, value in node.items():
        if key in _OF_NAMES and isinstance(value, dict):
            made[key] = {name: change(inner) for name, inner in value.items()}
        elif key in _OF_SCHEMAS and isinstance(value, list):
            made[key] = [change(inner) for inner in value]
        elif key in _OF_ONE and isinstance(value, dict):
            made[key] = change(value)
    return made


def _refers_where_merged(node: Any, merged: bool = False) -> bool:
    """Whether what a '$ref' points to is merged with other schemas of the same object."""
    if not isinstance(node, dict):
        return False
    merged = merged or _merges(node)
    inner: list[Any] = []
    _mapped(node, inner.append)
    return (merged and "$ref" in node) or any(_refers_where_merged(one, merged) for one in inner)


def _merges(node: Schema) -> bool:
    """Whether several schemas speak of the same object here."""
    n_combining = sum(key in node for key in _COMBINING)
    return "allOf" in node or n_combining > 1 or (n_combining == 1 and any(key in node for key in _OF_OBJECTS))


def _pruned(node: Any) -> Any:
    """Without keywords that say nothing."""
    if isinstance(node, dict):
        node = {k: v for k, v in node.items() if not (k in _WITHOUT_EFFECT and v is _WITHOUT_EFFECT[k])}
    return _mapped(node, _pruned)


def _closed(node: Any, root: Schema) -> Any:
    if not isinstance(node, dict) or _merges(node):
        return node
    made = _mapped(node, lambda inner: _closed(inner, root))
    properties = made.get("properties")
    others = ("patternProperties", "unevaluatedProperties", "maxProperties")
    if not properties or any(key in made for key in others):
        return made
    required = made.get("required", [])
    if "additionalProperties" not in made:
        made["properties"] = {**properties, **{name: {} for name in required if name not in properties}}
        made["additionalProperties"] = False
        made.setdefault("type", "object")
    nullable = [name for name, inner in properties.items() if _takes_null(inner, root)]
    if nullable:
        made["required"] = [*required, *(name for name in nullable if name not in required)]
    return made


def _takes_null(node: Any, root: Schema, n_references: int = 0) -> bool:
    """Whether null is certainly an instance."""
    if not isinstance(node, dict):
        return node is True
    checks: list[bool] = []
    if "type" in node:
        checks.append("null" in node["type"] if isinstance(node["type"], list) else node["type"] == "null")
    if "enum" in node:
        checks.append(None in node["enum"])
    if "const" in node:
        checks.append(node["const"] is None)
    for key in ("anyOf", "oneOf"):
        if key in node:
            checks.append(any(_takes_null(inner, root, n_references) for inner in node[key]))
    if "allOf" in node:
        checks.append(all(_takes_null(inner, root, n_references) for inner in node["allOf"]))
    if "$ref" in node:
        target = _resolved(node["$ref"], root)
        checks.append(n_references < _MOST_REFERENCES and _takes_null(target, root, n_references + 1))
    return all(checks) and not any(key in node for key in ("not", "if", "$dynamicRef"))


def _resolved(reference: str, root: Schema) -> Any:
    """What a reference within the schema points to; False for any other."""
    target: Any = root
    if not reference.startswith("#"):
        return False
    for part in filter(None, reference[1:].split("/")):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict) and name in target:
            target = target[name]
        elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
            target = target[int(name)]
        else:
            return False
    return target
