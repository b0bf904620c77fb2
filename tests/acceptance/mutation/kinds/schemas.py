"""JSON Schemas: made up, mutated, and answered by the small embedded model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import edits, samples
from ..case import Case, Result
from ..product import command_line
from ..records import problems, records, strict_json

name = "schemas"
SCHEMA = "schema.json"
run = command_line
Json = Any

FORMATS = (
    "date", "date-time", "time", "duration", "email", "idn-email", "hostname", "ipv4", "ipv6", "uri", "uri-reference",
    "iri", "uuid", "json-pointer", "regex", "int32", "int64", "float", "double", "decimal", "byte", "binary", "color",
    "phone", "currency", "", "%",
)  # fmt: skip
PATTERNS = (
    "^[A-Z]{2}$", r"^\d{4}-\d{2}$", "^(a|b)*c?$", "[0-9]+", "^$", "", ".", "^.{0,3}$", r"\w+\s*", r"^[^\x00-\x1f]*$",
    "^(?=x)", "(?!a)b", "(?<=a)b", r"(a)\1", "(?P<n>a)", "^[a-z", "*", "(", "a{3,1}", "a{1000}", "^(a{30}){30}$",
    r"\p{L}+", r"^[\p{Lu}\d]+$", r"\u00e9", "\u00e9+", "^(?:(?:(?:x?)?)?)$", "[[:alpha:]]", r"^\S+@\S+\.\S+$", r"\Z", "(?i)abc",
)  # fmt: skip
KEYS = ("total", "a", "b", "name", "", " ", "a b", "größe", "金額", '"', "\\", "$ref", "type", "properties", "\n", "0")
NUMBERS = (0, 1, -1, 2, 10, 0.1, 0.01, 1.5, -0.0, 1e-9, 100, 2**31, 2**53 + 1, 2**64, 1e308, -1e308, 10**40)


def prepare(bases: Path) -> None:
    """Nothing: a page is drawn in each case."""


def build(rng: random.Random, bases: Path, folder: Path) -> Case:
    samples.write_page(folder / samples.PAGE)
    schema = _root(rng)
    if rng.random() < 0.45:
        data, what = edits.edit_json_text(rng, schema)
    else:
        data, what = edits.dump_json(schema), "made up"
    (folder / SCHEMA).write_bytes(data)
    n_tokens = str(rng.choice((1, 5, 20, 20, 60, 120)))
    command = ["extract", samples.PAGE, "--task", "kvp", "--schema", SCHEMA, "--max-tokens", n_tokens]
    command += ["--threads", "1", "--out", "out", *rng.choice(([], [], ["--report"], ["--free"]))]
    return Case([what, data[:300].decode("utf-8", "replace")], [command])


def check(folder: Path, case: Case, results: list[Result]) -> list[str]:
    """Answers that are said to be valid must be, by the judge that the schema's own words call for."""
    found = problems(folder / "out")
    for record in records(folder / "out") if (folder / "out").exists() else ():
        if record.get("valid") and not record.get("error"):
            wrong = _why_invalid(folder / SCHEMA, record["value"])
            if wrong:
                found.append(f"an answer is called valid and is not: {wrong}")
        elif record.get("finish_reason") == "stop" and "--free" not in case.commands[0]:
            found.append(f"an answer that ended by itself is not valid: {record.get('validity_error')!s:.80}")
    return found


def _why_invalid(schema: Path, value: Json) -> str | None:
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    content = json.loads(schema.read_text("utf-8-sig"))
    kind = validator_for(content, default=Draft202012Validator)
    strict_json(json.dumps(value))
    for error in kind(content, registry=Registry()).iter_errors(value):
        return f"{error.message:.80}"
    return None


# --- made-up schemas ---


def _root(rng: random.Random) -> Json:
    names = [rng.choice(("item", "node", "a b", "x/y", "~")) for _ in range(rng.randrange(4))]
    schema = _object(rng, 0, names) if rng.random() < 0.9 else _any(rng, 0, names)
    if not isinstance(schema, dict):
        return schema
    if names:
        schema["$defs" if rng.random() < 0.9 else "definitions"] = {name: _any(rng, 1, names) for name in names}
    if rng.random() < 0.1:
        schema["$schema"] = rng.choice((
            "https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema#",
            "http://json-schema.org/draft-04/schema#", "urn:none", 5,
        ))  # fmt: skip
    if rng.random() < 0.05:
        schema["$id"] = rng.choice(("urn:x", "#a", "https://example.org/s", 1))
    return schema


def _any(rng: random.Random, depth: int, names: list[str]) -> Json:
    makers: list[Callable[[random.Random, int, list[str]], Json]] = [_string, _number, _number, _value, _bare]
    if names:
        makers.append(_reference)
    if depth < 5:
        makers += [_object, _object, _array, _array, _combined, _combined]
    schema = rng.choice(makers)(rng, depth, names)
    if isinstance(schema, dict) and rng.random() < 0.15:
        extra = rng.choice(("title", "description", "default", "examples", "nullable", "readOnly", "x-unknown", "$comment"))
        schema[extra] = rng.choice((True, "text", None, [1], edits.odd_value(rng)))
    return schema


def _object(rng: random.Random, depth: int, names: list[str]) -> Json:
    keys = list(dict.fromkeys(rng.choice(KEYS) for _ in range(rng.choice((0, 1, 2, 3, 6)))))
    if rng.random() < 0.03:
        keys = [f"box {i}" for i in range(rng.choice((50, 400)))]
    schema: Json = {"type": "object", "properties": {key: _any(rng, depth + 1, names) for key in keys}}
    if rng.random() < 0.6:
        schema["required"] = [key for key in keys if rng.random() < 0.7] + (["more"] if rng.random() < 0.1 else [])
    for key, make in (
        ("additionalProperties", lambda: rng.choice((False, False, True, _any(rng, depth + 1, names)))),
        ("patternProperties", lambda: {rng.choice(PATTERNS): _any(rng, depth + 1, names)}),
        ("propertyNames", lambda: _string(rng, depth, names)),
        ("minProperties", lambda: rng.choice(NUMBERS)),
        ("maxProperties", lambda: rng.choice(NUMBERS)),
        ("dependentRequired", lambda: {rng.choice(KEYS): [rng.choice(KEYS)]}),
        ("unevaluatedProperties", lambda: False),
    ):
        if rng.random() < (0.3 if key == "additionalProperties" else 0.04):
            schema[key] = make()
    return schema


def _array(rng: random.Random, depth: int, names: list[str]) -> Json:
    schema: Json = {"type": "array"}
    if rng.random() < 0.8:
        schema["items"] = rng.choice((_any(rng, depth + 1, names), _any(rng, depth + 1, names), False, True))
    if rng.random() < 0.2:
        schema["prefixItems"] = [_any(rng, depth + 1, names) for _ in range(rng.randint(0, 3))]
    for key in ("minItems", "maxItems", "uniqueItems", "contains", "minContains"):
        if rng.random() < 0.2:
            schema[key] = rng.choice((0, 1, 2, 3, 5, *NUMBERS)) if key[:3] in ("min", "max") else True
    return schema


def _string(rng: random.Random, depth: int, names: list[str]) -> Json:
    schema: Json = {"type": "string"}
    for key, values in (
        ("format", FORMATS), ("pattern", PATTERNS), ("minLength", (0, 1, 2, 5, *NUMBERS)), ("maxLength", (0, 1, 8, *NUMBERS)),
        ("contentEncoding", ("base64",)),
    ):  # fmt: skip
        if rng.random() < 0.25:
            schema[key] = rng.choice(values)
    return schema


def _number(rng: random.Random, depth: int, names: list[str]) -> Json:
    schema: Json = {"type": rng.choice(("integer", "number", ["integer", "null"], ["number", "string"]))}
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
        if rng.random() < 0.25:
            schema[key] = rng.choice(NUMBERS)
    return schema


def _value(rng: random.Random, depth: int, names: list[str]) -> Json:
    values = [None, True, 0, 1.0, -0.0, 1e400, 2**53 + 1, 10**25, "x", "", "é", "\u2028", [], {}, [1, "a"], {"k": [None]}]
    if rng.random() < 0.5:
        return {"const": rng.choice(values[:5] + values[6:])}
    return {"enum": rng.sample(values, rng.randint(0, 5))}


def _bare(rng: random.Random, depth: int, names: list[str]) -> Json:
    return rng.choice((True, False, {}, {"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}, {"type": []}))


def _reference(rng: random.Random, depth: int, names: list[str]) -> Json:
    pointer = rng.choice(names).replace("~", "~0").replace("/", "~1")
    return {"$ref": rng.choice((*[f"#/$defs/{pointer}"] * 6, "#", "#/properties/a", "#/$defs/none", "other.json", "#%"))}


def _combined(rng: random.Random, depth: int, names: list[str]) -> Json:
    word = rng.choice(("anyOf", "anyOf", "oneOf", "allOf", "not", "if"))
    if word == "not":
        return {"not": _any(rng, depth + 1, names)}
    if word == "if":
        return {key: _any(rng, depth + 1, names) for key in ("if", "then", "else") if rng.random() < 0.8}
    return {word: [_any(rng, depth + 1, names) for _ in range(rng.choice((0, 1, 2, 2, 3, 5)))]}
