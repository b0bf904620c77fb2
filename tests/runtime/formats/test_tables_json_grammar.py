"""Tests of the automaton of tables as JSON: with answers that cover their grid, and with cases by hand."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import jsonschema
import pytest

from granite4v.runtime.formats import read_tables_json
from tests.helpers.constrained import KINDS, allows, ended, grammar_of

CELLS = grammar_of("tables_json")


CELLS_SCHEMA = {
    "$defs": {
        "table": {
            "type": "object",
            "properties": {
                "dimensions": {
                    "type": "object",
                    "properties": {
                        key: {"type": "integer", "minimum": 0}
                        for key in ("rows", "columns", "header_rows", "total_rows")
                    },
                    "required": ["rows", "columns", "header_rows", "total_rows"],
                    "additionalProperties": False,
                },
                "cells": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            **{key: {"type": "integer", "minimum": 1} for key in ("row", "col", "colspan", "rowspan")},
                            "type": {"enum": ["header", "data"]},
                            "header_level": {"type": "integer", "minimum": 0},
                            "content": {"type": "string"},
                        },
                        "required": ["row", "col", "colspan", "rowspan", "type", "header_level", "content"],
                        "additionalProperties": False,
                    },
                },
            },
            "required": ["dimensions", "cells"],
            "additionalProperties": False,
        }
    },
    "anyOf": [{"$ref": "#/$defs/table"}, {"type": "array", "items": {"$ref": "#/$defs/table"}}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_cells_cover_their_table(kind: str) -> None:
    validator = jsonschema.Draft202012Validator(CELLS_SCHEMA)
    for text in ended(kind, CELLS, range(90), max_tokens=500, patience=6):
        found = json.loads(text)
        validator.validate(found)
        for table in found if isinstance(found, list) else [found]:
            size = table["dimensions"]
            slots = Counter(
                (row, column)
                for cell in table["cells"]
                for row in range(cell["row"], cell["row"] + cell["rowspan"])
                for column in range(cell["col"], cell["col"] + cell["colspan"])
            )
            every = itertools.product(range(1, size["total_rows"] + 1), range(1, size["columns"] + 1))
            assert slots == Counter(every)
        read_tables_json(text)


def as_json(size: tuple[int, int, int, int], *cells: tuple[int, int, int, int, str]) -> str:
    names = ("rows", "columns", "header_rows", "total_rows")
    dimensions = ", ".join(f'"{name}": {value}' for name, value in zip(names, size, strict=True))
    written = (
        f'{{"row": {row}, "col": {col}, "colspan": {colspan}, "rowspan": {rowspan}, "type": "data", '
        f'"header_level": 0, "content": "{text}"}}'
        for row, col, colspan, rowspan, text in cells
    )
    return f'{{"dimensions": {{{dimensions}}}, "cells": [{", ".join(written)}]}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")), True),
        (as_json((0, 1, 1, 1), (1, 1, 1, 1, "")), True),
        (as_json((2, 1, 1, 2), (1, 1, 1, 2, 'é \\" \\\\ \\n')), True),  # `rows` includes header rows
        (as_json((1, 1, 1, 2), (1, 1, 1, 2, "a")), True),
        (as_json((2, 2, 0, 2), (1, 1, 1, 2, "a"), (1, 2, 1, 1, "b"), (2, 2, 1, 1, "c")), True),
        ("[" + as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")) + "]", True),
        ("[]", True),
        (as_json((1, 1, 0, 2), (1, 1, 1, 2, "a")), False),
        (as_json((0, 1, 0, 0)), False),
        (as_json((1, 0, 0, 1)), False),
        (as_json((1, 1, 0, 1)), False),
        (as_json((1, 1, 0, 1), (1, 1, 2, 1, "a")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 2, "a")), False),
        (as_json((1, 1, 0, 1), (0, 0, 1, 1, "a")), False),
        (as_json((1, 2, 0, 1), (1, 1, 1, 1, "a")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a"), (1, 2, 1, 1, "b")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a\n")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "\\ud800")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")).replace(": ", ":"), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")) * 2, False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")).replace('"rows": 1', '"rows": 01'), False),
    ],
)
def test_cells(text: str, expected: bool) -> None:
    assert [allows(kind, CELLS, text) for kind in KINDS] == [expected] * 2
