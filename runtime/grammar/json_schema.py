"""Reads JSON Schemas of any draft: checks their size first, determines the draft, and resolves references.

Knows nothing about grammars. Each pass visits every part of a schema once and recursion is bounded, so that no schema
can crash the process or keep it busy. The limits are far above what fits into a model's context.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import referencing.jsonschema
from jsonschema import validators
from jsonschema.exceptions import best_match
from jsonschema.validators import Draft3Validator, Draft4Validator, Draft6Validator, Draft7Validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from granite4v.runtime.grammar.patterns import pattern_problem

Schema = dict[str, Any]

MAX_CHARACTERS = 1_000_000  # of the schema as JSON; about 250,000 tokens, more than any context holds
MAX_NESTING = 200  # levels of objects and lists
MAX_LEVELS = 80  # of nested schemas, and of references in a chain
MAX_SUBSCHEMAS = 5_000  # llguidance takes seconds for this many
MAX_DIGITS = 400  # of an integer; beyond the largest float

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLES = (
    "items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties",
    "propertyNames", "not", "if", "then", "else",
)  # fmt: skip
# keywords whose subschemas apply to the same value as the schema around them
IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies")
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_ANNOTATIONS = ("title", "description", "default", "examples", "$comment")
_STAYING = (
    "$schema",
    "$id",
    "id",
    "$anchor",
    "$dynamicAnchor",
    "$defs",
    "definitions",
)  # these have to stay where references find them

Path = tuple[str | int, ...]


class InvalidSchema(ValueError):
    """Raised when something cannot be used as a JSON Schema.

    The message lacks its subject, the source of the schema: 'is not ...'.
    """


@dataclass(frozen=True)
class Resolved:
    """A schema, and the resolver for the references in it."""

    node: Any
    resolver: Any


@dataclass(frozen=True)
class JsonSchema:
    """A valid schema. `content` is plain JSON data, in which 'nullable' has been replaced by the type 'null'.

    `dialect` is jsonschema's validator class for the draft. `notes` are messages to the author of the schema.
    """

    content: Schema
    dialect: Any
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def root(self) -> Resolved:
        resource = self._specification.create_resource(self.content)
        return Resolved(self.content, Registry().resolver_with_root(resource))

    def inside(self, node: Any, resolver: Any) -> Resolved:
        """A schema inside another one. Its '$id' may change the base URI of references.

        Raises InvalidSchema for an '$id' that is not a URI.
        """
        if isinstance(node, dict) and isinstance(node.get("$id", node.get("id")), str):
            try:
                resolver = resolver.in_subresource(self._specification.create_resource(node))
            except ValueError as error:
                raise InvalidSchema(f"has an '$id' that is not a URI: {error}.") from None
        return Resolved(node, resolver)

    def follow(self, reference: str, resolver: Any) -> Resolved:
        """The target of a reference. Raises InvalidSchema, whose message does not say where the reference is."""
        try:
            found = resolver.lookup(reference)
        except (Unresolvable, ValueError, LookupError, TypeError, AttributeError) as error:
            outside = "" if reference.startswith("#") else "; granite4v fetches nothing"
            raise InvalidSchema(
                f"refers to '{reference:.100}', which is not in it{outside}. Put the schema under '$defs' and refer "
                "to it as '#/$defs/...'."
            ) from error
        if not isinstance(found.contents, dict | bool):
            raise InvalidSchema(f"refers to '{reference:.100}', which is {_shown(found.contents)}; expected a schema.")
        return self.inside(found.contents, found.resolver)

    @functools.cached_property
    def _specification(self) -> Any:
        return referencing.jsonschema.specification_with(
            self.dialect.ID_OF(self.dialect.META_SCHEMA), default=referencing.Specification.OPAQUE
        )

    @functools.cached_property
    def ignores_siblings(self) -> bool:
        """Whether a '$ref' overrides the keywords next to it, as it did up to draft 7."""
        return self.dialect in (Draft3Validator, Draft4Validator, Draft6Validator, Draft7Validator)


def read_schema(value: object) -> JsonSchema:
    """Reads a schema from plain data and checks it against its draft's meta-schema. Raises InvalidSchema."""
    if not isinstance(value, Mapping):
        raise InvalidSchema(f"is {_shown(value)}; expected a JSON Schema, an object such as {{'type': 'object'}}.")
    content: Schema = _plain(value)
    notes: list[str] = []
    nullable = [_json_path(path) for path, node in _subschemas(content) if _honor_nullable(node)]
    if nullable:
        notes.append(f"'nullable' of OpenAPI is read as \"or null\" at {listed(nullable)}.")
    schema = JsonSchema(content, _dialect(content), tuple(notes))
    _check_references(schema)
    return schema


def subschemas(node: Schema) -> Iterator[tuple[Path, Any]]:
    """Yields the direct subschemas of a schema, valid or not, with the keys that lead to them."""
    for key, value in node.items():
        if key in _MAPS and isinstance(value, dict):
            for name, inner in value.items():
                if key != "dependencies" or not isinstance(inner, list):
                    yield (key, name), inner
        elif key in _LISTS and isinstance(value, list):
            for i, inner in enumerate(value):
                yield (key, i), inner
        elif key in _SINGLES and not isinstance(value, list):
            yield (key,), value


def listed(names: list[str], most: int = 4) -> str:
    """The first few names in quotes, and how many more there are."""
    names = list(dict.fromkeys(names))
    shown = ", ".join(f"'{name:.80}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# --- plain data within limits ---


def _plain(value: Mapping[Any, Any]) -> Schema:
    n_characters = 0

    def copied(value: Any, path: Path) -> Any:
        nonlocal n_characters
        if len(path) > MAX_NESTING:
            raise InvalidSchema(f"is nested more than {MAX_NESTING} levels deep, at '{_json_path(path):.60}...'.")
        n_characters += 2
        if isinstance(value, Mapping):
            return {_key(key, path): copied(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [copied(inner, (*path, i)) for i, inner in enumerate(value)]
        n_characters += len(value) if isinstance(value, str) else 8
        if n_characters > MAX_CHARACTERS:
            raise InvalidSchema(f"is longer than {MAX_CHARACTERS:,} characters; ask for fewer fields at a time.")
        _check_scalar(value, path)
        return value

    def _key(key: Any, path: Path) -> str:
        nonlocal n_characters
        if not isinstance(key, str):
            raise InvalidSchema(f"has the key {_shown(key)} at '{_json_path(path)}'; expected text.")
        n_characters += len(key)
        _check_scalar(key, path)
        return key

    made: Schema = copied(value, ())
    return made


def _check_scalar(value: Any, path: Path) -> None:
    problem = ""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            problem = "a lone surrogate, which is not text; remove it"
    elif isinstance(value, float) and not math.isfinite(value):
        problem = f"{value}, which is not a number in JSON; write a finite number"
    elif isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        problem = f"an integer of more than {MAX_DIGITS} digits; write a smaller one"
    elif value is not None and not isinstance(value, bool | int | float):
        problem = f"{_shown(value)}, which cannot be written as JSON; give it as JSON data"
    if problem:
        raise InvalidSchema(f"has at '{_json_path(path):.120}' {problem}.")


def _json_path(path: Path) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


# --- subschemas ---


def _subschemas(content: Schema) -> Iterator[tuple[Path, Schema]]:
    """Yields every subschema that is an object, with its path.

    Raises InvalidSchema beyond the limits on number and depth.
    """
    waiting: list[tuple[Path, Any, int]] = [((), content, 0)]
    n = 0
    while waiting:
        path, node, level = waiting.pop()
        required = node.get("required") if isinstance(node, dict) else None
        n += 1 + (len(required) if isinstance(required, list) else 0)
        if n > MAX_SUBSCHEMAS:
            raise InvalidSchema(
                f"has more than {MAX_SUBSCHEMAS:,} schemas and required names in it; ask for fewer fields at a time."
            )
        if level > MAX_LEVELS:
            raise InvalidSchema(
                f"has more than {MAX_LEVELS} levels of schemas in one another, at '{_json_path(path):.60}...'; make it "
                "flatter."
            )
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise InvalidSchema(
                f"is not a valid JSON Schema: at '{_json_path(path)}' is {_shown(node)}; expected an object, true or "
                "false."
            )
        yield path, node
        inner = [((*path, *keys), value, level + 1) for keys, value in subschemas(node)]
        waiting += reversed(inner)


def _honor_nullable(node: Schema) -> bool:
    """Replaces OpenAPI's 'nullable' and returns whether it was true."""
    nullable = node.pop("nullable", None) if isinstance(node.get("nullable"), bool) else None
    if not nullable:
        return False
    kinds = node.get("type")
    if isinstance(kinds, str | list):
        node["type"] = list(dict.fromkeys([*([kinds] if isinstance(kinds, str) else kinds), "null"]))
    if isinstance(node.get("enum"), list) and None not in node["enum"]:
        node["enum"] = [*node["enum"], None]
    if any(key in node for key in ("const", "$ref", *IN_PLACE)):
        alone = {key: node.pop(key) for key in list(node) if key not in (*_ANNOTATIONS, *_STAYING)}
        node["anyOf"] = [alone, {"type": "null"}]
    return True


def _dialect(content: Schema) -> Any:
    """The draft that '$schema' names; without '$schema', the newest draft in which the content is a valid schema."""
    newest = validators.Draft202012Validator
    named = content.get("$schema", "")
    if not isinstance(named, str):
        raise InvalidSchema(f"has {_shown(named)} as its '$schema'; expected the URI of a draft.")
    kinds = [validators.validator_for({"$schema": named}, default=newest)]
    if not named:  # OpenAPI 3.0 and older files use keywords of older drafts without naming them
        kinds += [validators.Draft7Validator, validators.Draft4Validator]
        if any(isinstance(node.get("required"), bool) for _, node in _subschemas(content)):
            kinds.append(validators.Draft3Validator)
    problems = []
    for kind in kinds:
        problem = _invalid(content, kind)
        if not problem:
            return kind
        problems.append(problem)
    raise InvalidSchema(f"is not a valid JSON Schema: {problems[0]}.")


def _invalid(content: Schema, kind: Any) -> str:
    """Where and why a schema is invalid in a draft; empty if it is valid."""
    validator = kind(kind.META_SCHEMA)
    known: dict[str, Any] = {}
    for path, node in _subschemas(content):
        alone = _alone(node, kind)
        text = json.dumps(alone)
        if text not in known:
            known[text] = best_match(validator.iter_errors(alone))
        error = known[text]
        wrong = next((key for key in REFERENCES if key in node and not isinstance(node[key], str)), None)
        if wrong is not None:
            return (
                f"at '{_json_path((*path, wrong))}': {_shown(node[wrong])}; expected a reference such as '#/$defs/NAME'"
            )
        if error is not None and error.absolute_path and error.absolute_path[0] == "type":
            return (
                f"at '{_json_path((*path, 'type'))}': {node['type']!r:.60} is not valid; the types are "
                f"{', '.join(TYPES)}"
            )
        if error is not None:
            return f"at '{_json_path((*path, *error.absolute_path))}': {error.message:.300}"
        patterns = [(key, node[key]) for key in ("pattern",) if key in node]
        patterns += [("patternProperties", pattern) for pattern in node.get("patternProperties", {})]
        for key, pattern in patterns:
            problem = pattern_problem(pattern)
            if problem:
                return f"at '{_json_path((*path, key))}': the regular expression {pattern!r:.80} {problem}"
    return ""


def _alone(node: Schema, kind: Any) -> Schema:
    """A schema without its subschemas, which are checked separately, and without what cannot be invalid.

    Values that are certainly valid are replaced by one fixed valid value, so that most of many similar schemas become
    equal and only one of them has to be checked.
    """
    nothing: Any = {} if kind in (Draft3Validator, Draft4Validator) else True
    made = {key: _likely(key, value) for key, value in node.items() if key not in (*_ANNOTATIONS, *REFERENCES, "const")}
    inner: dict[str, set[str | int]] = {}
    for keys, _ in subschemas(node):
        inner.setdefault(str(keys[0]), set()).update(keys[1:])
    for key, names in inner.items():
        value = made[key]
        if isinstance(value, dict) and names and key in _MAPS:
            made[key] = {name: one for name, one in value.items() if name not in names}
        elif isinstance(value, list):
            made[key] = [nothing] if value else []
        elif isinstance(value, dict):
            made[key] = nothing
    return made


def _likely(key: str, value: Any) -> Any:
    if key.endswith(("Length", "Items", "Properties")) and type(value) is int and value >= 0:
        return 0
    if key.endswith(("imum", "Of")) and type(value) in (int, float) and value > 0:
        return 1
    if key in ("pattern", "format") and isinstance(value, str):
        return ""
    if key == "enum" and isinstance(value, list) and value:
        return [0]
    return value


# --- references ---


def _check_references(schema: JsonSchema) -> None:
    """Raises InvalidSchema for a reference that leads nowhere, or back to itself with nothing in between."""
    followed: dict[int, list[int]] = {}  # for each schema, the others that apply to the same value; by id
    paths: dict[int, Path] = {}
    waiting: list[tuple[Path, Resolved]] = [((), schema.root)]
    while waiting:
        path, found = waiting.pop()
        node = found.node
        if not isinstance(node, dict) or id(node) in followed:
            continue
        same: list[int] = []
        followed[id(node)], paths[id(node)] = same, path
        for keys, inner in subschemas(node):
            waiting.append(((*path, *keys), schema.inside(inner, found.resolver)))
            if keys[0] in IN_PLACE:
                same.append(id(inner))
        for key in REFERENCES:
            if isinstance(node.get(key), str):
                try:
                    target = schema.follow(node[key], found.resolver)
                except InvalidSchema as error:
                    raise InvalidSchema(f"cannot be followed: '{_json_path((*path, key))}' {error}") from None
                waiting.append(((*path, key), target))
                same.append(id(target.node))
    _check_ends(followed, paths)


def _check_ends(followed: dict[int, list[int]], paths: dict[int, Path]) -> None:
    """Raises InvalidSchema if references lead back to the same value, or through too many schemas.

    A depth-first search: a schema that is met again while it is on the current path is part of a cycle.
    """
    heights: dict[int, int] = {}  # length of the longest chain that begins at a schema; set when it is left
    for start in followed:
        on_way: set[int] = set()  # the schemas on the current path
        stack: list[tuple[int, bool]] = [(start, False)]  # a schema, and whether all it leads to has been visited
        while stack:
            node, leaving = stack.pop()
            if leaving:
                on_way.discard(node)
                heights[node] = 1 + max((heights.get(inner, 0) for inner in followed[node]), default=0)
                if heights[node] > MAX_LEVELS:
                    raise InvalidSchema(
                        f"refers from one schema to the next more than {MAX_LEVELS} times, at "
                        f"'{_json_path(paths[node]):.60}'; refer to the last one."
                    )
            elif node in on_way:
                raise InvalidSchema(
                    f"refers to itself without end at '{_json_path(paths[node])}': the references lead back to the "
                    "same value. Put the part that repeats into a property or a list."
                )
            elif node not in heights and node in followed:
                on_way.add(node)
                stack.append((node, True))
                stack += [(inner, False) for inner in followed[node]]
