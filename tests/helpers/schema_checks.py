"""Checks what the grammar of a schema allows, what a validator reports, and what a warning says."""

from __future__ import annotations

import json
from typing import Any

from granite4v.runtime.grammar.json_schema import read_schema
from granite4v.runtime.grammar.validation import Validator
from tests.helpers.constrained import allows
from tests.helpers.schemas import kvp, of


def holds(schema: Any, yes: list[Any], no: list[Any]) -> None:
    """Checks which answers of the form {"a": value} are allowed. Values are JSON text or data."""
    grammar = kvp(of(["a"], a=schema))
    for wanted, values in ((True, yes), (False, no)):
        for value in values:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            assert allows("toy", grammar, f'{{"a": {text}}}') == wanted, (text, wanted)


def problem(schema: Any, value: Any) -> str | None:
    return Validator(read_schema(schema)).problem(value)


def warning(schema: Any) -> str:
    (found,) = kvp(schema).warnings
    return found
