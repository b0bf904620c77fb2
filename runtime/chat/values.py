"""Extracts what an answer contains, for display and for the clipboard: tables in any format, fields, or text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from markdown_it import MarkdownIt

from granite4v.errors import AnswerError
from granite4v.runtime.chat.conversation import ChatError, Question, Turn
from granite4v.runtime.formats import read, salvage, write
from granite4v.runtime.formats.table import Cell, Table, with_header_rows

COPY_FORMATS = {"csv": "csv", "md": "markdown", "json": "json"}


def value_of(question: Question, text: str, *, complete: bool) -> Any:
    """The value of an answer, as `formats.read` returns it, or its complete part if it is incomplete or invalid; None
    if nothing in it is complete and in the format of its task."""
    if complete:
        try:
            return read(question.task, text)
        except AnswerError:
            pass
    saved = salvage(question.task, text)
    return None if saved is None else saved.value


def tables_in(turn: Turn) -> list[Table]:
    """The tables of an answer: those of a task, a table of fields (a row each), or the Markdown or HTML tables in free
    text."""
    question = turn.question
    value = value_of(question, turn.answer, complete=turn.finish_reason == "stop")
    if question.kind.gives_tables:
        return [value] if isinstance(value, Table) else value or []
    if question.kind.kind == "fields":
        return [] if value is None else [fields_table(value)]
    if "<table" in turn.answer.lower():
        found = salvage("tables_html", turn.answer[turn.answer.lower().index("<table") :])
        if found is not None and found.value:
            return list(found.value)
    return markdown_tables(turn.answer)


def fields_table(value: Any) -> Table:
    """Fields as a table of two columns with a row for each single value; nested ones are named 'items[0].price'."""
    rows = [("field", "value"), *((name or "value", _shown(item)) for name, item in _leaves(value, ""))]
    cells = [Cell(i, j, text) for i, row in enumerate(rows) for j, text in enumerate(row)]
    return with_header_rows(len(rows), 2, 1, cells)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    else:
        yield name, value


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def markdown_tables(text: str) -> list[Table]:
    """The pipe tables of a Markdown text."""
    tables: list[Table] = []
    rows: list[list[str]] = []
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level > 2:
            rows[-1].append(token.content)
        elif token.type == "table_close":
            cells = [Cell(i, j, cell) for i, row in enumerate(rows) for j, cell in enumerate(row)]
            tables.append(with_header_rows(len(rows), len(rows[0]), 1, cells))
            rows = []
    return tables


def to_copy(turns: Sequence[Turn], form: str | None) -> tuple[str, str]:
    """(text, what it is) for the last table of a conversation, in `form` of COPY_FORMATS (default csv). Without a table
    and without `form`, for the last answer as it is.

    Raises ChatError when there is nothing of that kind, AnswerError for a table that the format cannot represent.
    """
    for turn in reversed(turns):
        if form == "json" and turn.question.kind.kind == "fields":
            value = value_of(turn.question, turn.answer, complete=turn.finish_reason == "stop")
            if value is not None:
                return json.dumps(value, ensure_ascii=False, indent=2) + "\n", "the fields as JSON"
        tables = tables_in(turn)
        if tables:
            form = form or "csv"
            size = f"{tables[-1].n_rows} rows, {tables[-1].n_cols} columns"
            return write(tables[-1], COPY_FORMATS[form]), f"the last table ({size}) as {form}"
    if not turns:
        raise ChatError("there is no answer yet.")
    if form is not None:
        raise ChatError("no answer so far has a table; '/copy' alone copies the last answer as text.")
    return turns[-1].answer, "the last answer"
