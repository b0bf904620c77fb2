"""Writes tables as text in any of the formats."""

from __future__ import annotations

from collections.abc import Sequence

from granite4v.errors import ArgumentError
from granite4v.runtime.formats.csv_ import write_csv
from granite4v.runtime.formats.html import write_html
from granite4v.runtime.formats.markdown import write_markdown
from granite4v.runtime.formats.otsl import write_otsl
from granite4v.runtime.formats.table import Table
from granite4v.runtime.formats.tables_json import write_tables_json, write_tables_json_list

_WRITERS = {
    "csv":      write_csv,
    "html":     write_html,
    "json":     write_tables_json,
    "markdown": write_markdown,
    "otsl":     write_otsl,
}  # fmt: skip
FORMATS = tuple(_WRITERS)


def write(tables: Table | Sequence[Table], name: str) -> str:
    """Writes tables in one of FORMATS. In OTSL and JSON, several become a list; in the others, they follow one another.

    Raises AnswerError when the format cannot represent a text, ArgumentError for an unknown format.
    """
    if name not in _WRITERS:
        raise ArgumentError(f"unknown format {name!r}; known: {', '.join(FORMATS)}.")
    if isinstance(tables, Table):
        return _WRITERS[name](tables)
    if name == "json":
        return write_tables_json_list(list(tables))
    written = [_WRITERS[name](table) for table in tables]
    if name == "otsl":
        return "[" + ", ".join(written) + "]"
    return ("\n" if name == "html" else "\n\n").join(written)
