"""Checks whether schemas, as `translation` makes them, are mutually exclusive: no value is an instance of two."""

from __future__ import annotations

import json
from typing import Any

Schema = dict[str, Any]

_MAX_COMPARED = 60  # schemas; comparing all pairs of more would take too long
_KINDS = {"null", "boolean", "number", "string", "array", "object"}


def are_disjoint(schemas: list[Any], defs: dict[str, Any]) -> bool:
    """True if the schemas are certainly mutually exclusive, False if that is unknown."""
    found = [_target(schema, defs) for schema in schemas]
    if _is_discriminated(found, defs):
        return True
    if len(found) > _MAX_COMPARED:
        return False
    return all(_differ(one, other, defs) for i, one in enumerate(found) for other in found[:i])


def _target(schema: Any, defs: dict[str, Any]) -> Schema:
    """The schema with its reference resolved."""
    for _ in range(_MAX_COMPARED):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        target = defs.get(schema["$ref"].removeprefix("#/$defs/"))
        if not isinstance(target, dict):
            break
        required = [*target.get("required", []), *beside.get("required", [])]
        schema = {**target, **({"required": required} if required else {})}
    return schema if isinstance(schema, dict) else {}


def _is_discriminated(schemas: list[Schema], defs: dict[str, Any]) -> bool:
    """Whether some required property has different values in each schema."""
    for name in schemas[0].get("properties", {}) if schemas else ():
        values: list[str] = []
        for schema in schemas:
            inner = _target(schema.get("properties", {}).get(name), defs)
            if schema.get("type") != "object" or name not in schema.get("required", []) or "enum" not in inner:
                break
            values += {_key(value) for value in inner["enum"]}
        else:
            if len(set(values)) == len(values):
                return True
    return False


def _differ(one: Schema, other: Schema, defs: dict[str, Any], depth: int = 0) -> bool:
    """Whether it is certain that no value is an instance of both."""
    if not _types(one) & _types(other):
        return True
    if "enum" in one and "enum" in other:
        return not {_key(value) for value in one["enum"]} & {_key(value) for value in other["enum"]}
    if _types(one) | _types(other) != {"object"} or depth > 3:
        return False
    left, right = one.get("properties", {}), other.get("properties", {})
    required = {*one.get("required", []), *other.get("required", [])}
    return any(
        name in required and _differ(_target(left[name], defs), _target(right[name], defs), defs, depth + 1)
        for name in left
        if name in right
    )


def _types(schema: Schema) -> set[str]:
    if "enum" in schema:
        return {_type(value) for value in schema["enum"]}
    kinds = schema.get("type", list(_KINDS))
    return {"number" if kind == "integer" else kind for kind in ([kinds] if isinstance(kinds, str) else kinds)}


def _type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "number")


def _key(value: Any) -> str:
    """A text that is the same for numbers that are equal in JSON Schema, such as 1 and 1.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)
