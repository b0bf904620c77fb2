"""The prompts of the nano model and its exact answers, as pure functions of the truth.

The formats are Granite Vision's: OTSL, HTML, cells as JSON, CSV, matplotlib code, two sentences, an instance
of a JSON schema. Prompts are our own, except the key-value prompt.
"""

from __future__ import annotations

import csv
import html as html_escapes
import io
import json
import re
from typing import Any

from scripts.nano.truth import Cell, Chart, Form, Table

Json = dict[str, Any]

DEFAULT_SYSTEM = "You read documents and answer with what the page shows."

TASK_PROMPTS = {
    "<chart2csv>": "Write the data of this chart as CSV.",
    "<chart2code>": "Write Python code that draws this chart.",
    "<chart2summary>": "Summarize this chart in two sentences.",
    "<tables_html>": "Write the table on this page as HTML.",
    "<tables_json>": "Write the table on this page as JSON.",
    "<tables_otsl>": "Write the table on this page as OTSL.",
}
KVP = "<kvp>"  # names the key-value task like a tag, but the template has no such tag

KVP_PROMPT = """\
Extract structured data from this document.
Return a JSON object matching this schema:

{schema}

Return null for fields you cannot find.
Return ONLY valid JSON.
Return an instance of the JSON with extracted values, not the schema itself."""

TABLE_AS_CSV = "Write the table on this page as CSV."
TABLE_AS_TEXT = "Write the table on this page as plain text."
COPY_TEXT = "Copy the text of this page."
LIST_COLUMN = "List the values of column {name}."
QUESTION = "What is the {name}?"
NOT_FOUND = "not found"


# --- tables ---


def otsl(table: Table) -> str:
    """Writes a table as OTSL: a tag for each slot of the grid, `<nl>` after a row, text only in a cell's first slot."""
    parts = ["<otsl>"]
    for i, row in enumerate(_slots(table)):
        for j, cell in enumerate(row):
            if cell.row == i and cell.col == j:
                parts.append(_otsl_tag(table, cell) + cell.text)
            elif cell.row == i:
                parts.append("<lcel>")
            elif cell.col == j:
                parts.append("<ucel>")
            else:
                parts.append("<xcel>")
        parts.append("<nl>")
    return "".join([*parts, "</otsl>"])


def _otsl_tag(table: Table, cell: Cell) -> str:
    if not cell.text:
        return "<ecel>"
    if cell.row < table.n_header_rows:
        return "<ched>"
    return "<rhed>" if cell.header else "<fcel>"


def _slots(table: Table) -> list[list[Cell]]:
    """Returns the cell that covers each slot, (n_rows, n_cols)."""
    covering = {
        (i, j): cell
        for cell in table.cells
        for i in range(cell.row, cell.row + cell.rowspan)
        for j in range(cell.col, cell.col + cell.colspan)
    }
    return [[covering[i, j] for j in range(table.n_cols)] for i in range(table.n_rows)]


def html(table: Table) -> str:
    """Writes a table as HTML, with `<thead>` and `<tbody>` if they have rows, and no white space between tags."""
    rows = ["<tr>" + "".join(_html_cell(table, c) for c in _starting(table, i)) + "</tr>" for i in range(table.n_rows)]
    head, body = "".join(rows[: table.n_header_rows]), "".join(rows[table.n_header_rows :])
    head = f"<thead>{head}</thead>" if head else ""
    body = f"<tbody>{body}</tbody>" if body else ""
    return f"<table>{head}{body}</table>"


def _starting(table: Table, row: int) -> list[Cell]:
    return [cell for cell in table.cells if cell.row == row]


def _html_cell(table: Table, cell: Cell) -> str:
    tag = "th" if cell.header or cell.row < table.n_header_rows else "td"
    spans = f' colspan="{cell.colspan}"' if cell.colspan > 1 else ""
    spans += f' rowspan="{cell.rowspan}"' if cell.rowspan > 1 else ""
    return f"<{tag}{spans}>{html_escapes.escape(cell.text, quote=False)}</{tag}>"


def tables_json(table: Table) -> str:
    """Writes a table as JSON: dimensions (`rows` below the header), and cells in reading order, counted from 1."""
    return json.dumps(
        {
            "dimensions": {
                "rows": table.n_rows - table.n_header_rows,
                "columns": table.n_cols,
                "header_rows": table.n_header_rows,
                "total_rows": table.n_rows,
            },
            "cells": [_json_cell(table, cell) for cell in table.cells],
        },
        ensure_ascii=False,
    )


def _json_cell(table: Table, cell: Cell) -> Json:
    in_head = cell.row < table.n_header_rows
    return {
        "row": cell.row + 1,
        "col": cell.col + 1,
        "colspan": cell.colspan,
        "rowspan": cell.rowspan,
        "type": "header" if in_head or cell.header else "data",
        "header_level": cell.row + 1 if in_head else 0,
        "content": cell.text,
    }


# --- charts ---


def chart_csv(chart: Chart) -> str:
    """Writes a chart as CSV: a header row and a row for each label, values as drawn, quotes only where needed."""
    rows = [
        (chart.axis, *chart.series),
        *((label, *values) for label, values in zip(chart.labels, chart.values, strict=True)),
    ]
    return csv_rows(rows)


def csv_rows(rows: list[tuple[str, ...]]) -> str:
    """Writes CSV with a newline between rows and none at the end."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()[:-1]


def chart_code(chart: Chart) -> str:
    """Writes five to seven lines of matplotlib that draw the chart again."""
    columns = [[number(values[j]) for values in chart.values] for j in range(len(chart.series))]
    lines = ["import matplotlib.pyplot as plt", f"labels = {_strings(chart.labels)}"]
    series = ", ".join(
        f"{_string(name)}: {_numbers(column)}" for name, column in zip(chart.series, columns, strict=True)
    )
    if chart.kind == "pie":
        lines += [f"plt.pie({_numbers(columns[0])}, labels=labels)"]
    elif chart.kind == "line":
        lines += [f"for name, values in {{{series}}}.items():", "    plt.plot(labels, values, label=name)"]
    else:
        lines += [
            f"for i, (name, values) in enumerate({{{series}}}.items()):",
            "    plt.bar([x + i / 5 for x in range(len(labels))], values, 1 / 5, label=name, tick_label=labels)",
        ]
    lines += [f"plt.gca().set(title={_string(chart.title)}, xlabel={_string(chart.axis)})"]
    if chart.kind != "pie":
        lines += ["plt.legend()"]
    return "\n".join([*lines, "plt.show()"])


def number(text: str) -> str:
    """Returns a drawn value as a Python literal, without units and thousands separators.

    Raises ValueError when the text has no number.
    """
    found = re.search(r"-?\d[\d,]*(\.\d+)?", text)
    if not found:
        raise ValueError(f"the chart value {text!r} has no number in it")
    digits = found[0].replace(",", "")
    return str(int(digits)) if "." not in digits else digits


def _numbers(values: list[str]) -> str:
    return f"[{', '.join(values)}]"


def _strings(texts: tuple[str, ...]) -> str:
    return f"[{', '.join(map(_string, texts))}]"


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def chart_summary(chart: Chart) -> str:
    """Writes two sentences: what is drawn, and the highest and lowest value as drawn (the first of equal ones)."""
    slots = [(i, j) for i in range(len(chart.labels)) for j in range(len(chart.series))]

    def value(slot: tuple[int, int]) -> float:
        return float(number(chart.values[slot[0]][slot[1]]))

    def told(slot: tuple[int, int]) -> str:
        i, j = slot
        where = f"{chart.labels[i]}, {chart.series[j]}" if len(chart.series) > 1 else chart.labels[i]
        return f"{chart.values[i][j]} ({where})"

    names = " and ".join(filter(None, [", ".join(chart.series[:-1]), chart.series[-1]]))
    return (
        f'The {chart.kind} chart "{chart.title}" shows {names} by {chart.axis}. '
        f"The highest value is {told(max(slots, key=value))} and the lowest value is {told(min(slots, key=value))}."
    )


# --- forms ---


def form_schema(form: Form, nullable: bool = True) -> Json:
    """Returns a JSON schema of the form's fields: each a string or null, or only a string if not `nullable`."""
    kind: Any = ["string", "null"] if nullable else "string"
    return {"type": "object", "properties": {name: {"type": kind} for name, _ in form.fields}}


def form_json(form: Form) -> str:
    """Returns the schema's instance: values as on the page, null for those that are not there."""
    return json.dumps(dict(form.fields), ensure_ascii=False)


def kvp_prompt(schema: Json) -> str:
    """Returns the prompt of IBM's key-value benchmark."""
    return KVP_PROMPT.format(schema=json.dumps(schema, indent=2, ensure_ascii=False))


def field_question(name: str) -> str:
    """Returns a question about one field, whose name is given in snake_case."""
    return QUESTION.format(name=name.replace("_", " "))


def field_answer(form: Form, name: str) -> str:
    """Returns the bare value, or 'not found'. Raises KeyError for a field that the form does not have."""
    value = dict(form.fields)[name]
    return NOT_FOUND if value is None else value


# --- by task ---


def answer_for(tag: str, truth: Table | Chart | Form) -> str:
    """Returns the answer to a task tag, or to `KVP`. Raises TypeError when the truth is of another kind."""
    if isinstance(truth, Table):
        writers: dict[str, Any] = {"<tables_html>": html, "<tables_json>": tables_json, "<tables_otsl>": otsl}
    elif isinstance(truth, Chart):
        writers = {"<chart2csv>": chart_csv, "<chart2code>": chart_code, "<chart2summary>": chart_summary}
    else:
        writers = {KVP: form_json}
    if tag not in writers:
        raise TypeError(f"'{tag}' is no task of a {type(truth).__name__}, which has {', '.join(writers)}")
    return str(writers[tag](truth))
