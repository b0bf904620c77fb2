"""Translates the keywords for objects: their properties, and which others are allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from granite4v.runtime.grammar import keywords as of
from granite4v.runtime.grammar.json_schema import REFERENCES, Resolved, listed, subschemas
from granite4v.runtime.grammar.leaves import Impossible
from granite4v.runtime.grammar.left_out import LeftOut

if TYPE_CHECKING:
    from granite4v.runtime.grammar.translation import Translation

Schema = dict[str, Any]

_MAX_KEY_PATTERNS = 50  # of one object; llguidance compares every pair
# keywords that mention properties which only some instances have
_CONDITIONAL = ("if", "then", "else", "dependentSchemas", "dependencies", "dependentRequired")


class Place:
    """A schema that is being translated. `field` is its place in an answer."""

    def __init__(self, found: Resolved, node: Schema, field: str, merged: bool, nesting: int) -> None:
        self.found, self.node, self.field, self.merged = found, node, field, merged
        self.nesting = nesting
        self.has_patterns = False
        self.held: set[str] = set()  # keywords of CHECKED_AFTERWARDS that are enforced after all


def add_object(of_schema: Translation, made: Schema, place: Place) -> None:
    node = place.node
    properties = {name: of_schema.part(place, inner, f".{name}") for name, inner in node.get("properties", {}).items()}
    required = of.required(node)
    others = node.get("additionalProperties")
    if "patternProperties" not in node:
        if others is False:
            _check_required(node, required, properties)
        elif node.get("unevaluatedProperties") is False and others is None and not place.merged:
            conditional = {name for name, _ in _conditional_properties(of_schema, place)}
            _check_required(node, required, {*properties, *conditional})
    if others is not None:
        made["additionalProperties"] = of_schema.part(place, others, ".*")
    if "patternProperties" in node:
        _add_pattern_properties(of_schema, made, place)
    elif not properties and _names_keys(of_schema, made, place):
        return
    if _is_closed(of_schema, place):
        for name, inner in _conditional_properties(of_schema, place):
            properties.setdefault(name, inner)
        properties |= {name: True for name in required if name not in properties}
        if "additionalProperties" not in made:
            made["additionalProperties"] = False
            if "enum" not in made:
                made.setdefault("type", "object")
        given = node.get("properties", {})
        required += [
            name
            for name, inner in given.items()
            if name not in required and of_schema.accepts_null(of_schema.schema.inside(inner, place.found.resolver))
        ]
    if properties:
        made["properties"] = properties
    if required:
        made["required"] = required
    _add_counts(of_schema, made, place)


def _check_required(node: Schema, required: list[str], allowed: Iterable[str]) -> None:
    """Raises Impossible if a required property is not allowed."""
    missing = [name for name in required if name not in allowed]
    if missing and of.kinds(node) == ["object"]:
        raise Impossible(f"it requires {listed(missing)}, which is not one of its properties, and allows no others")


def _is_closed(of_schema: Translation, place: Place) -> bool:
    node = place.node
    if place.merged or not node.get("properties") or "patternProperties" in node or "maxProperties" in node:
        return False
    if node.get("unevaluatedProperties") is False:
        place.held.add("unevaluatedProperties")
        return True
    return "unevaluatedProperties" not in node


def closing(of_schema: Translation, place: Place) -> list[Schema]:
    """For 'unevaluatedProperties': false, a schema that allows only properties that some combined schema names."""
    node = place.node
    if node.get("unevaluatedProperties") is not False or "unevaluatedProperties" in place.held:
        return []
    parts = list(_same_value(of_schema, place.found, node))
    if any("patternProperties" in part or part.get("additionalProperties", False) is not False for part in parts):
        return []
    if not any(key in part for part in parts for key in ("anyOf", "oneOf", "if")):
        place.held.add("unevaluatedProperties")
    names = [name for part in parts for name in (*part.get("properties", {}), *of.required(part))]
    return [{"properties": dict.fromkeys(names, True), "additionalProperties": False}]


def _conditional_properties(of_schema: Translation, place: Place) -> Iterable[tuple[str, Any]]:
    """The properties that conditional keywords mention; a closed object has to allow them."""
    node = place.node
    for keyword in _CONDITIONAL:
        value = node.get(keyword)
        named = value.items() if isinstance(value, dict) and keyword.startswith("dep") else [("", value)]
        for trigger, inner in named:
            if trigger:
                yield trigger, True
            if isinstance(inner, list):
                yield from ((name, True) for name in inner if isinstance(name, str))
            elif isinstance(inner, dict):
                yield from ((name, True) for name in _properties_of(of_schema, place.found, inner))


def _properties_of(of_schema: Translation, found: Resolved, node: Schema) -> Iterable[str]:
    """The names of the properties in a schema and in those it combines."""
    for part in _same_value(of_schema, of_schema.schema.inside(node, found.resolver), node):
        yield from part.get("properties", {})
        yield from of.required(part)


def _same_value(of_schema: Translation, found: Resolved, node: Schema) -> Iterable[Schema]:
    """A schema and those it combines; all of them apply to the same value."""
    waiting = [Resolved(node, found.resolver)]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if not isinstance(one.node, dict) or id(one.node) in seen:
            continue
        seen.add(id(one.node))
        yield one.node
        waiting += [
            of_schema.schema.inside(inner, one.resolver)
            for keys, inner in subschemas(one.node)
            if keys[0] in ("anyOf", "oneOf", "allOf", "if", "then", "else", "dependentSchemas")
        ]
        waiting += [of_schema.follow(one, one.node, key) for key in REFERENCES if isinstance(one.node.get(key), str)]


def _add_pattern_properties(of_schema: Translation, made: Schema, place: Place) -> None:
    patterns: dict[str, Any] = place.node["patternProperties"]
    parts = {pattern: of_schema.part(place, inner, f".{{{pattern}}}") for pattern, inner in patterns.items()}
    outline = {"type": "object", "patternProperties": dict.fromkeys(parts, True), "additionalProperties": False}
    if len(parts) <= _MAX_KEY_PATTERNS and not of_schema.trials.problem(outline, costly=len(parts) > 10):
        made["patternProperties"] = parts
        return
    of_schema.leave_out(LeftOut("'patternProperties'"), place.field)
    others = made.get("additionalProperties", True)
    choices = of.distinct([*parts.values(), *([] if others is False else [others])])
    made["additionalProperties"] = {"anyOf": choices}


def _names_keys(of_schema: Translation, made: Schema, place: Place) -> bool:
    """Enforces 'propertyNames' for the keys of a map if it lists them or has a pattern; returns whether it does."""
    if (
        not isinstance(place.node.get("propertyNames"), dict)
        or "propertyNames" not in of_schema.schema.dialect.VALIDATORS
    ):
        return False
    of_names = of_schema.schema.inside(place.node["propertyNames"], place.found.resolver)
    while isinstance(of_names.node, dict) and of.restrictions(of_names.node) == ["$ref"]:
        of_names = of_schema.follow(of_names, of_names.node, "$ref")
    keys = of_names.node if isinstance(of_names.node, dict) else {}
    values = made.get("additionalProperties", True)
    if values is False:
        return False
    names = [name for name in keys.get("enum", [keys.get("const")]) if isinstance(name, str)]
    restricted = of.restrictions(keys)
    if names:
        shared = of_schema.shared(values)
        made["properties"] = dict.fromkeys(names, shared)
        made["additionalProperties"] = False
    elif isinstance(keys.get("pattern"), str) and not of_schema.trials.problem(
        {"type": "object", "patternProperties": {keys["pattern"]: True}, "additionalProperties": False}, costly=True
    ):
        made["patternProperties"] = {keys["pattern"]: values}
        made["additionalProperties"] = False
    else:
        return False
    if set(restricted) <= {"enum", "const", "pattern", "type"}:
        place.held.add("propertyNames")
    if of.required(place.node):
        made["required"] = of.required(place.node)
    _add_counts(of_schema, made, place)
    return True


def _add_counts(of_schema: Translation, made: Schema, place: Place) -> None:
    found = of.only(place.node, ("minProperties", "maxProperties"))
    counts = {name: int(min(value, 10**9)) for name, value in found.items()}
    if not counts or counts == {"minProperties": 0}:
        return
    outline = {
        "type": "object",
        "properties": dict.fromkeys(made.get("properties", {}), True),
        "required": made.get("required", []),
        "additionalProperties": made.get("additionalProperties") is not False,
        **counts,
    }
    if of_schema.trials.problem(outline):
        for name in counts:
            of_schema.leave_out(LeftOut(f"'{name}'"), place.field)
    else:
        made.update(counts)
