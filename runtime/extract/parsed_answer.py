"""Parses the text of an answer, complete or truncated, into the value of a record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from granite4v.errors import AnswerError
from granite4v.runtime.extract.schema import Schema
from granite4v.runtime.formats import read, salvage


@dataclass(frozen=True)
class ParsedAnswer:
    """The content of an answer; fields as in Record."""

    value: Any
    valid: bool
    validity_error: str | None = None
    salvaged: bool = False


def parse_answer(task: str, text: str, finish_reason: str, schema: Schema | None) -> ParsedAnswer:
    """Parses an answer.

    An answer that did not end by itself is kept up to its last complete row or field, even if the truncated text
    happens to parse: a short last cell cannot be distinguished from half of a longer one. Prose is kept up to where it
    was cut.
    """
    why = None if finish_reason == "stop" else f"the answer did not end by itself ({finish_reason})"
    if why is None:
        try:
            return _checked(ParsedAnswer(read(task, text), True), schema)
        except AnswerError as error:
            why = str(error)
    saved = salvage(task, text)
    if saved is None:
        return ParsedAnswer(None, False, why)
    if not saved.cut:
        why = None
    return _checked(ParsedAnswer(saved.value, True, why, saved.cut), schema)


def _checked(parsed: ParsedAnswer, schema: Schema | None) -> ParsedAnswer:
    problem = schema.problem(parsed.value) if schema is not None else None
    if problem is None:
        return parsed
    return replace(parsed, valid=False, validity_error="; ".join(filter(None, [parsed.validity_error, problem])))
