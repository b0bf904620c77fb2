"""What fields are wanted, as a JSON Schema: from a file, a pydantic class or plain data."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from granite4v.errors import SchemaError

SchemaSource: TypeAlias = "str | Path | Mapping[str, Any] | type"

_CLASS_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
# a schema without any of these allows everything, and is most likely an example of the data instead
_SAYS_SOMETHING = (
    "type", "properties", "required", "items", "prefixItems", "enum", "const", "anyOf", "oneOf", "allOf", "not", "$ref",
    "if", "patternProperties", "additionalProperties",
)  # fmt: skip
_EXPECTED = (
    'expected a JSON Schema such as {"type": "object", "properties": {"total": {"type": "string"}}}, or a pydantic '
    "class as package.module:Class"
)


@dataclass(frozen=True)
class Schema:
    """A checked JSON Schema; `name` is where it came from. Keys keep their order: answers follow it."""

    name: str
    content: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.content).encode()).hexdigest()

    def problem(self, value: Any) -> str | None:
        """Why a value is no instance of the schema; None when it is one."""
        from jsonschema.exceptions import best_match

        try:
            error = best_match(self._validator.iter_errors(value))
        except RecursionError:
            return "the schema refers to itself without end"
        except Exception as error_of_reference:  # the library wraps what it raises for a '$ref' in private classes
            return f"the schema cannot be followed: {error_of_reference}"
        return None if error is None else f"at '{error.json_path}': {error.message:.300}"

    @functools.cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry

        kind = validator_for(self.content, default=Draft202012Validator)
        return kind(self.content, registry=Registry())  # an empty registry: nothing is fetched


def load_schema(source: SchemaSource) -> Schema:
    """The schema that a file, a pydantic class, its path `package.module:Class`, or plain data gives.

    Modules are looked for in the current directory too. Raises SchemaError for what is no schema.
    """
    if isinstance(source, Mapping):
        return _checked("the schema", dict(source))
    if isinstance(source, type):
        return _of_class(source, source.__qualname__)
    name = str(source)
    if not Path(name).is_file() and _CLASS_PATH.fullmatch(name):
        return _of_class(_import_class(name), name)
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SchemaError(f"the schema '{name}' cannot be read: {error.strerror or error}; {_EXPECTED}.") from None
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"the schema '{name}' is no JSON: {error}; {_EXPECTED}.") from None
    return _checked(f"'{name}'", content)


def _checked(name: str, content: Any) -> Schema:
    from jsonschema.exceptions import SchemaError as NoSchema
    from jsonschema.validators import Draft202012Validator, validator_for

    if not isinstance(content, dict):
        raise SchemaError(f"{name} is {content!r:.60}; {_EXPECTED}.")
    try:
        validator_for(content, default=Draft202012Validator).check_schema(content)
    except NoSchema as error:
        raise SchemaError(f"{name} is no JSON Schema, at '{error.json_path}': {error.message:.300}.") from None
    except RecursionError:
        raise SchemaError(f"{name} is nested too deep; expected a few levels.") from None
    if not any(key in content for key in _SAYS_SOMETHING):
        raise SchemaError(f"{name} does not say which fields are wanted; {_EXPECTED}.")
    for reference in _references(content):
        if not reference.startswith("#"):
            raise SchemaError(
                f"{name} refers to '{reference:.100}'; granite4v fetches nothing. Put what it names under '$defs' and "
                "refer to it as '#/$defs/...'."
            )
    return Schema(name.strip("'"), content)


def _references(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        if isinstance(content.get("$ref"), str):
            yield content["$ref"]
        for value in content.values():
            yield from _references(value)
    elif isinstance(content, list):
        for value in content:
            yield from _references(value)


def _of_class(found: Any, name: str) -> Schema:
    if not isinstance(found, type) or not hasattr(found, "model_json_schema"):
        raise SchemaError(f"'{name}' is {found!r:.60}; expected a pydantic model, a class derived from BaseModel.")
    try:
        content = found.model_json_schema()
    except Exception as error:  # pydantic's own errors, which cannot be named without importing it
        raise SchemaError(f"'{name}' has no JSON Schema: {error}; use types that JSON has.") from None
    return _checked(f"'{name}'", content)


def _import_class(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        with _current_folder_first():
            found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # anything that a module of the user's may do
        raise SchemaError(
            f"'{path}' cannot be imported: {type(error).__name__}: {error}; expected package.module:Class, found from "
            "the current directory or installed."
        ) from None
    return found


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
