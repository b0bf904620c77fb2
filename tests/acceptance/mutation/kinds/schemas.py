"""JSON Schemas: generated, mutated, and answered by the small embedded model."""

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

NOT_HELD = "checked against it afterwards"  # part of the message about keywords that do not constrain answers
FORMATS = (
    "date", "date-time", "time", "duration", "email", "idn-email", "hostname", "ipv4", "ipv6", "uri", "uri-reference",
    "iri", "uuid", "json-pointer", "regex", "int32", "int64", "float", "double", "decimal", "byte", "binary", "color",
    "phone", "currency", "", "%",
)  # fmt: skip
PATTERNS = (
    "^[A-Z]{2}$", r"^\d{4}-\d{2}$", "^(a|b)*c?$", "[0-9]+", "^.{0,3}$", r"^[^\x00-\x1f]*$", r"^\S+@\S+\.\S+$", "^x",
)  # fmt: skip
ODD_PATTERNS = (
    "^$", "", ".", r"\w+\s*", "^(?=x)", "(?!a)b", "(?<=a)b", r"(a)\1", "(?P<n>a)", "^[a-z", "*", "(", "a{3,1}",
    "a{1000}", "^(a{30}){30}$", r"\p{L}+", r"^[\p{Lu}\d]+$", r"\u00e9", "\u00e9+", "^(?:(?:(?:x?)?)?)$", "[[:alpha:]]",
    r"\Z", "(?i)b",
)  # fmt: skip
KEYS = ("total", "a", "b", "name", "", " ", "a b", "größe", "金額", '"', "\\", "$ref", "type", "properties", "\n", "0")
NUMBERS = (0, 1, 2, 5, 10, 100, 1000)
ODD_NUMBERS = (-1, 0.1, 0.01, 1.5, -0.0, 1e-9, 2**31, 2**53 + 1, 2**64, 1e308, -1e308, 10**40)
VALUES = (None, True, 0, 1.5, "x", "paid", "é", 12)
ODD_VALUES = (-0.0, 1e400, 2**53 + 1, 10**25, "", "\u2028", [], {}, [1, "a"], {"k": [None]})


def prepare(bases: Path) -> None:
    """Does nothing: a page is drawn in each case."""


def build(rng: random.Random, bases: Path, folder: Path) -> Case:
    samples.write_page(folder / samples.PAGE)
    schema = _Maker(rng).root()
    if rng.random() < 0.45:
        data, what = edits.edit_json_text(rng, schema)
    else:
        data, what = edits.dump_json(schema), "made up"
    (folder / SCHEMA).write_bytes(data)
    n_tokens = str(rng.choice((1, 20, 120, 400, 400)))
    command = ["extract", samples.PAGE, "--task", "kvp", "--schema", SCHEMA, "--max-tokens", n_tokens]
    command += ["--threads", "1", "--out", "out", *rng.choice(([], [], ["--report"], ["--unconstrained"]))]
    return Case([what, data[:300].decode("utf-8", "replace")], [command])


def check(folder: Path, case: Case, results: list[Result]) -> list[str]:
    """Checks that answers reported as valid are valid for the validator of the schema's own draft, and that fully
    constrained answers that ended by themselves are always valid."""
    found = problems(folder / "out")
    for record in records(folder / "out") if (folder / "out").exists() else ():
        if record.get("valid") and not record.get("error"):
            wrong = _why_invalid(folder / SCHEMA, record["value"])
            if wrong:
                found.append(f"an answer is called valid and is not: {wrong}")
        elif (
            record.get("finish_reason") == "stop"
            and "--unconstrained" not in case.commands[0]
            and NOT_HELD not in results[0].stderr
        ):
            found.append(f"an answer that ended by itself is not valid: {record.get('validity_error')!s:.80}")
    return found


def _why_invalid(schema: Path, value: Json) -> str | None:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    content = json.loads(schema.read_bytes())
    if not isinstance(content.get("$id", ""), str):
        del content["$id"]  # the library fails on other types
    kind = validator_for(content, default=Draft202012Validator)
    try:
        kind.check_schema(content)
    except SchemaError:  # of an older draft than the default, which it does not name
        return None
    strict_json(json.dumps(value))
    for error in kind(content, registry=Registry()).iter_errors(value):
        return f"{error.message:.80}"
    return None


# --- generated schemas ---


class _Maker:
    """Generates schemas. `oddness`: the probability that a part is one that few people would write."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.oddness = rng.choice((0.0, 0.0, 0.03, 0.3))
        self.names = [rng.choice(("item", "node", "a b", "x/y", "~")) for _ in range(rng.randrange(4))]

    def odd(self) -> bool:
        return self.rng.random() < self.oddness

    def pick(self, usual: tuple[Any, ...], odd: tuple[Any, ...]) -> Any:
        return self.rng.choice(odd if self.odd() else usual)

    def root(self) -> Json:
        rng, names = self.rng, self.names
        schema = self.any(0) if self.odd() else self.object(0)
        if not isinstance(schema, dict):
            return schema
        if names:
            schema["definitions" if self.odd() else "$defs"] = {name: self.any(2) for name in names}
        if self.odd():
            schema["$schema"] = rng.choice((
                "https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema#",
                "http://json-schema.org/draft-04/schema#", "urn:none", 5,
            ))  # fmt: skip
        if self.odd():
            schema["$id"] = rng.choice(("urn:x", "#a", "https://example.org/s", 1))
        return schema

    def any(self, depth: int) -> Json:
        makers: list[Callable[[int], Json]] = [
            self.string,
            self.string,
            self.number,
            self.number,
            self.value,
            self.bare,
        ]
        if self.names:
            makers.append(self.reference)
        if depth < 4:
            makers += [self.object, self.array, self.combined]
        schema = self.rng.choice(makers)(depth)
        if isinstance(schema, dict) and self.rng.random() < 0.1:
            word = self.pick(
                ("title", "description"), ("default", "examples", "nullable", "readOnly", "x-a", "$comment")
            )
            schema[word] = edits.odd_value(self.rng) if self.odd() else "text"
        return schema

    def object(self, depth: int) -> Json:
        rng = self.rng
        keys = list(dict.fromkeys(self.pick(KEYS[:4], KEYS) for _ in range(rng.choice((1, 2, 3, 6)))))
        if self.odd():
            keys = [f"box {i}" for i in range(rng.choice((0, 50, 400)))]
        schema: Json = {"type": "object", "properties": {key: self.any(depth + 1) for key in keys}}
        if rng.random() < 0.7:
            schema["required"] = [key for key in keys if rng.random() < 0.7] + ["more"] * self.odd()
        if rng.random() < 0.3:
            schema["additionalProperties"] = self.any(depth + 1) if self.odd() else False
        extras: list[tuple[str, Callable[[], Json]]] = [
            ("patternProperties", lambda: {self.pick(PATTERNS, ODD_PATTERNS): self.any(depth + 1)}),
            ("propertyNames", lambda: self.string(depth)),
            ("minProperties", lambda: self.pick(NUMBERS, ODD_NUMBERS)),
            ("maxProperties", lambda: self.pick(NUMBERS, ODD_NUMBERS)),
            ("dependentRequired", lambda: {rng.choice(KEYS): [rng.choice(KEYS)]}),
            ("unevaluatedProperties", lambda: False),
        ]
        for word, make in extras:
            if self.odd():
                schema[word] = make()
        return schema

    def array(self, depth: int) -> Json:
        rng = self.rng
        schema: Json = {"type": "array", "items": rng.choice((True, False)) if self.odd() else self.any(depth + 1)}
        if rng.random() < 0.2:
            schema["prefixItems"] = [self.any(depth + 1) for _ in range(rng.randint(0, 3))]
        for word in ("minItems", "maxItems"):
            if rng.random() < 0.25:
                schema[word] = self.pick((0, 1, 2, 3, 5), ODD_NUMBERS)
        for word in ("uniqueItems", "contains", "minContains"):
            if self.odd():
                schema[word] = rng.choice((True, 1))
        return schema

    def string(self, depth: int) -> Json:
        schema: Json = {"type": "string"}
        for word, usual, odd in (
            ("format", FORMATS[:4], FORMATS),
            ("pattern", PATTERNS, ODD_PATTERNS),
            ("minLength", NUMBERS[:4], ODD_NUMBERS),
            ("maxLength", NUMBERS[3:], ODD_NUMBERS),
        ):
            if self.rng.random() < 0.15:
                schema[word] = self.pick(usual, odd)
        return schema

    def number(self, depth: int) -> Json:
        kinds = ("integer", "number", ["integer", "null"])
        schema: Json = {"type": self.pick(kinds, (["number", "string"], ["integer", "number"], []))}
        for word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
            if self.rng.random() < 0.15:
                schema[word] = self.pick(NUMBERS[1:], ODD_NUMBERS)
        return schema

    def value(self, depth: int) -> Json:
        values = VALUES + ODD_VALUES * self.odd()
        if self.rng.random() < 0.3:
            return {"const": self.rng.choice(values)}
        return {"enum": self.rng.sample(values, self.rng.randint(not self.odd(), 5))}

    def bare(self, depth: int) -> Json:
        usual = ({"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]})
        return self.pick(usual, (True, False, {}, {"type": ["boolean", "object"]}))

    def reference(self, depth: int) -> Json:
        pointer = self.rng.choice(self.names).replace("~", "~0").replace("/", "~1")
        return {"$ref": self.pick((f"#/$defs/{pointer}",), ("#", "#/properties/a", "#/$defs/none", "other.json", "#%"))}

    def combined(self, depth: int) -> Json:
        word = self.pick(("anyOf", "anyOf", "oneOf", "allOf"), ("not", "if", "anyOf", "oneOf"))
        if word == "not":
            return {"not": self.any(depth + 1)}
        if word == "if":
            return {key: self.any(depth + 1) for key in ("if", "then", "else") if self.rng.random() < 0.8}
        return {word: [self.any(depth + 1) for _ in range(self.rng.choice((0, 1, 5)) if self.odd() else 2)]}
