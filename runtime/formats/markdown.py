"""Writes a table as GitHub-flavored Markdown. There is no parser: no task has answers in this format."""

from __future__ import annotations

import re
from itertools import groupby

from granite4v.runtime.formats.table import Table, printable

# what a renderer would not show as it stands: '|', tags, entities, emphasis, code, strikethrough, links
_MARKUP = re.compile(r"\\|[|`*]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)|~~|!?\[(?=[^\]]*\][(\[])")


def write_markdown(table: Table) -> str:
    """Writes one header line (Markdown allows no more) and the other rows below it.

    As in docling, a spanning cell repeats its text in every slot, several header rows are joined with ' - ', a table
    without header rows uses its first row as one, and line breaks become spaces. Raises AnswerError if repeated texts
    make the table too long.
    """
    table.check_repeated()
    texts = table.texts()
    n_header_rows = max(1, table.n_header_rows)
    header = [_joined(column) for column in zip(*texts[:n_header_rows], strict=True)]
    lines = ["| " + " | ".join(map(_escape, row)) + " |" for row in [header, *texts[n_header_rows:]]]
    lines.insert(1, "|" + " --- |" * table.n_cols)
    return "\n".join(lines)


def _joined(texts: tuple[str, ...]) -> str:
    """Joins stacked headers. A header that spans rows occurs once per row but is written once."""
    return " - ".join(text for text, _ in groupby(filter(None, texts)))


def _escape(text: str) -> str:
    shown = printable(" ".join(text.splitlines()))
    return _MARKUP.sub(lambda found: "".join(f"\\{character}" for character in found[0]), shown)
