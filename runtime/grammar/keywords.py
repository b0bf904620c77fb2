"""Interprets the keywords of one JSON Schema, without looking at its subschemas."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from granite4v.runtime.grammar.json_schema import REFERENCES, TYPES

Schema = dict[str, Any]

COMBINING = ("anyOf", "oneOf", "allOf", *REFERENCES)
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "required")
# llguidance cannot express these
CHECKED_AFTERWARDS = (
    "not", "if", "contains", "uniqueItems", "propertyNames", "dependentSchemas", "dependentRequired", "dependencies",
    "unevaluatedProperties", "unevaluatedItems", "disallow", "extends",
)  # fmt: skip
_ANNOTATIONS = (
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
    "$defs", "definitions", "$schema", "$id", "$anchor", "discriminator", "xml", "externalDocs",
)  # fmt: skip


def restrictions(node: Schema) -> list[str]:
    """The keywords of a schema that may restrict values."""
    return [key for key in node if key not in _ANNOTATIONS and not key.startswith("x-")]


def has_effect(keyword: str, node: Schema) -> bool:
    """Whether a keyword of `CHECKED_AFTERWARDS` restricts anything."""
    if keyword not in node:
        return False
    value = node[keyword]
    if keyword == "if":
        return "then" in node or "else" in node
    if keyword == "contains":
        return node.get("minContains") != 0 or "maxContains" in node
    if keyword == "uniqueItems":
        return value is True
    if keyword in ("unevaluatedProperties", "unevaluatedItems", "propertyNames"):
        return value not in (True, {})
    return keyword in ("not", "extends", "disallow") or bool(value)


def merges(node: Schema) -> bool:
    """Whether several schemas apply to the same object here."""
    n_combining = sum(key in node for key in COMBINING)
    return "allOf" in node or n_combining > 1 or (n_combining == 1 and any(key in node for key in _OF_OBJECTS))


def combines(node: Schema) -> bool:
    return any(key in node for key in (*COMBINING, "if", "dependentSchemas", "not"))


def kinds(node: Schema) -> list[str] | None:
    """The types that the schema names; None if it allows any."""
    named = node.get("type")
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(kind in TYPES for kind in named):
        return None
    return list(dict.fromkeys(named))


def required(node: Schema) -> list[str]:
    names = node.get("required", [])
    names = list(dict.fromkeys(names)) if isinstance(names, list) else []
    for name, inner in node.get("properties", {}).items():  # draft 3
        if isinstance(inner, dict) and inner.get("required") is True and name not in names:
            names.append(name)
    return names


def only(node: Schema, keywords: Iterable[str]) -> Schema:
    return {key: node[key] for key in keywords if key in node}


def distinct(schemas: Iterable[Any]) -> list[Any]:
    """The schemas without duplicates."""
    return list({json.dumps(schema, sort_keys=True): schema for schema in schemas}.values())
