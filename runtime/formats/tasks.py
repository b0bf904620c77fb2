"""From a task and an answer to a value, whole or as far as it goes; and from tables to text in any form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from granite4v.errors import AnswerError
from granite4v.runtime.formats.csv_ import read_csv, salvage_csv, write_csv
from granite4v.runtime.formats.html import read_html, salvage_html, write_html
from granite4v.runtime.formats.json_text import read_fields, salvage_fields
from granite4v.runtime.formats.json_values import whole_characters
from granite4v.runtime.formats.markdown import write_markdown
from granite4v.runtime.formats.otsl import read_otsl, salvage_otsl, write_otsl
from granite4v.runtime.formats.table import Table
from granite4v.runtime.formats.tables_json import (
    read_tables_json,
    salvage_tables_json,
    write_tables_json,
    write_tables_json_list,
)
from granite4v.runtime.formats.wrapping import unfence


@dataclass(frozen=True)
class Salvaged:
    """What is whole of an answer. `cut` is False only when the form itself says that nothing is missing."""

    value: Any
    cut: bool


def _read_code(text: str) -> str:
    return _text(unfence(text, "python").text)


def _text(text: str) -> str:
    if not text.strip():
        raise AnswerError("the answer is empty; expected text.")
    return text.strip()


def _salvage_code(text: str) -> tuple[str | None, bool]:
    """The lines that end with a line break."""
    body = unfence(text, "python")
    lines = body.text if body.closed else body.text[: body.text.rfind("\n") + 1]
    return lines.strip() or None, body.closed


def _salvage_text(text: str) -> tuple[str | None, bool]:
    """All of it: prose has no end mark."""
    return text.strip() or None, False


@dataclass(frozen=True)
class _Task:
    read: Callable[[str], Any]
    salvage: Callable[[str], tuple[Any, bool]]


_TASKS = {
    "chart2csv":     _Task(read_csv, salvage_csv),
    "chart2code":    _Task(_read_code, _salvage_code),
    "chart2summary": _Task(_text, _salvage_text),
    "tables_html":   _Task(read_html, salvage_html),
    "tables_json":   _Task(read_tables_json, salvage_tables_json),
    "tables_otsl":   _Task(read_otsl, salvage_otsl),
    "kvp":           _Task(read_fields, salvage_fields),
}  # fmt: skip
TASKS = tuple(_TASKS)

_WRITERS = {
    "csv":      write_csv,
    "html":     write_html,
    "json":     write_tables_json,
    "markdown": write_markdown,
    "otsl":     write_otsl,
}  # fmt: skip
FORMATS = tuple(_WRITERS)


def read(task: str, text: str) -> Any:
    """What an answer says: tables (list of Table), a chart's data (Table), fields (dict or list), code or prose (str).

    `task` is one of TASKS, with or without angle brackets; `kvp` is the key-value prompt. Raises AnswerError when the
    answer is not in the task's form, ValueError for an unknown task.
    """
    return _task(task).read(whole_characters(text))


def salvage(task: str, text: str) -> Salvaged | None:
    """What `read` would give for the whole rows (tables, CSV), fields (kvp) or lines (code) of an answer that was cut.

    A cell that reaches below the last row is shortened. An answer that is wrong in the middle is kept up to there.
    None when nothing is whole.
    """
    value, whole = _task(task).salvage(whole_characters(text))
    return Salvaged(value, not whole) if value or whole else None


def write(tables: Table | Sequence[Table], form: str) -> str:
    """Tables as text, `form` one of FORMATS. Several: a list in OTSL and JSON, one after another in the others.

    Raises AnswerError when a form cannot carry a text, ValueError for an unknown form.
    """
    if form not in _WRITERS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMATS)}.")
    if isinstance(tables, Table):
        return _WRITERS[form](tables)
    if form == "json":
        return write_tables_json_list(list(tables))
    written = [_WRITERS[form](table) for table in tables]
    if form == "otsl":
        return "[" + ", ".join(written) + "]"
    return ("\n" if form == "html" else "\n\n").join(written)


def _task(name: str) -> _Task:
    bare = name.strip().removeprefix("<").removesuffix(">")
    if bare not in _TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}.")
    return _TASKS[bare]
