"""Layouts: a table, chart or form set out on a sheet, in a look that a random generator chooses.

A layout is a pure function of its arguments, so the same sheet can be had at another font size.
"""

from __future__ import annotations

import itertools
import math
from random import Random

from contents import BLANK_AXIS, BLANK_SERIES
from drawing import AILERON, Face, Ink, Sheet, face
from truth import Cell, Chart, Form, Table


def lay_table(table: Table, rng: Random, font: str, size: float, ink: Ink) -> Sheet:
    """A sheet of the table: headers stand out by weight, shade or rule, and spans by rules or lines under groups."""
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
    pad = rng.uniform(0.35, 0.8) * size if rules == "grid" else rng.uniform(0.65, 1.0) * size
    row_height = rng.uniform(1.3, 1.9) * size
    line = max(1, round(size / 14))
    strong = max(line, round(size / rng.choice((8, 14))))
    aligns = [_column_align(rng, table, col) for col in range(table.n_cols)]
    plain, bold = face(font, size), face(font, size, bold=font != AILERON)
    frame = rng.random() < 0.5

    def look(cell: Cell) -> Face:
        return bold if cell.header and (bold_head or cell.row >= table.n_header_rows) else plain

    widths = [2.0 * size] * table.n_cols
    for cell in sorted(table.cells, key=lambda c: c.colspan):
        span = slice(cell.col, cell.col + cell.colspan)
        missing = look(cell).width(cell.text) + 2 * pad - sum(widths[span])
        for col in range(cell.col, cell.col + cell.colspan):
            widths[col] += max(0.0, missing) / cell.colspan
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


def _column_align(rng: Random, table: Table, col: int) -> float:
    numeric = all(c.text[-1:].isdigit() for c in table.cells if c.col == col and c.text and not c.header)
    return rng.choices((0.0, 0.5, 1.0), (2, 2, 6) if numeric else (6, 3, 1))[0]


def _number(text: str) -> float:
    return float("".join(c for c in text if c.isdigit() or c in ".-"))


def lay_chart(chart: Chart, rng: Random, font: str, size: float, ink: Ink) -> Sheet:
    """A sheet of the chart: the title on top, each value beside its bar, point or slice."""
    plain, bold = (
        face(font, size),
        face(font, size * rng.choice((1.0, 1.0, 1.15)), bold=font != AILERON and rng.random() < 0.5),
    )
    sheet = Sheet()
    if chart.kind == "pie":
        _pie(sheet, chart, rng, plain, ink)
    elif chart.kind == "line":
        _lines(sheet, chart, rng, plain, ink)
    elif rng.random() < 0.35:
        _flat_bars(sheet, chart, rng, plain, ink)
    else:
        _bars(sheet, chart, rng, plain, ink)
    x0, y0, x1, _ = sheet.extent()
    if chart.kind != "pie" and chart.series != (BLANK_SERIES,):
        y0 -= 1.1 * size
        _legend(sheet, chart, x0, (x0 + x1) / 2, y0, plain, ink, rng.random() < 0.5)
        y0 -= 0.4 * size
    align = rng.choice((0.0, 0.5, 0.5))
    sheet.text(x0 + align * (x1 - x0), y0 - 1.1 * size, chart.title, bold, ink.text, align)
    return sheet


def _legend(
    sheet: Sheet, chart: Chart, left: float, middle: float, y: float, plain: Face, ink: Ink, centred: bool
) -> None:
    em = plain.size
    total = sum(plain.width(name) + 1.8 * em for name in chart.series) - 0.8 * em
    x = middle - total / 2 if centred else left
    for name, colour in zip(chart.series, ink.series, strict=False):
        sheet.box(x, y - 0.35 * em, x + 0.7 * em, y + 0.35 * em, colour)
        sheet.text(x + em, y, name, plain, ink.text)
        x += plain.width(name) + 1.8 * em


def _bars(sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink) -> None:
    em, count = plain.size, len(chart.series)
    height = rng.uniform(4, 7) * em
    widest = max(plain.width(v) for row in chart.values for v in row) + 0.3 * em
    bar = max(rng.uniform(1.2, 2.4) * em, widest if count > 1 else 0.0)
    slot = max(count * bar + 0.6 * em, widest, max(plain.width(label) for label in chart.labels) + 0.6 * em)
    top = max(_number(v) for row in chart.values for v in row) or 1.0
    _frame(sheet, chart, rng, plain, ink, slot * len(chart.labels), height)
    for i, row in enumerate(chart.values):
        middle = (i + 0.5) * slot
        for j, value in enumerate(row):
            x = middle + (j - (count - 1) / 2) * bar
            y = -_number(value) / top * (height - 1.5 * em)
            half = bar / 2 if count == 1 else bar * 0.42
            sheet.box(x - half, y, x + half, 0, ink.series[j])
            sheet.text(x, y - 0.72 * em, value, plain, ink.text, 0.5, ink.paper)
        sheet.text(middle, 0.85 * em, chart.labels[i], plain, ink.text, 0.5)


def _frame(sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink, width: float, height: float) -> None:
    """The axes, faint lines behind, and the axis name below."""
    line = max(1, round(plain.size / 14))
    if rng.random() < 0.4:
        for k in range(1, 4):
            sheet.line(0, -height * k / 4, width, -height * k / 4, ink.shade, line)
    if rng.random() < 0.5:
        sheet.line(0, 0, 0, -height, ink.rule, line)
    sheet.line(0, 0, width, 0, ink.rule, line)
    if chart.axis != BLANK_AXIS:
        sheet.text(width / 2, 2.3 * plain.size, chart.axis, plain, ink.text, 0.5)


def _lines(sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink) -> None:
    em = plain.size
    height = rng.uniform(5, 8) * em
    texts = [*chart.labels, *(v for row in chart.values for v in row)]
    slot = max(max(plain.width(text) for text in texts) + 0.7 * em, 2.5 * em)
    numbers = [[_number(v) for v in row] for row in chart.values]
    low, high = min(map(min, numbers)), max(map(max, numbers))
    line = max(1, round(em / 9))

    def y(number: float) -> float:
        return -1.5 * em - (number - low) / ((high - low) or 1.0) * (height - 3 * em)

    _frame(sheet, chart, rng, plain, ink, slot * len(chart.labels), height)
    for j in range(len(chart.series)):
        points = [((i + 0.5) * slot, y(row[j])) for i, row in enumerate(numbers)]
        for (xa, ya), (xb, yb) in itertools.pairwise(points):
            sheet.line(xa, ya, xb, yb, ink.series[j], line)
        for px, py in points:
            sheet.disc(px, py, 0.22 * em, ink.series[j])
    for i, row in enumerate(numbers):
        middle = (i + 0.5) * slot
        for j, number in enumerate(row):
            below = len(row) > 1 and number < max(row)
            sheet.text(
                middle, y(number) + (0.75 if below else -0.75) * em, chart.values[i][j], plain, ink.text, 0.5, ink.paper
            )
        sheet.text(middle, 0.85 * em, chart.labels[i], plain, ink.text, 0.5)


def _flat_bars(sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink) -> None:
    em, count = plain.size, len(chart.series)
    bar, gap, length = 1.15 * em, rng.uniform(0.4, 0.9) * em, rng.uniform(5, 10) * em
    top = max(_number(v) for row in chart.values for v in row) or 1.0
    line = max(1, round(em / 14))
    y = 0.0
    for label, row in zip(chart.labels, chart.values, strict=True):
        sheet.text(-0.5 * em, y + gap / 2 + bar * count / 2, label, plain, ink.text, 1.0)
        for j, value in enumerate(row):
            y0 = y + gap / 2 + j * bar
            end = _number(value) / top * length
            sheet.box(0, y0 + 0.08 * em, end, y0 + bar - 0.08 * em, ink.series[j])
            sheet.text(end + 0.4 * em, y0 + bar / 2, value, plain, ink.text)
        y += bar * count + gap
    sheet.line(0, 0, 0, y, ink.rule, line)
    if chart.axis != BLANK_AXIS:
        sheet.text(-0.5 * em, -0.7 * em, chart.axis, plain, ink.text, 1.0)


def _pie(sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink) -> None:
    em = plain.size
    radius = rng.uniform(2.2, 3.6) * em
    joined = rng.choice(("{}: {}", "{} ({})"))
    texts = [joined.format(label, row[0]) for label, row in zip(chart.labels, chart.values, strict=True)]
    numbers = [_number(row[0]) for row in chart.values]
    total = sum(numbers) or 1.0
    start = rng.uniform(0, 360)
    sides: dict[bool, list[tuple[float, float, str]]] = {False: [], True: []}
    for i, (number, text) in enumerate(zip(numbers, texts, strict=True)):
        end = start + number / total * 360
        sheet.slice(0, 0, radius, start, end, ink.series[i], ink.paper)
        angle = math.radians((start + end) / 2)
        sides[math.cos(angle) >= 0].append((math.sin(angle) * radius, math.cos(angle) * radius, text))
        start = end
    for on_right, entries in sides.items():
        entries.sort()
        sign = 1 if on_right else -1
        y = -math.inf
        spread = []
        for ey, ex, text in entries:
            y = max(y + 1.3 * em, ey * 1.1)
            spread.append((y, ex, ey, text))
        excess = (spread[-1][0] - max(spread[-1][2] * 1.1, radius)) if spread else 0.0
        for y, ex, ey, text in spread:
            y -= max(0.0, excess) if len(spread) > 1 else 0.0
            x = sign * (radius + 0.9 * em)
            sheet.line(ex, ey, x - sign * 0.3 * em, y, ink.rule)
            sheet.text(x, y, text, plain, ink.text, 0.0 if on_right else 1.0)


def _label(name: str, spelling: int) -> str:
    """The label a field is drawn with: 'Due date', 'Due Date' or 'DUE DATE'."""
    text = name.replace("_", " ")
    return (text.capitalize(), text.title(), text.upper())[spelling]


def lay_form(form: Form, rng: Random, font: str, size: float, ink: Ink) -> Sheet:
    """A sheet of the form: lines 'Label: value' in one or two columns, boxes, or an invoice's list of amounts."""
    sheet = Sheet()
    spelling = rng.choices((0, 1, 2), (7, 2, 1))[0]
    shown = [(_label(name, spelling), value) for name, value in form.fields if value is not None]
    plain, bold = face(font, size), face(font, size, bold=font != AILERON)
    columns = 2 if len(shown) > 3 and rng.random() < 0.35 else 1
    layout = rng.choices(("lines", "aligned", "boxes", "ruled"), (35, 30, 20, 15))[0]
    heavy_labels = rng.random() < 0.35
    title_size = rng.choice((1.0, 1.2))
    names = bold if heavy_labels else plain
    mark = "" if layout in ("boxes", "ruled") and rng.random() < 0.6 else ":"
    pitch = rng.uniform(1.35, 1.8) * size
    per_column = -(-len(shown) // columns)
    x, lowest = 0.0, 0.0
    for c in range(columns):
        group = shown[c * per_column : (c + 1) * per_column]
        if not group:
            break
        label_width = max(names.width(label + mark) for label, _ in group)
        value_width = max(plain.width(value) for _, value in group)
        y, right = 0.0, x
        for label, value in group:
            if layout == "boxes":
                width = max(label_width, value_width) + 1.0 * size
                sheet.box(x, y, x + width, y + 2.9 * size, None, ink.rule, max(1, round(size / 14)))
                sheet.text(
                    x + 0.5 * size, y + 0.8 * size, label + mark, names, ink.rule if ink.rule[0] < 90 else ink.text
                )
                sheet.text(x + 0.5 * size, y + 2.1 * size, value, plain, ink.text)
                y, right = y + 2.9 * size, max(right, x + width)
                continue
            start = label_width if layout != "lines" else names.width(label + mark)
            value_x = x + start + 0.55 * size
            sheet.text(x, y + pitch / 2, label + mark, names, ink.text)
            if layout == "ruled":
                sheet.line(value_x - 0.2 * size, y + pitch * 0.9, value_x + value_width, y + pitch * 0.9, ink.rule)
            sheet.text(value_x, y + pitch / 2, value, plain, ink.text)
            y, right = y + pitch, max(right, value_x + (value_width if layout == "ruled" else plain.width(value)))
        x, lowest = right + 1.6 * size, max(lowest, y)
    if form.title:
        x0, y0, x1, _ = sheet.extent()
        align = rng.choice((0.0, 0.5))
        heading = face(font, size * title_size, bold=font != AILERON)
        sheet.text(x0 + align * (x1 - x0), y0 - 1.2 * size, form.title, heading, ink.text, align)
    return sheet
