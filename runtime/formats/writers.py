"""Tables as text in each of the formats."""

from __future__ import annotations

from collections.abc import Sequence

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


def write(tables: Table | Sequence[Table], form: str) -> str:
    """Tables as text, `form` one of FORMATS. Several: a list in OTSL and JSON, one after another in the others.

    Raises AnswerError when a format cannot carry a text, ValueError for an unknown format.
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
