"""Lays out a table, chart or form on a sheet, in a style that a random generator chooses.

A layout is a pure function of its arguments, so the same sheet can be laid out again at another font size.
"""

from __future__ import annotations

import itertools
from random import Random

from scripts.nano.contents import BLANK_SERIES
from scripts.nano.drawing import AILERON, Face, Ink, Sheet, face
from scripts.nano.truth import Cell, Chart, Form, Table


def lay_table(table: Table, rng: Random, font: str, size: float, ink: Ink) -> Sheet:
    """Lays out a table. Headers are marked by weight, shade or rule, and spans by rules or lines under groups."""
    sheet = Sheet()
    body_spans = any(c.rowspan > 1 or c.colspan > 1 for c in table.cells if c.row >= table.n_header_rows)
    rules = rng.choices(("grid", "rows", "head", "none"), (45, 25, 18, 12))[0]
    if body_spans:
        rules = (
            "grid"
            if any(c.colspan > 1 for c in table.cells if c.row >= table.n_header_rows)
            else rng.choice(("grid", "rows"))
        )
    bold_head, shaded_head = rng.random() < 0.6, rng.random() < 0.5
    if font == AILERON:
        bold_head = False
    striped = not body_spans and (bold_head or rules == "head" or not table.n_header_rows) and rng.random() < 0.18
    if not (bold_head or shaded_head or rules == "head"):
        shaded_head = True
    pad = rng.uniform(0.45, 0.8) * size if rules == "grid" else rng.uniform(0.65, 1.0) * size
    row_height = rng.uniform(1.45, 2.0) * size
    line = max(1, round(size / 14))
    strong = max(line, round(size / rng.choice((8, 14))))
    aligns = [_column_align(rng, table, col) for col in range(table.n_cols)]
    plain, bold = face(font, size), face(font, size, bold=font != AILERON)
    frame = rng.random() < 0.5

    def look(cell: Cell) -> Face:
        return bold if cell.header and (bold_head or cell.row >= table.n_header_rows) else plain

    widths = _column_widths(table, {cell: look(cell).width(cell.text) + 2 * pad for cell in table.cells}, 2.0 * size)
    lefts = [sum(widths[:col]) for col in range(table.n_cols + 1)]
    tops = [row * row_height for row in range(table.n_rows + 1)]
    right, bottom = lefts[-1], tops[-1]
    if shaded_head and table.n_header_rows:
        sheet.box(0, 0, right, tops[table.n_header_rows], ink.shade)
    if striped:
        for row in range(table.n_header_rows + 1, table.n_rows, 2):
            sheet.box(0, tops[row], right, tops[row + 1], ink.shade)
    for cell in table.cells:
        x0, x1 = lefts[cell.col], lefts[cell.col + cell.colspan]
        y0, y1 = tops[cell.row], tops[cell.row + cell.rowspan]
        last = cell.row + cell.rowspan == table.n_rows
        if cell.header and cell.row >= table.n_header_rows and font == AILERON:
            sheet.box(x0, y0, x1, y1, ink.shade)
        if rules == "grid":
            sheet.box(x0, y0, x1, y1, None, ink.rule, line)
        elif rules == "rows" and not last:
            inset = 0.4 * size if cell.colspan > 1 and cell.row < table.n_header_rows else 0.0
            sheet.line(x0 + inset, y1, x1 - inset, y1, ink.rule, line)
        elif cell.colspan > 1:
            sheet.line(x0 + 0.4 * size, y1, x1 - 0.4 * size, y1, ink.rule, line)
        align = 0.5 if cell.colspan > 1 else aligns[cell.col]
        x = x0 + pad + align * (x1 - x0 - 2 * pad)
        sheet.text(x, (y0 + y1) / 2, cell.text, look(cell), ink.text, align)
    if rules in ("rows", "head") and table.n_header_rows:
        sheet.line(0, tops[table.n_header_rows], right, tops[table.n_header_rows], ink.rule, strong)
    if rules in ("rows", "head") and frame:
        sheet.line(0, 0, right, 0, ink.rule, strong)
        sheet.line(0, bottom, right, bottom, ink.rule, strong)
    return sheet


def _column_widths(table: Table, needed: dict[Cell, float], least: float) -> list[float]:
    """Returns widths that fit every cell; missing width of a spanning cell is spread evenly over its columns."""
    widths = [least] * table.n_cols
    for cell in sorted(table.cells, key=lambda c: c.colspan):
        missing = needed[cell] - sum(widths[cell.col : cell.col + cell.colspan])
        for col in range(cell.col, cell.col + cell.colspan):
            widths[col] += max(0.0, missing) / cell.colspan
    return widths


def _column_align(rng: Random, table: Table, col: int) -> float:
    numeric = all(c.text[-1:].isdigit() for c in table.cells if c.col == col and c.text and not c.header)
    return rng.choices((0.0, 0.5, 1.0), (2, 2, 6) if numeric else (6, 3, 1))[0]


def _number(text: str) -> float:
    return float("".join(c for c in text if c.isdigit() or c in ".-"))


def lay_chart(chart: Chart, rng: Random, font: str, size: float, ink: Ink) -> Sheet:
    """Lays out a chart, its title on top. Values are next to horizontal bars, else under the labels or in a legend."""
    plain, bold = (
        face(font, size),
        face(font, size * rng.choice((1.0, 1.0, 1.15)), bold=font != AILERON and rng.random() < 0.5),
    )
    sheet = Sheet()
    if chart.kind == "pie":
        _pie(sheet, chart, rng, plain, ink)
    elif chart.kind == "line":
        _lines(sheet, chart, rng, plain, ink)
    elif len(chart.series) == 1 and rng.random() < 0.6 and all(_number(v) >= 0 for row in chart.values for v in row):
        _flat_bars(sheet, chart, rng, plain, ink)
    else:
        _bars(sheet, chart, rng, plain, ink)
    x0, y0, x1, _ = sheet.extent()
    align = rng.choice((0.0, 0.5, 0.5))
    sheet.text(x0 + align * (x1 - x0), y0 - 1.1 * size, chart.title, bold, ink.text, align)
    return sheet


def _is_named(chart: Chart) -> bool:
    """Whether the image names the axis and the series."""
    return chart.series != (BLANK_SERIES,)


def _bars(sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink) -> None:
    em, count = plain.size, len(chart.series)
    height = rng.uniform(4, 7) * em
    slot = _slot(chart, plain)
    bar = min(rng.uniform(1.0, 2.4) * em, 0.8 * slot / count)
    numbers = [_number(v) for row in chart.values for v in row]
    per_unit = (height - 0.5 * em) / (max(max(numbers), -min(numbers)) or 1.0)
    lowest = max(0.0, -min(numbers) * per_unit)
    _frame(sheet, rng, plain, ink, slot * len(chart.labels), height, lowest)
    for i, row in enumerate(chart.values):
        for j, value in enumerate(row):
            x = (i + 0.5) * slot + (j - (count - 1) / 2) * bar
            y = -_number(value) * per_unit
            half = bar * (0.5 if count == 1 else 0.42)
            sheet.box(x - half, min(y, 0.0), x + half, max(y, 0.0), ink.series[j])
    _data_rows(sheet, chart, plain, ink, slot, lowest)


def _slot(chart: Chart, plain: Face) -> float:
    """Returns the width of a label's slot along the axis, which also fits the values below it."""
    texts = [*chart.labels, *(value for row in chart.values for value in row)]
    return max(max(plain.width(text) for text in texts) + 0.8 * plain.size, 2.2 * plain.size)


def _data_rows(sheet: Sheet, chart: Chart, plain: Face, ink: Ink, slot: float, lowest: float) -> None:
    """Draws labels under the axis and each series' values under them; axis and series are named at the left."""
    em = plain.size
    tops = [lowest + (0.95 + 1.5 * j) * em for j in range(1 + len(chart.series))]
    if _is_named(chart):
        sheet.text(-0.5 * em, tops[0], chart.axis, plain, ink.text, 1.0)
        for name, y, colour in zip(chart.series, tops[1:], ink.series, strict=False):
            sheet.text(-0.5 * em, y, name, plain, ink.text, 1.0)
            left = -1.2 * em - plain.width(name)
            sheet.box(left, y - 0.25 * em, left + 0.5 * em, y + 0.25 * em, colour)
    for i, (label, row) in enumerate(zip(chart.labels, chart.values, strict=True)):
        for text, y in zip((label, *row), tops, strict=True):
            sheet.text((i + 0.5) * slot, y, text, plain, ink.text, 0.5)


def _frame(sheet: Sheet, rng: Random, plain: Face, ink: Ink, width: float, height: float, lowest: float = 0.0) -> None:
    """Draws the axes, and sometimes faint lines behind."""
    line = max(1, round(plain.size / 14))
    if rng.random() < 0.4:
        for k in range(1, 4):
            sheet.line(0, -height * k / 4, width, -height * k / 4, ink.shade, line)
    if rng.random() < 0.5:
        sheet.line(0, lowest, 0, -height, ink.rule, line)
    sheet.line(0, 0, width, 0, ink.rule, line)


def _lines(sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink) -> None:
    em = plain.size
    height, slot = rng.uniform(4, 7) * em, _slot(chart, plain)
    numbers = [[_number(v) for v in row] for row in chart.values]
    low, high = min(map(min, numbers)), max(map(max, numbers))
    _frame(sheet, rng, plain, ink, slot * len(chart.labels), height)
    for j in range(len(chart.series)):
        points = [
            ((i + 0.5) * slot, -0.5 * em - (row[j] - low) / ((high - low) or 1.0) * (height - em))
            for i, row in enumerate(numbers)
        ]
        for (xa, ya), (xb, yb) in itertools.pairwise(points):
            sheet.line(xa, ya, xb, yb, ink.series[j], max(1, round(em / 9)))
        for px, py in points:
            sheet.disc(px, py, 0.22 * em, ink.series[j])
    _data_rows(sheet, chart, plain, ink, slot, 0.0)


def _flat_bars(sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink) -> None:
    em = plain.size
    bar, gap, length = 1.15 * em, rng.uniform(0.4, 0.9) * em, rng.uniform(4, 9) * em
    top = max(_number(row[0]) for row in chart.values) or 1.0
    if _is_named(chart):
        sheet.text(-0.5 * em, -0.7 * em, chart.axis, plain, ink.text, 1.0)
        sheet.box(0, -0.95 * em, 0.5 * em, -0.45 * em, ink.series[0])
        sheet.text(0.8 * em, -0.7 * em, chart.series[0], plain, ink.text)
    y = 0.0
    for label, (value,) in zip(chart.labels, chart.values, strict=True):
        sheet.text(-0.5 * em, y + (gap + bar) / 2, label, plain, ink.text, 1.0)
        end = _number(value) / top * length
        sheet.box(0, y + gap / 2 + 0.08 * em, end, y + gap / 2 + bar - 0.08 * em, ink.series[0])
        sheet.text(end + 0.5 * em, y + (gap + bar) / 2, value, plain, ink.text)
        y += bar + gap
    sheet.line(0, 0, 0, y, ink.rule, max(1, round(em / 14)))


def _pie(sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink) -> None:
    """Draws the slices, and next to them a legend with their values."""
    em, pitch = plain.size, rng.uniform(1.45, 1.8) * plain.size
    radius = rng.uniform(2.0, 3.4) * em
    numbers = [_number(row[0]) for row in chart.values]
    start = rng.uniform(0, 360)
    middle = pitch * len(numbers) / 2
    for number, colour in zip(numbers, ink.series, strict=False):
        end = start + number / (sum(numbers) or 1.0) * 360
        sheet.slice(0, middle, radius, start, end, colour, ink.paper)
        start = end
    left = radius + 1.2 * em
    right = left + 1.6 * em + max(plain.width(label) for label in chart.labels)
    for i, (label, (value,)) in enumerate(zip(chart.labels, chart.values, strict=True)):
        y = (i + 0.5) * pitch
        sheet.box(left - 0.8 * em, y - 0.25 * em, left - 0.3 * em, y + 0.25 * em, ink.series[i])
        sheet.text(left, y, label, plain, ink.text)
        sheet.text(right, y, value, plain, ink.text)


def _label(name: str, spelling: int) -> str:
    """Returns the label that a field is drawn with: 'Due date', 'Due Date' or 'DUE DATE'."""
    text = name.replace("_", " ")
    return (text.capitalize(), text.title(), text.upper())[spelling]


def lay_form(form: Form, rng: Random, font: str, size: float, ink: Ink) -> Sheet:
    """Lays out a form: lines in one or two columns, boxes, or a ledger with its amounts at the right."""
    sheet = Sheet()
    spelling = rng.choices((0, 1, 2), (7, 2, 1))[0]
    shown = [(name, _label(name, spelling), value) for name, value in form.fields if value is not None]
    layout = rng.choices(("lines", "aligned", "boxes", "ruled"), (32, 28, 25, 15))[0]
    if shown and shown[-1][0] == "total" and rng.random() < 0.5:
        layout = "ledger"
    plain, bold = face(font, size), face(font, size, bold=font != AILERON)
    names = bold if rng.random() < 0.35 else plain
    mark = "" if layout in ("boxes", "ruled", "ledger") and rng.random() < 0.6 else ":"
    fields = [(label + mark, value) for _, label, value in shown]
    if layout == "boxes":
        _boxes(sheet, fields, 2 if len(fields) > 1 and rng.random() < 0.6 else 1, names, plain, ink)
    elif layout == "ledger":
        _ledger(sheet, fields, rng.uniform(1.45, 1.9) * size, names, plain, bold, ink)
    else:
        columns = 2 if len(fields) > 3 and rng.random() < 0.35 else 1
        _field_lines(sheet, fields, columns, layout, rng.uniform(1.45, 1.9) * size, names, plain, ink)
    if form.title:
        x0, y0, x1, _ = sheet.extent()
        align = rng.choice((0.0, 0.5))
        heading = face(font, size * rng.choice((1.0, 1.2)), bold=font != AILERON)
        sheet.text(x0 + align * (x1 - x0), y0 - 1.2 * size, form.title, heading, ink.text, align)
    return sheet


def _field_lines(
    sheet: Sheet,
    fields: list[tuple[str, str]],
    columns: int,
    layout: str,
    pitch: float,
    names: Face,
    plain: Face,
    ink: Ink,
) -> None:
    """Draws one field per line, column by column. Values are 'aligned', 'ruled' or directly after their label."""
    em, x = plain.size, 0.0
    per_column = -(-len(fields) // columns)
    for first in range(0, len(fields), max(1, per_column)):
        group = fields[first : first + per_column]
        label_width = max(names.width(label) for label, _ in group)
        value_width = max(plain.width(value) for _, value in group)
        right = x
        for i, (label, value) in enumerate(group):
            y = i * pitch
            value_x = x + (names.width(label) if layout == "lines" else label_width) + 0.8 * em
            sheet.text(x, y + pitch / 2, label, names, ink.text)
            sheet.text(value_x, y + pitch / 2, value, plain, ink.text)
            if layout == "ruled":
                line_y = y + pitch / 2 + 0.62 * em
                sheet.line(value_x - 0.2 * em, line_y, value_x + value_width, line_y, ink.rule)
            right = max(right, value_x + (value_width if layout == "ruled" else plain.width(value)))
        x = right + 1.6 * em


def _boxes(sheet: Sheet, fields: list[tuple[str, str]], columns: int, names: Face, plain: Face, ink: Ink) -> None:
    """Draws boxes row by row, each with its label above its value."""
    em = plain.size
    line, pad, height = max(1, round(em / 14)), 0.5 * em, 3.2 * em
    x = 0.0
    for column in range(columns):
        group = fields[column::columns]
        width = max(max(names.width(label), plain.width(value)) for label, value in group) + 2 * pad
        for row, (label, value) in enumerate(group):
            y = row * height
            sheet.box(x, y, x + width, y + height, None, ink.rule, line)
            sheet.text(x + pad, y + 0.85 * em, label, names, ink.text)
            sheet.text(x + pad, y + 2.35 * em, value, plain, ink.text)
        x += width


def _ledger(
    sheet: Sheet,
    fields: list[tuple[str, str]],
    pitch: float,
    names: Face,
    plain: Face,
    bold: Face,
    ink: Ink,
) -> None:
    """Draws lines whose values are right-aligned, with a rule above the last one, the total."""
    em, last = plain.size, len(fields) - 1
    width = max(bold.width(label) + bold.width(value) for label, value in fields) + 1.5 * em
    for i, (label, value) in enumerate(fields):
        y = (i + 0.5) * pitch
        sheet.text(0, y, label, bold if i == last else names, ink.text)
        sheet.text(width, y, value, bold if i == last else plain, ink.text, 1.0)
    sheet.line(0, last * pitch, width, last * pitch, ink.rule, max(1, round(em / 14)))
