"""Measures how much of a document's truth an answer contains: cells, values, fields, and TEDS by docling's metric."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from typing import Any

from granite4v.runtime.formats import TASKS, AnswerError, read, salvage, write, write_html
from scripts.nano import formats
from scripts.nano.documents import Document
from scripts.nano.truth import Chart, Form, Table


@dataclass(frozen=True)
class Measured:
    """`right` of `n` cells, chart values or fields; `teds` for tables only (0 when the answer contains no table)."""

    right: int
    n: int
    exact: bool
    teds: float | None = None


def measure(document: Document, task: str, text: str) -> Measured:
    """Compares an answer with the truth. An answer that does not parse has nothing right."""
    if isinstance(document.truth, Table):
        return _table(document.truth, task, text)
    if isinstance(document.truth, Chart):
        return _chart(document.truth, text)
    if task == "kvp":
        return _form(document.truth, text)
    raise ValueError(f"no measure for {task}; known are {', '.join(formats.TASK_PROMPTS)}, kvp")


def whole_part(task: str, text: str) -> str:
    """Returns what `extract` keeps of an answer that did not end by itself, in the task's format; '' for nothing."""
    saved = salvage(task, text)
    return "" if saved is None else written(task, saved.value)


def written(task: str, value: Any) -> str:
    """Writes a record's value in the format of its task: one table, a chart's data or fields."""
    if task == "kvp":
        return json.dumps(value)
    (table,) = value if isinstance(value, list) else (value,)
    return write(table, TASKS[task].suffix)


def _table(truth: Table, task: str, text: str) -> Measured:
    """Counts a cell as right when its text, position and spans are; cells that are not on the page count as wrong."""
    expected = {(cell.row, cell.col, cell.rowspan, cell.colspan, cell.text) for cell in truth.cells}
    try:
        (table,) = read(task.strip("<>"), text)
    except (AnswerError, ValueError):
        return Measured(0, len(expected), False, 0.0)
    found = {(cell.row, cell.col, cell.rowspan, cell.colspan, cell.text) for cell in table.cells}
    right = len(expected & found)
    return Measured(
        right,
        max(len(expected), len(found)),
        text == formats.answer_for(task, truth),
        _teds(formats.html(truth), write_html(table)),
    )


def _teds(expected: str, found: str) -> float:
    from docling_metrics_table.docling_metrics_table import TableMetric, TableMetricHTMLInputSample, TableMetricKind

    sample = TableMetricHTMLInputSample(id="table", html_a=expected, html_b=found)
    result = TableMetric([TableMetricKind.TEDS]).evaluate_sample(sample)
    assert result.teds is not None
    return result.teds.teds


def _chart(truth: Chart, text: str) -> Measured:
    """Counts a value as right when it is in the row of its label and the column of its series."""
    rows = list(csv.reader(text.splitlines()))
    header = rows[0][1:] if rows else []
    found = {(row[0], series): value for row in rows[1:] if row for series, value in zip(header, row[1:], strict=False)}
    expected = {
        (label, series): value
        for label, values in zip(truth.labels, truth.values, strict=True)
        for series, value in zip(truth.series, values, strict=True)
    }
    right = sum(found.get(key) == value for key, value in expected.items())
    return Measured(right, max(len(expected), len(found)), text == formats.chart_csv(truth))


def _form(truth: Form, text: str) -> Measured:
    """Counts a field as right when its value is; the value of a field that is not on the page is null."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        found = {}
    right = sum(name in found and found[name] == value for name, value in truth.fields)
    return Measured(right, max(len(truth.fields), len(found)), text == formats.form_json(truth))
