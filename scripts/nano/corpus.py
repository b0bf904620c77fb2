"""Text-only training data of the nano model's base: pages as plain text, and the tasks' answers for them.

A page of text takes the place of the later image, before the same prompt. So the base already knows the formats, and
how to copy into them, before it sees an image.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import TypeVar

from scripts.nano import contents, formats
from scripts.nano.language import pieces
from scripts.nano.truth import Cell, Chart, Form, Table
from scripts.nano.values import (
    amount,
    cased,
    cell_text,
    city,
    code,
    column_kind,
    company,
    date,
    integer,
    noun,
    person,
    word,
)

MAX_TOKENS = 400  # of message and answer together
T = TypeVar("T")
RULE = "---"  # line between header rows and body of a table in plain text
ABOVE = "^"  # text of a slot that belongs to the cell above it


def text_example(rng: Random) -> tuple[str, str]:
    """Draws the text of a user's message and its answer, at most `MAX_TOKENS` together."""
    while True:
        example = _drawn(rng, EXAMPLES)(rng)
        if sum(map(n_tokens, example)) <= MAX_TOKENS:
            return example


def plain_text(rng: Random) -> str:
    """Draws text without a question: sentences, a page, or one of the output formats; at most `MAX_TOKENS`."""
    while True:
        text = _drawn(rng, PLAIN)(rng)
        if n_tokens(text) <= MAX_TOKENS:
            return text


def n_tokens(text: str) -> int:
    """Returns the length in tokens; runs of spaces are overestimated."""
    n_pieces = 0

    def count(_: re.Match[str]) -> str:
        nonlocal n_pieces
        n_pieces += 1
        return ""

    rest = _piece_pattern().sub(count, text)
    return n_pieces + len(rest.encode())


@functools.cache
def _piece_pattern() -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(pieces(), key=len, reverse=True))))


def _drawn(rng: Random, weighted: tuple[tuple[int, T], ...]) -> T:
    return rng.choices([draw for _, draw in weighted], [weight for weight, _ in weighted])[0]


# --- truths, from tiny to as large as in images ---


def random_table(rng: Random) -> Table:
    return contents.random_table(rng, rng.random())


def random_chart(rng: Random) -> Chart:
    return contents.random_chart(rng, rng.random())


def random_form(rng: Random) -> Form:
    return contents.random_form(rng, rng.random())


# --- pages in plain text ---


def table_page(rng: Random, table: Table) -> str:
    """Writes a table as text: columns aligned with spaces or separated by bars; always bars if cells are joined."""
    barred = _is_joined(table) or table.n_cols == 1 or rng.random() < 0.4
    return _with_rule(table, _barred(table) if barred else _aligned(rng, table))


def _with_rule(table: Table, lines: list[str]) -> str:
    n = table.n_header_rows
    return "\n".join([*lines[:n], RULE, *lines[n:]] if n else lines)


def _is_joined(table: Table) -> bool:
    return any(cell.rowspan * cell.colspan > 1 for cell in table.cells)


def _barred(table: Table) -> list[str]:
    """Writes rows with as many bars after a cell as it has columns, and `ABOVE` in the lower rows of a joined cell.

    For example, a cell 'A' of two columns, then 'B' and 'C' below it: '|A||' and '|B|C|'.
    """
    lines = []
    for i in range(table.n_rows):
        cells = sorted((c for c in table.cells if c.row <= i < c.row + c.rowspan), key=lambda c: c.col)
        shown = [(cell.text or " ") if cell.row == i else ABOVE for cell in cells]
        lines.append("|" + "".join(text + "|" * cell.colspan for text, cell in zip(shown, cells, strict=True)))
    return lines


def _aligned(rng: Random, table: Table) -> list[str]:
    """Writes rows with text left-aligned, most number columns right-aligned, two or three spaces between columns."""
    texts = {(cell.row, cell.col): cell.text for cell in table.cells}
    widths = [max(len(texts[i, j]) for i in range(table.n_rows)) for j in range(table.n_cols)]
    body = range(table.n_header_rows, table.n_rows)
    right = [any(re.match(r"[-+$(]?\d", texts[i, j]) for i in body) and rng.random() < 0.8 for j in range(table.n_cols)]
    gap = " " * rng.choice((2, 2, 3))
    lines = []
    for i in range(table.n_rows):
        row = [(texts[i, j], widths[j], right[j]) for j in range(table.n_cols)]
        lines.append(gap.join(t.rjust(width) if to_right else t.ljust(width) for t, width, to_right in row).rstrip())
    return lines


def chart_page(rng: Random, chart: Chart) -> str:
    """Writes a chart's kind and title, then its numbers as a table; names that an image would not show are left out."""
    unnamed = (contents.BLANK_AXIS, contents.BLANK_SERIES)
    names = tuple("" if name in unnamed else name for name in (chart.axis, *chart.series))
    rows = [names] if any(names) else []
    rows += [(label, *values) for label, values in zip(chart.labels, chart.values, strict=True)]
    cells = tuple(Cell(i, j, text) for i, row in enumerate(rows) for j, text in enumerate(row))
    table = Table(len(rows), len(names), 1 if any(names) else 0, cells)
    return f"{chart.kind} chart: {chart.title}\n{table_page(rng, table)}"


def form_page(rng: Random, form: Form) -> str:
    """Writes 'Label: value' lines in any order, at times with a title, an unrelated line, a label without a value."""
    separator = rng.choice((": ", ": ", ":", "  ", " - "))
    style = rng.choice((str.capitalize, str.capitalize, str.title, str.upper, str.lower))
    shown = [(name, value) for name, value in form.fields if value is not None or rng.random() < 0.2]
    lines = [f"{style(name.replace('_', ' '))}{separator}{value or ''}".rstrip() for name, value in shown]
    if rng.random() < 0.5:
        rng.shuffle(lines)
    if rng.random() < 0.4:
        lines.insert(rng.randint(0, len(lines)), sentence(rng))
    if form.title:
        lines.insert(0, form.title)
    return "\n".join(lines)


def sentence(rng: Random) -> str:
    """Draws a short statement about random values."""
    subject, other, kind = word(rng), word(rng), column_kind(rng)
    value = cell_text(rng, kind)
    return rng.choice(
        (
            f"The {subject} is {value}.",
            f"The {subject} of the {other} was {value} on {date(rng)}.",
            f"{person(rng)} paid {amount(rng)} for the {subject}.",
            f"{company(rng)} in {city(rng)} sold {integer(rng)} {noun(rng)}s.",
            f"Please send the {subject} to {person(rng)}, {city(rng)}.",
            f"{cased(rng, subject)} and {other}: {value}",
            f"Order {code(rng)} was sent to {city(rng)} on {date(rng)}.",
            f"No {subject} without a {other}.",
        )
    )


def sentences(rng: Random) -> str:
    return rng.choice((" ", "\n")).join(sentence(rng) for _ in range(rng.randint(1, 4)))


# --- questions and answers ---

Writer = Callable[[Table], str]
TABLE_WRITERS: tuple[tuple[str, Writer], ...] = (
    (formats.TASK_PROMPTS["<tables_otsl>"], formats.otsl),
    (formats.TASK_PROMPTS["<tables_html>"], formats.html),
    (formats.TASK_PROMPTS["<tables_json>"], formats.tables_json),
)


def grid_rows(table: Table) -> list[tuple[str, ...]]:
    """Returns the text of every slot; that of a joined cell is only in its first slot."""
    texts = {(cell.row, cell.col): cell.text for cell in table.cells}
    return [tuple(texts.get((i, j), "") for j in range(table.n_cols)) for i in range(table.n_rows)]


def table_csv(table: Table) -> str:
    return formats.csv_rows(grid_rows(table))


def _asked(page: str, prompt: str) -> str:
    """Returns the message, with the page in place of an image's placeholder and its newline."""
    return f"{page}\n{prompt}"


def table_example(rng: Random) -> tuple[str, str]:
    """Draws a page with a table, to be written in one of the tasks' formats or as CSV."""
    table = _without_row_headers(random_table(rng))
    prompt, write = rng.choices((*TABLE_WRITERS, (formats.TABLE_AS_CSV, table_csv)), (4, 4, 4, 1))[0]
    return _asked(table_page(rng, table), prompt), write(table)


def _without_row_headers(table: Table) -> Table:
    """Returns the table with only the properties that a page of text can show: row headers become plain cells."""
    cells = tuple(replace(cell, header=cell.row < table.n_header_rows) for cell in table.cells)
    return replace(table, cells=cells)


def chart_example(rng: Random) -> tuple[str, str]:
    chart = random_chart(rng)
    tag = rng.choice(("<chart2csv>", "<chart2csv>", "<chart2code>", "<chart2summary>", "<chart2summary>"))
    return _asked(chart_page(rng, chart), formats.TASK_PROMPTS[tag]), formats.answer_for(tag, chart)


def form_example(rng: Random) -> tuple[str, str]:
    form = random_form(rng)
    schema = formats.form_schema(form, nullable=rng.random() < 0.8)
    return _asked(form_page(rng, form), formats.kvp_prompt(schema)), formats.form_json(form)


def question_example(rng: Random) -> tuple[str, str]:
    form = random_form(rng)
    name = rng.choice(form.fields)[0]
    return _asked(form_page(rng, form), formats.field_question(name)), formats.field_answer(form, name)


def conversion_example(rng: Random) -> tuple[str, str]:
    """Draws a table in one of the output formats, to be converted to another, or to plain text."""
    table = random_table(rng)
    writers = TABLE_WRITERS
    if table.n_header_rows == 1 and not _is_joined(table):  # the tables that CSV can represent
        writers = (*writers, (formats.TABLE_AS_CSV, table_csv))
    (_, read), (prompt, write) = rng.sample(writers, 2)
    if rng.random() < 0.2:
        return _asked(read(table), formats.TABLE_AS_TEXT), _with_rule(table, _barred(table))
    return _asked(read(table), prompt), write(table)


def column_example(rng: Random) -> tuple[str, str]:
    """Draws a question for the cells of one column, a line each; empty ones are empty lines."""
    table = random_table(rng)
    rows = grid_rows(table)[table.n_header_rows :]
    column = rng.randrange(table.n_cols)
    prompt = formats.LIST_COLUMN.format(name=column + 1)
    return _asked(table_page(rng, table), prompt), "\n".join(row[column] for row in rows)


def copy_example(rng: Random) -> tuple[str, str]:
    text = rng.choice((sentences, lambda rng: form_page(rng, random_form(rng)), random_line))(rng)
    return _asked(text, formats.COPY_TEXT), text


def random_line(rng: Random) -> str:
    """Draws values of any kind with spaces between them."""
    return " ".join(cell_text(rng, column_kind(rng)) for _ in range(rng.randint(1, 6)))


Example = Callable[[Random], tuple[str, str]]
EXAMPLES: tuple[tuple[int, Example], ...] = (
    (40, table_example),
    (16, form_example),
    (8, question_example),
    (12, chart_example),
    (8, conversion_example),
    (4, column_example),
    (12, copy_example),
)
PLAIN: tuple[tuple[int, Callable[[Random], str]], ...] = (
    (6, sentences),
    (2, random_line),
    (3, lambda rng: form_page(rng, random_form(rng))),
    (3, lambda rng: table_page(rng, random_table(rng))),
    (2, lambda rng: table_csv(random_table(rng))),
    (3, lambda rng: rng.choice(TABLE_WRITERS)[1](random_table(rng))),
    (2, lambda rng: formats.form_json(random_form(rng))),
    (1, lambda rng: json.dumps(formats.form_schema(random_form(rng)), indent=2)),
    (2, lambda rng: formats.chart_csv(random_chart(rng))),
    (2, lambda rng: formats.chart_summary(random_chart(rng))),
    (1, lambda rng: formats.chart_code(random_chart(rng))),
)
