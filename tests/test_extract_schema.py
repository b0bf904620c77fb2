"""Schemas from files, classes and data; and what is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest

from granite4v.errors import SchemaError
from granite4v.runtime.extraction.schema import load_schema


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
        ('{"name": "text", "total": 5}', "does not say which fields are wanted"),
        (
            '{"$ref": "https://example.com/s.json"}',
            "refers to 'https://example.com/s.json', which is not in it; granite4v fetches",
        ),
        ("[" * 100000, "is nested too deep"),
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
