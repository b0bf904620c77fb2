"""A table as GitHub's Markdown. Written only: no task of a model answers in it."""

from __future__ import annotations

from itertools import groupby

from granite4v.runtime.formats.table import Table, printable


def write_markdown(table: Table) -> str:
    """One header line, all that Markdown knows, and the other rows below it.

    As docling does it: a cell that spans repeats its text in every slot, several header rows are joined with ' - ',
    a table without any takes its first row, a line break becomes a space. Raises AnswerError where repeated texts grow
    out of bounds.
    """
    table.check_repeated()
    texts = table.texts()
    n_header_rows = max(1, table.n_header_rows)
    header = [_joined(column) for column in zip(*texts[:n_header_rows], strict=True)]
    lines = ["| " + " | ".join(map(_escape, row)) + " |" for row in [header, *texts[n_header_rows:]]]
    lines.insert(1, "|" + " --- |" * table.n_cols)
    return "\n".join(lines)


def _joined(texts: tuple[str, ...]) -> str:
    """The texts of stacked headers; one that spans rows is there more than once."""
    return " - ".join(text for text, _ in groupby(filter(None, texts)))


def _escape(text: str) -> str:
    return printable(" ".join(text.splitlines())).replace("\\", "\\\\").replace("|", "\\|")
