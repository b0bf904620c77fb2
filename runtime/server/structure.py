"""The requested form of an answer: free text, an instance of a JSON Schema, or the format of a task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from granite4v.errors import AnswerError
from granite4v.runtime.formats.fields import KVP_PROMPT
from granite4v.runtime.formats.json_text import load_json
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.formats.tasks import TASKS
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.json_schema import JsonSchema
from granite4v.runtime.grammar.schema import checked_schema
from granite4v.runtime.grammar.validation import Validator
from granite4v.runtime.server.content import Turn
from granite4v.runtime.server.errors import invalid
from granite4v.runtime.server.requests import JsonObjectFormat, ResponseFormat, TextFormat

_ANY_OBJECT = {"type": "object"}
FIELDS = "kvp"  # the task whose answers are instances of a schema


class SchemaCheck:
    """Validates answers against the complete schema of a request. `warnings`: how the schema is read, and which of its
    keywords the grammar does not enforce."""

    def __init__(self, schema: JsonSchema, grammar: Grammar) -> None:
        self.warnings = [*schema.notes, *grammar.warnings]
        self._validator = Validator(schema)

    def problem(self, text: str) -> str | None:
        """Why the text of an answer is not an instance of the schema; None if it is."""
        try:
            return self._validator.problem(load_json(text))
        except AnswerError as error:
            return str(error)


@dataclass(frozen=True)
class Form:
    """`task`: the task whose format the answer has; '' for free text. `schema`: JSON Schema of the fields, for the task
    'kvp'. `is_held`: whether the answer is constrained by a grammar."""

    task: str = ""
    schema: Any = None
    is_held: bool = True

    def compiled(self) -> tuple[Grammar | None, SchemaCheck | None]:
        """The grammar, None if the answer is not constrained; and the check against the schema, if there is one.

        Can take seconds for a large schema. Raises ConstraintError.
        """
        if self.schema is None:
            return (grammar_for(self.task) if self.task and self.is_held else None), None
        schema = checked_schema(self.schema)
        grammar = grammar_for(self.task, schema)
        return grammar, None if grammar is None else SchemaCheck(schema, grammar)


def form_of(
    response_format: ResponseFormat | None, ollama_format: Any, turns: Sequence[Turn], *, unconstrained: bool
) -> Form:
    """Determines the form of the answer to these messages. Raises ApiError.

    A schema takes precedence. A last user message that is only a task tag asks for the format of that task.
    """
    schema = _schema(response_format, ollama_format)
    if schema is not None:
        return Form(FIELDS, schema)
    asked = turns[-1].text.strip() if turns and turns[-1].role == "user" else ""
    task = next((task for task in TASKS.values() if task.tag == asked), None)
    return Form() if task is None else Form(task.name, is_held=not unconstrained)


def _schema(response_format: ResponseFormat | None, ollama_format: Any) -> Any:
    if ollama_format is not None:
        return _ANY_OBJECT if ollama_format == "json" else ollama_format
    if response_format is None or isinstance(response_format, TextFormat):
        return None
    schema = response_format.schema_
    if isinstance(response_format, JsonObjectFormat):
        return _ANY_OBJECT if schema is None else schema
    if schema is None and response_format.json_schema is not None:
        schema = response_format.json_schema.schema_
    if schema is None:
        raise invalid("a 'json_schema' format without its 'schema'; give one.", "response_format", "missing_schema")
    return schema


def with_prompt(turns: Sequence[Turn], form: Form) -> list[Turn]:
    """Returns the messages. If a schema is given and the last user message has images but no text, the prompt for
    fields that models were trained on is added to it."""
    last = turns[-1]
    if form.task != FIELDS or last.role != "user" or not last.parts or last.text.strip():
        return list(turns)
    prompt = KVP_PROMPT.format(schema=json.dumps(form.schema, indent=2))
    return [*turns[:-1], Turn(last.role, last.others, [*last.parts, prompt])]
