"""Parsers and writers for the formats that document models answer in: tables, chart data and fields. Pure Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from granite4v.errors import AnswerError
from granite4v.lazy import exports

if TYPE_CHECKING:
    from granite4v.runtime.formats.csv_ import read_csv, write_csv
    from granite4v.runtime.formats.fields import read_fields
    from granite4v.runtime.formats.html import read_html, write_html
    from granite4v.runtime.formats.markdown import write_markdown
    from granite4v.runtime.formats.otsl import read_otsl, write_otsl
    from granite4v.runtime.formats.place import Key, Place
    from granite4v.runtime.formats.table import Cell, Table
    from granite4v.runtime.formats.tables_json import read_tables_json, write_tables_json
    from granite4v.runtime.formats.tasks import TASKS, Salvaged, Task, places, read, salvage, task_or_question
    from granite4v.runtime.formats.writers import FORMATS, write

__all__ = [
    "FORMATS",
    "TASKS",
    "AnswerError",
    "Cell",
    "Key",
    "Place",
    "Salvaged",
    "Table",
    "Task",
    "places",
    "read",
    "read_csv",
    "read_fields",
    "read_html",
    "read_otsl",
    "read_tables_json",
    "salvage",
    "task_or_question",
    "write",
    "write_csv",
    "write_html",
    "write_markdown",
    "write_otsl",
    "write_tables_json",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "csv_": ("read_csv", "write_csv"),
        "fields": ("read_fields",),
        "html": ("read_html", "write_html"),
        "markdown": ("write_markdown",),
        "otsl": ("read_otsl", "write_otsl"),
        "place": ("Key", "Place"),
        "table": ("Cell", "Table"),
        "tables_json": ("read_tables_json", "write_tables_json"),
        "tasks": ("TASKS", "Salvaged", "Task", "places", "read", "salvage", "task_or_question"),
        "writers": ("FORMATS", "write"),
    },
)
