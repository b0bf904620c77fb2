"""What may be said for a task, as plain data. Knows no tokens; `guide` compiles it for a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from granite4v.runtime.grammar.schema import definite

PROMPT = "prompt"
_FORMS = {"chart2csv": "csv", "tables_html": "html", "tables_json": "cells", "tables_otsl": "otsl"}
_FREE = ("chart2code", "chart2summary", PROMPT)
_KVP = "kvp"


@dataclass(frozen=True)
class Grammar:
    """What answers to `task` look like: a `form` of tables, or JSON text of a `schema`.

    `warnings`: what the schema demands beyond that; answers can break it, and have to be checked.
    """

    task: str
    form: str = ""
    schema: str = ""
    warnings: tuple[str, ...] = field(default=(), compare=False)


def grammar_for(task: str, schema: object = None) -> Grammar | None:
    """The grammar of a task, with or without angle brackets; None for one whose answers are free text.

    `schema` is the JSON schema of 'kvp', any object by default. Raises ConstraintError for one that is invalid or that
    no answer can satisfy, ValueError for an unknown task or a schema that the task has no use for.
    """
    name = task.strip().removeprefix("<").removesuffix(">")
    if name not in (*_FORMS, *_FREE, _KVP):
        raise ValueError(f"unknown task {task!r}; known: {', '.join((*_FORMS, *_FREE, _KVP))}.")
    if schema is not None and name != _KVP:
        raise ValueError(f"a schema for {task!r}; only '{_KVP}' takes one.")
    if name == _KVP:
        text, warnings = definite({"type": "object"} if schema is None else schema)
        return Grammar(name, schema=text, warnings=warnings)
    return Grammar(name, form=_FORMS[name]) if name in _FORMS else None
