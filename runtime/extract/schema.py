"""Loads the fields to extract as a JSON Schema, from a file, a pydantic class or plain data."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from granite4v.errors import SchemaError
from granite4v.runtime.grammar.json_schema import (
    MAX_CHARACTERS,
    InvalidSchema,
    JsonSchema,
    Resolved,
    listed,
    read_schema,
)
from granite4v.runtime.grammar.keywords import kinds
from granite4v.runtime.grammar.validation import Validator

SchemaSource: TypeAlias = "str | Path | Mapping[str, Any] | type"

_CLASS_PATH = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
MAX_LOOKED_AT = 200  # subschemas that `_may_hold_fields` looks at
# a schema without any of these allows everything, and is most likely an example of the data instead
_SAYS_SOMETHING = (
    "type", "properties", "required", "items", "prefixItems", "enum", "const", "anyOf", "oneOf", "allOf", "not", "$ref",
    "if", "patternProperties", "additionalProperties",
)  # fmt: skip
_EXPECTED = (
    'expected a JSON Schema such as {"type": "object", "properties": {"total": {"type": "string"}}}, or a pydantic '
    "class as package.module:Class"
)
_MAX_BYTES = 4 * MAX_CHARACTERS
PIPE_WAIT_S = 30.0  # for all data of a pipe


@dataclass(frozen=True)
class Schema:
    """A checked JSON Schema. Keys keep their order, which answers follow.

    `name`: where the schema came from. `warnings`: notes for its author.
    """

    name: str
    content: dict[str, Any]
    checked: JsonSchema = field(compare=False, repr=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.content).encode()).hexdigest()

    def problem(self, value: Any) -> str | None:
        """Returns why a value does not match the schema; None if it does. Numbers are checked in decimal."""
        return self._validator.problem(value)

    @functools.cached_property
    def _validator(self) -> Validator:
        return Validator(self.checked)


def load_schema(source: SchemaSource, say: Callable[[str], None] | None = None) -> Schema:
    """Loads the schema from a file, a pydantic class, its path `package.module:Class`, or plain data.

    Modules are searched in the current directory first; `say` is told which file will run before it runs. Raises
    SchemaError for a source without a schema and for an invalid schema.
    """
    if isinstance(source, Mapping):
        return _checked("the schema", source)
    if not isinstance(source, str | Path):
        return _of_class(source, getattr(source, "__qualname__", repr(source)))
    name = str(source)
    if not Path(name).exists() and _CLASS_PATH.fullmatch(name):
        return _of_class(_import_class(name, say), name)
    return _of_file(name)


def _checked(name: str, content: Any, notes: tuple[str, ...] = ()) -> Schema:
    if not isinstance(content, Mapping):
        raise SchemaError(f"{name} is {content!r:.60}; {_EXPECTED}.")
    try:
        schema: JsonSchema = read_schema(content)
    except InvalidSchema as error:
        alone = all(key == "type" or key not in content for key in _SAYS_SOMETHING)
        hint = _hint(content) if alone else ""  # for {"type": "json_schema", "json_schema": ...}
        raise SchemaError(f"{name} does not define any fields{hint}." if hint else f"{name} {error}") from None
    if not any(key in content for key in _SAYS_SOMETHING):
        raise SchemaError(f"{name} does not define any fields{_hint(content)}; {_EXPECTED}.")
    if not _may_hold_fields(schema, schema.root, {}):
        raise SchemaError(
            f"{name} describes a single value; fields are an object or a list, so put it under a name, as in "
            '{"type": "object", "properties": {"total": {"type": "number"}}}.'
        )
    warnings = tuple(f"{name}: {note}" for note in (*notes, *schema.notes))
    return Schema(name.strip("'"), json.loads(json.dumps(content)), schema, warnings)


def _may_hold_fields(schema: JsonSchema, found: Resolved, known: dict[int, bool]) -> bool:
    """Whether an object or a list may match a schema, judging only by types and enumerated values.

    `known`: results by the id of a node. After `MAX_LOOKED_AT` nodes, True is assumed for all others but `false`.
    """
    node = found.node
    if not isinstance(node, dict) or len(known) > MAX_LOOKED_AT:
        return node is not False
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = True  # a schema that refers to itself: the rest of it decides
    parts = {
        word: [_may_hold_fields(schema, schema.inside(inner, found.resolver), known) for inner in node[word]]
        for word in ("anyOf", "oneOf", "allOf")
        if word in node
    }
    if isinstance(node.get("$ref"), str):
        parts["$ref"] = [_may_hold_fields(schema, schema.follow(node["$ref"], found.resolver), known)]
    values = node.get("enum", [node["const"]] if "const" in node else [{}])
    known[id(node)] = (
        bool({"object", "array"}.intersection(kinds(node) or ("object",)))
        and any(isinstance(value, dict | list) for value in values)
        and all(any(found) if word in ("anyOf", "oneOf") else all(found) for word, found in parts.items())
    )
    return known[id(node)]


def _hint(content: Mapping[str, Any]) -> str:
    """Returns the end of a message that says where the schema is, if the content is one of the usual wrappers."""
    for path in (("schema",), ("json_schema", "schema"), ("json_schema",), ("parameters",)):
        inner: Any = content
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and any(key in inner for key in _SAYS_SOMETHING):
            return f" itself; what is under '{'.'.join(path)}' does, so give that alone"
    schemas = content.get("components") if "openapi" in content else None
    names = list(schemas.get("schemas", {})) if isinstance(schemas, Mapping) else []
    if names:
        return f" itself; it is an OpenAPI document with the schemas {listed(names)}, so give one of them alone"
    if "$defs" in content or "definitions" in content:
        return ', as it has definitions alone; add "$ref": "#/$defs/NAME" for the one that is meant'
    return ""


# --- files ---


def _of_file(name: str) -> Schema:
    notes: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) < len(items):
            keys = [key for key, _ in items]
            twice = [key for key in made if keys.count(key) > 1]
            notes.append(f"{listed(twice)} occurs more than once in an object; the last one is used.")
        return made

    try:
        raw = _read(Path(name))
        if not raw.strip():
            raise SchemaError(f"the schema '{name}' is empty; {_EXPECTED}.")
        text = raw.decode(json.detect_encoding(raw))
        content = json.loads(text, object_pairs_hook=pairs, parse_int=_integer)
    except OSError as error:
        raise SchemaError(f"the schema '{name}' cannot be read: {error.strerror or error}; {_EXPECTED}.") from None
    except UnicodeDecodeError as error:
        raise SchemaError(f"the schema '{name}' is not UTF-8 text: {error}; save it as UTF-8.") from None
    except RecursionError:
        raise SchemaError(f"the schema '{name}' is nested too deeply; expected a few levels.") from None
    except ValueError as error:
        raise SchemaError(f"the schema '{name}' is not JSON: {error}; {_EXPECTED}.") from None
    return _checked(f"'{name}'", content, tuple(notes))


def _integer(text: str) -> int:
    if len(text) > 1000:  # more than Python converts quickly
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def _read(path: Path) -> bytes:
    """Returns the bytes of a file or pipe. Raises OSError; SchemaError for one that is too large or sends nothing."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        raw = _first_bytes(path)
    elif stat.S_ISDIR(mode):
        raise SchemaError(f"the schema '{path}' is a directory; give one file in it.")
    else:  # a pipe, such as a shell's <(command); reading one that nobody writes to would never return
        raw = _read_pipe(path)
    if len(raw) > _MAX_BYTES:
        raise SchemaError(
            f"the schema '{path}' is larger than {_MAX_BYTES:,} bytes, which exceeds any model's context; request "
            "fewer fields at a time."
        )
    return raw


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES + 1)


def _read_pipe(path: Path) -> bytes:
    got: list[bytes | OSError] = []

    def read() -> None:
        try:
            got.append(_first_bytes(path))
        except OSError as error:
            got.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(PIPE_WAIT_S)
    if not got:
        raise SchemaError(
            f"the schema '{path}' is not a regular file, and no data arrived within {PIPE_WAIT_S:.0f} seconds."
        )
    if isinstance(got[0], OSError):
        raise got[0]
    return got[0]


# --- classes ---


def _of_class(found: Any, name: str) -> Schema:
    make = getattr(found, "model_json_schema", None)
    if not callable(make) and hasattr(found, "__fields__"):
        make = getattr(found, "schema", None)  # pydantic 1
    if not isinstance(found, type) or not callable(make):
        make = _of_type_adapter(found, name)
    try:
        content = make()
    except Exception as error:  # pydantic's own errors, which cannot be named without importing it
        raise SchemaError(f"'{name}' has no JSON Schema: {_said(error)}; use types that JSON has.") from None
    return _checked(f"'{name}'", content)


def _of_type_adapter(found: Any, name: str) -> Callable[[], Any]:
    """Returns a function that makes the schema of a dataclass or a TypedDict."""
    fields = ("__dataclass_fields__", "__total__")
    if isinstance(found, type) and any(hasattr(found, one) for one in fields):
        with contextlib.suppress(ImportError):
            from pydantic import TypeAdapter

            return lambda: TypeAdapter(found).json_schema()
        raise SchemaError(f"'{name}' needs pydantic to be a schema; install it, or give a JSON Schema.")
    raise SchemaError(
        f"'{name}' is {found!r:.60}; expected a pydantic model (a class derived from BaseModel), a dataclass or a "
        "TypedDict."
    )


def _import_class(path: str, say: Callable[[str], None] | None) -> Any:
    module, _, name = path.partition(":")
    try:
        with _current_folder_first():
            if say is not None:
                _announce(module, say)
            found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise SchemaError(
            f"'{path}' cannot be imported: {_said(error)}; expected package.module:Class, found from the current "
            "directory or installed."
        ) from None
    return found


def _announce(module: str, say: Callable[[str], None]) -> None:
    """Says which file is about to run: the current directory may contain one that the user is not aware of."""
    top = module.partition(".")[0]
    if module in sys.modules or top in sys.modules:
        return
    spec = importlib.util.find_spec(top)
    origin = None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    if origin is not None:
        say(f"importing '{module}' from '{origin}'")


def _said(error: BaseException) -> str:
    """Describes an error of a user's module, with the line that raised it if that is in the module."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    where = ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ('{error.filename}', line {error.lineno})"
        return f"{type(error).__name__}: {error.msg}{where}"
    inside = [frame for frame in frames if f"{os.sep}importlib{os.sep}" not in frame.filename]
    if inside:
        where = f" ('{inside[-1].filename}', line {inside[-1].lineno})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text:.300}{where}"


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    """Searches modules in the current directory first, and sends what they print to stderr, not into the results."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path
            sys.path.remove(folder)
