"""Tests of schemas from files, classes and data, and of what is not a schema."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import ipaddress
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import pytest
from typing_extensions import TypedDict

from granite4v.errors import SchemaError
from granite4v.runtime.extract import schema as schema_module
from granite4v.runtime.extract.schema import load_schema
from granite4v.runtime.formats.task_grammar import grammar_for
from tests.helpers.constrained import generated


class Line(pydantic.BaseModel):
    name: str
    price: float | None = None


class Invoice(pydantic.BaseModel):
    number: str = pydantic.Field(pattern=r"^\d+$")
    lines: list[Line]


def test_a_class_its_path_its_file_and_its_data_are_the_same_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = Invoice.model_json_schema()
    (tmp_path / "s.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    (tmp_path / "my_forms.py").write_text(
        "import pydantic\nclass Outer:\n    class Note(pydantic.BaseModel):\n        n: int\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    sources: list[Any] = [content, Invoice, f"{__name__}:Invoice", tmp_path / "s.json", "s.json"]
    schemas = [load_schema(source) for source in sources]
    assert {schema.sha256 for schema in schemas} == {schemas[0].sha256}
    assert all(schema.content == content for schema in schemas)
    assert load_schema("my_forms:Outer.Note").content["properties"] == {"n": {"title": "N", "type": "integer"}}
    assert str(tmp_path) not in sys.path


def test_instances_are_told_from_others() -> None:
    schema = load_schema(Invoice)
    assert schema.problem({"number": "12", "lines": [{"name": "x", "price": None}]}) is None
    for value, why in [
        ({"number": "x", "lines": []}, r"at '$.number': 'x' does not match"),
        ({"number": "1", "lines": [{}]}, "at '$.lines[0]': 'name' is a required property"),
        ([], "at '$': [] is not of type 'object'"),
    ]:
        assert why in str(schema.problem(value))


def test_order_of_keys_counts() -> None:
    one, other = ({"type": "object", "properties": {name: {} for name in names}} for names in (["a", "b"], ["b", "a"]))
    assert load_schema(one).sha256 != load_schema(other).sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected a JSON Schema"),
        ("[1]", r"is \[1\]; expected a JSON Schema"),
        ("true", "is True; expected a JSON Schema"),
        ('{"type": "objekt"}', r"is not a valid JSON Schema: at '\$.type': 'objekt' is not valid"),
        ('{"name": "text", "total": 5}', "does not define any fields"),
        (
            '{"$ref": "https://example.com/s.json"}',
            "refers to 'https://example.com/s.json', which is not in it; granite4v fetches",
        ),
        ("[" * 100000, "is nested too deep"),
        ('{"type": ["string", "null"]}', "describes a single value; fields are an object or a list, so put it under a"),
        ('{"enum": [0, "x"]}', "describes a single value"),
        ('{"const": null}', "describes a single value"),
        (
            '{"anyOf": [{"$ref": "#/$defs/a"}, {"type": "integer"}], "$defs": {"a": {"allOf": [{"enum": [1]}]}}}',
            "describes a single value",
        ),
    ],
)
def test_what_is_no_schema(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(SchemaError, match=message):
        load_schema(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.json", "'missing.json' cannot be read: No such file"),
        ("no_such_module:Form", "cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:Nothing", "cannot be imported: AttributeError"),
        ("json:dumps", "expected a pydantic model"),
        (Path, "expected a pydantic model"),
    ],
)
def test_what_gives_none(source: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        load_schema(source)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#/$defs/gone"}, "cannot be followed"),
        ({"$ref": "#"}, "refers to itself without end"),
    ],
)
def test_references_that_lead_nowhere_are_refused_before_any_page_is_read(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        load_schema(schema)


# --- files of all kinds ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_that_editors_and_shells_write(tmp_path: Path, encoding: str) -> None:
    content = {"type": "object", "properties": {"größe": {"type": "string"}}}
    (tmp_path / "s.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert load_schema(tmp_path / "s.json").content == content


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"type": "\xff"}', "is not UTF-8 text: .* save it as UTF-8"),
        (b" \n", "is empty"),
        (
            b'{"type": "object", "maxProperties": 1e400}',
            r"has at '\$.maxProperties' inf, which is not a number in JSON",
        ),
        (b'{"properties": {"a": {"const": NaN}}}', r"has at '\$.properties.a.const' nan"),
        (b'{"maximum": 1' + b"0" * 5000 + b"}", "a number has 5,001 digits"),
        (b'{"type": "string", "default": "\\ud800"}', r"has at '\$.default' a lone surrogate"),
        (b'{"name": "invoice", "schema": {"type": "object"}}', "what is under 'schema' does, so give that alone"),
        (b'{"json_schema": {"schema": {"type": "object"}}}', "what is under 'json_schema.schema' does"),
        (
            b'{"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}',
            "what is under 'json_schema.schema' does",
        ),
        (
            b'{"type": "object", "properties": {"a": {"type": "STRING"}}}',
            r"at '\$.properties.a.type': 'STRING' is not valid; the types are null, boolean, integer,",
        ),
        (b'{"openapi": "3.0.0", "components": {"schemas": {"I": {}}}}', "an OpenAPI document with the schemas 'I'"),
        (b'{"$defs": {"A": {"type": "object"}}}', r'add "\$ref": "#/\$defs/NAME"'),
    ],
)
def test_files_that_hold_no_usable_schema(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "s.json").write_bytes(raw)
    with pytest.raises(SchemaError, match=message):
        load_schema(tmp_path / "s.json")


def test_directories_huge_files_and_pipes_that_nobody_writes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SchemaError, match="is a directory; give one file in it"):
        load_schema(tmp_path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(500_000_000)
    with pytest.raises(SchemaError, match="is larger than 4,000,000 bytes"):
        load_schema(huge)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(schema_module, "PIPE_WAIT_S", 0.2)
    with pytest.raises(SchemaError, match="is not a regular file, and no data arrived within 0 seconds"):
        load_schema(tmp_path / "pipe")


def test_long_chains_of_references_are_taken() -> None:
    """Only a limited number of references is followed to find out whether the schema has fields."""
    definitions = {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(30)
    }
    text = {"$ref": "#/$defs/d0", "$defs": {**definitions, "d30": {"type": "string"}}}
    with pytest.raises(SchemaError, match="describes a single value"):
        load_schema(text)
    fields = {"$ref": "#/$defs/d0", "$defs": {**definitions, "d30": {"type": "object"}}}
    assert load_schema(fields).content == fields


def test_a_pipe_of_the_shell_is_read() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(b'{"type": "object"}')
    assert load_schema(f"/dev/fd/{reading}").content == {"type": "object"}
    os.close(reading)


def test_keys_that_stand_twice_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"properties": {"a": {"type": "string"}, "b": {}, "a": {"type": "null"}}}')
    schema = load_schema(tmp_path / "s.json")
    assert "'a' occurs more than once in an object; the last one is used." in schema.warnings[0]
    assert schema.problem({"a": None}) is None


def test_nullable_counts_and_stays_in_the_prompt() -> None:
    content = {"type": "object", "properties": {"a": {"type": "string", "nullable": True}}}
    schema = load_schema(content)
    assert schema.content == content and schema.problem({"a": None}) is None
    assert "'nullable' of OpenAPI is read as \"or null\" at '$.properties.a'" in schema.warnings[0]


# --- classes of all kinds ---


@dataclasses.dataclass
class Address:
    street: str
    number: int = 0


class Person(TypedDict):
    name: str


class OfPydanticOne:
    """A model as pydantic 1 declares it."""

    __fields__: ClassVar[dict[str, Any]] = {}

    @classmethod
    def schema(cls) -> dict[str, Any]:
        return {"type": "object", "properties": {"a": {"type": "string"}}}


def test_dataclasses_typed_dicts_and_models_of_pydantic_one() -> None:
    assert load_schema(Address).content["properties"]["street"] == {"title": "Street", "type": "string"}
    assert load_schema(Person).content["required"] == ["name"]
    assert load_schema(OfPydanticOne).content["properties"] == {"a": {"type": "string"}}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def test_a_module_is_named_before_it_is_run_and_prints_to_stderr(
    modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (modules / "told_forms.py").write_text(
        "import pydantic\nprint('hello')\nclass A(pydantic.BaseModel):\n    n: int\n"
    )
    lines: list[str] = []
    load_schema("told_forms:A", lines.append)
    assert lines == [f"importing 'told_forms' from '{modules / 'told_forms.py'}'"]
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\nraise SystemExit(3)\n", "SystemExit: 3 ('{file}', line 2)"),
        ("\n\n1 / 0\n", "ZeroDivisionError: division by zero ('{file}', line 3)"),
        ("def f(:\n", "SyntaxError: invalid syntax ('{file}', line 1)"),
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing' ('{file}', line 1)"),
        ("A = 5\n", "is 5; expected a pydantic model"),
        (
            "import pydantic, typing\nclass A(pydantic.BaseModel):\n    f: typing.Callable[[], int]\n",
            "has no JSON Schema: PydanticInvalidForJsonSchema",
        ),
    ],
)
def test_errors_of_a_module_come_with_its_line(
    modules: Path, code: str, message: str, request: pytest.FixtureRequest
) -> None:
    name = f"bad_{abs(hash(request.node.name))}"
    (modules / f"{name}.py").write_text(code)
    with pytest.raises(SchemaError) as caught:
        load_schema(f"{name}:A")
    assert message.format(file=modules / f"{name}.py") in str(caught.value)


# --- what people declare, judged by pydantic itself ---


class Money(pydantic.BaseModel):
    total: decimal.Decimal
    rate: Annotated[float, pydantic.Field(gt=0, le=0.25)]


class Everything(pydantic.BaseModel):
    day: datetime.date
    time: datetime.time
    at: datetime.datetime
    span: datetime.timedelta
    key: uuid.UUID
    address: ipaddress.IPv4Address
    secret: pydantic.SecretStr
    path: Path
    raw: bytes
    tags: set[str]
    pair: tuple[str, int]
    level: enum.IntEnum("Level", {"LOW": 1, "HIGH": 2})  # type: ignore[valid-type]
    kind: Literal["a", "b"]
    amounts: dict[Literal["net", "gross"], float]
    nothing: None = None


@pytest.mark.parametrize("model", [Money, Everything])
def test_answers_to_what_pydantic_declares_are_valid_to_pydantic_or_found_out(model: type[pydantic.BaseModel]) -> None:
    schema = load_schema(model)
    grammar = grammar_for("kvp", schema.checked)
    assert grammar is not None
    n_valid = 0
    for seed in range(6):
        answer = generated("toy", grammar, seed, max_tokens=400, patience=3)
        if answer.finish_reason != "stop":
            continue
        value = json.loads(answer.text)
        problem = schema.problem(value)
        try:
            model.model_validate_json(answer.text)
        except pydantic.ValidationError as error:
            # pydantic is stricter than its schema: durations and numbers must not be too large
            assert problem is not None or {one["loc"][0] for one in error.errors()} <= {"span", "total"}
        else:
            assert problem is None
            n_valid += 1
    assert n_valid


def test_naive_times_of_pydantic_are_valid() -> None:
    schema = load_schema(Everything)
    for name, text in (("at", "2024-02-29T10:30:00"), ("time", "10:30:00"), ("day", "2024-02-29")):
        part = load_schema({"properties": {name: schema.content["properties"][name]}})
        assert part.problem({name: text}) is None
    part = load_schema({"properties": {"day": schema.content["properties"]["day"]}})
    assert part.problem({"day": "2023-02-29"}) == "at '$.day': '2023-02-29' is not a 'date'"
