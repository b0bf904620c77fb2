"""Turns answers into what `rich` renders: Markdown, and tables of any width. Texts of tables are cleaned here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment
from rich.table import Table as Grid
from rich.text import Text

from granite4v.cli.terminal import clean
from granite4v.runtime.chat.values import fields_table
from granite4v.runtime.formats import Table

_FENCE = re.compile(r" {0,3}(```|~~~)")
_NUMBER = re.compile(r"[-+(]?[^\w\s]?\s?\d[\d.,\s]*\)?\s?[^\w\s]?%?")
MIN_COLUMN = 6  # least width of a column that needs it, in characters; if they do not fit, a table is shown row by row


class _Answer(Markdown):
    """Markdown that shows everything the model wrote: HTML as plain text, and all line breaks."""

    def __init__(self, text: str) -> None:
        super().__init__(text, code_theme="ansi_dark", hyperlinks=False)
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self.parsed = [_with_breaks(token) for token in parser.parse(text)]


def _with_breaks(token: Token) -> Token:
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"
    return token


@dataclass(frozen=True)
class Lines:
    """Renders content without empty lines at its start and end; with `n_last`, only that many of the last lines."""

    content: RenderableType
    n_last: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.content, options.update(height=None), pad=False)
        while lines and _is_blank(lines[0]):
            del lines[0]
        while lines and _is_blank(lines[-1]):
            del lines[-1]
        for line in lines[-self.n_last :] if self.n_last else lines:
            yield from line
            yield Segment.line()


def _is_blank(line: list[Segment]) -> bool:
    return not any(segment.text.strip() for segment in line)


def markdown(text: str) -> RenderableType:
    """Renders Markdown. The text must not contain control characters."""
    return Lines(_Answer(text))


def complete_blocks(text: str) -> int:
    """The position up to which a growing Markdown text consists of complete blocks, which can be rendered.

    A block ends with an empty line outside a code fence, unless the next line is indented and so still belongs to it.
    """
    end = at = 0
    fence: str | None = None
    was_blank = False
    for line in text.splitlines(keepends=True):
        if was_blank and fence is None and not line[0].isspace():
            end = at
        mark = _FENCE.match(line)
        if mark is not None and (fence is None or fence == mark[1]):
            fence = mark[1] if fence is None else None
        was_blank = not line.strip()
        at += len(line)
    return end


def fields_or_table(value: Any) -> Table | None:
    """The table to show for the value of an answer; None for text, and if there is nothing to show yet."""
    if isinstance(value, Table):
        return value
    if isinstance(value, list) and value and isinstance(value[-1], Table):
        return value[-1]
    return fields_table(value) if isinstance(value, dict | list) and value else None


def rendered_table(table: Table, width: int, last_rows: int | None = None) -> RenderableType:
    """Renders a table with its header rows; with `last_rows`, only that many of the last other rows. A table with more
    columns than fit in the width is shown row by row."""
    rows = _texts(table)
    header, body = rows[: table.n_header_rows], rows[table.n_header_rows :]
    left_out = 0 if last_rows is None else max(0, len(body) - last_rows)
    if table.n_cols > 1 and _least_width(rows) > width:
        return _row_by_row(header, body[left_out:])
    grid = Grid(box=box.SQUARE if len(header) < 2 else box.SIMPLE_HEAD, show_header=bool(header), pad_edge=True)
    for j in range(table.n_cols):
        is_number = bool(body) and all(_NUMBER.fullmatch(row[j]) or not row[j] for row in body)
        heading = Text("\n".join(row[j] for row in header))
        grid.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    if left_out:
        grid.add_row(f"... {left_out} more", *[""] * (table.n_cols - 1))
    for row in body[left_out:]:
        grid.add_row(*map(Text, row))
    return grid


def _least_width(rows: list[list[str]]) -> int:
    """The least width of a grid: each column is as wide as its longest text, but at most `MIN_COLUMN`, plus 3 for the
    border and padding."""
    widest = (max(max(map(cell_len, text.split("\n"))) for text in column) for column in zip(*rows, strict=True))
    return 1 + sum(min(MIN_COLUMN, width) + 3 for width in widest)


def _texts(table: Table) -> list[list[str]]:
    """The texts by row and column. A cell's text is in its top left slot; the other slots that it covers are empty."""
    rows = [[""] * table.n_cols for _ in range(table.n_rows)]
    for cell in table.cells:
        rows[cell.row][cell.col] = clean(cell.text)
    return rows


def _row_by_row(header: list[list[str]], body: list[list[str]]) -> RenderableType:
    """Renders each row as lines of 'column: value'."""
    names = [" ".join(filter(None, texts)) for texts in zip(*header, strict=True)] if header else []
    parts: list[RenderableType] = []
    for number, row in enumerate(body, 1):
        parts.append(Text(f"row {number}", style="bold"))
        for j, value in enumerate(row):
            name = names[j] if names and names[j] else f"column {j + 1}"
            parts.append(Text(f"  {name}: {value}"))
    return Group(*parts)
