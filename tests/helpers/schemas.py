"""Shorthands for schemas and their grammars."""

from __future__ import annotations

from typing import Any

from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.grammar.grammar import Grammar

SHORT = {"type": "string", "maxLength": 8}


def of(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema if required is None else {**schema, "required": required}


def kvp(schema: Any) -> Grammar:
    grammar = grammar_for("kvp", schema)
    assert grammar is not None
    return grammar
