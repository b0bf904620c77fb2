"""POST /parse: parses an answer, complete or not, with the parser of its task."""

from __future__ import annotations

import json
from typing import Any

from granite4v.errors import AnswerError
from granite4v.runtime.formats import read, salvage, write
from granite4v.runtime.formats.table import Table
from granite4v.runtime.formats.tasks import find_task
from granite4v.runtime.server.errors import invalid
from granite4v.runtime.server.replies import Parsed
from granite4v.runtime.server.requests import ParseRequest


def parsed(body: ParseRequest) -> Parsed:
    """Parses an answer. Raises ApiError for an unknown task."""
    try:
        task = find_task(body.task)
    except ValueError as error:
        raise invalid(str(error), "task", "unknown_task") from None
    value, problem, is_cut = None, None, True
    try:
        value, is_cut = (read(body.task, body.text), False) if body.ended else _complete_part(body)
    except AnswerError as error:
        problem = str(error)
        value, _ = _complete_part(body)
    if not task.gives_tables:
        return Parsed(kind=task.kind, value=value, is_cut=is_cut, error=problem)
    tables = [value] if isinstance(value, Table) else value or []
    return Parsed(
        kind=task.kind,
        tables=[json.loads(write(table, "json")) for table in tables],
        csv=[_csv(table) for table in tables],
        is_cut=is_cut,
        error=problem,
    )


def _complete_part(body: ParseRequest) -> tuple[Any, bool]:
    saved = salvage(body.task, body.text)
    return (None, True) if saved is None else (saved.value, saved.cut)


def _csv(table: Table) -> str | None:
    try:
        return write(table, "csv")
    except AnswerError:  # too long: texts are repeated over many slots
        return None
