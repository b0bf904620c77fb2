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
    elif rng.random() < 0.35 and all(_number(v) >= 0 for row in chart.values for v in row):
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
    numbers = [_number(v) for row in chart.values for v in row]
    per_unit = (height - 1.5 * em) / (max(max(numbers), -min(numbers)) or 1.0)
    lowest = -min(numbers) * per_unit + 1.3 * em if min(numbers) < 0 else 0.0
    width = slot * len(chart.labels)
    _frame(sheet, chart, rng, plain, ink, width, height, lowest)
    if rng.random() < 0.2:
        step = _round_step(max(max(numbers), 0.0))
        for k in range(3):
            if k * step * per_unit <= height:
                sheet.text(-0.4 * em, -k * step * per_unit, f"{k * step:g}", plain, ink.rule, 1.0)
    for i, row in enumerate(chart.values):
        middle = (i + 0.5) * slot
        for j, value in enumerate(row):
            x = middle + (j - (count - 1) / 2) * bar
            y = -_number(value) * per_unit
            half = bar / 2 if count == 1 else bar * 0.42
            sheet.box(x - half, min(y, 0.0), x + half, max(y, 0.0), ink.series[j])
            sheet.text(x, y + (0.72 if y > 0 else -0.72) * em, value, plain, ink.text, 0.5, ink.paper)
        sheet.text(middle, lowest + 0.85 * em, chart.labels[i], plain, ink.text, 0.5)


def _round_step(top: float) -> float:
    """A third to two thirds of `top`, in one digit."""
    if top <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top / 2))
    return power * max(1, math.floor(top / 2 / power))


def _frame(
    sheet: Sheet, chart: Chart, rng: Random, plain: Face, ink: Ink, width: float, height: float, lowest: float = 0.0
) -> None:
    """The axes, faint lines behind, and the axis name below the labels, which stand below `lowest`."""
    line = max(1, round(plain.size / 14))
    if rng.random() < 0.4:
        for k in range(1, 4):
            sheet.line(0, -height * k / 4, width, -height * k / 4, ink.shade, line)
    if rng.random() < 0.5:
        sheet.line(0, lowest, 0, -height, ink.rule, line)
    sheet.line(0, 0, width, 0, ink.rule, line)
    if chart.axis != BLANK_AXIS:
        sheet.text(width / 2, lowest + 2.3 * plain.size, chart.axis, plain, ink.text, 0.5)


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
    """A sheet of the form: lines in one or two columns, boxes, or a ledger with its amounts at the right."""
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
        _ledger(sheet, fields, rng.uniform(1.35, 1.8) * size, names, plain, bold, ink)
    else:
        columns = 2 if len(fields) > 3 and rng.random() < 0.35 else 1
        _field_lines(sheet, fields, columns, layout, rng.uniform(1.35, 1.8) * size, names, plain, ink)
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
    """One field a line, down one column after the other; values 'aligned', 'ruled' or where their label ends."""
    em, x = plain.size, 0.0
    per_column = -(-len(fields) // columns)
    for first in range(0, len(fields), max(1, per_column)):
        group = fields[first : first + per_column]
        label_width = max(names.width(label) for label, _ in group)
        value_width = max(plain.width(value) for _, value in group)
        right = x
        for i, (label, value) in enumerate(group):
            y = i * pitch
            value_x = x + (names.width(label) if layout == "lines" else label_width) + 0.55 * em
            sheet.text(x, y + pitch / 2, label, names, ink.text)
            sheet.text(value_x, y + pitch / 2, value, plain, ink.text)
            if layout == "ruled":
                line_y = y + pitch / 2 + 0.62 * em
                sheet.line(value_x - 0.2 * em, line_y, value_x + value_width, line_y, ink.rule)
            right = max(right, value_x + (value_width if layout == "ruled" else plain.width(value)))
        x = right + 1.6 * em


def _boxes(sheet: Sheet, fields: list[tuple[str, str]], columns: int, names: Face, plain: Face, ink: Ink) -> None:
    """Boxes row by row, the label above its value."""
    em = plain.size
    line, pad, height = max(1, round(em / 14)), 0.5 * em, 2.75 * em
    x = 0.0
    for column in range(columns):
        group = fields[column::columns]
        width = max(max(names.width(label), plain.width(value)) for label, value in group) + 2 * pad
        for row, (label, value) in enumerate(group):
            y = row * height
            sheet.box(x, y, x + width, y + height, None, ink.rule, line)
            sheet.text(x + pad, y + 0.75 * em, label, names, ink.text)
            sheet.text(x + pad, y + 2.0 * em, value, plain, ink.text)
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
    """Values end at the right; a rule stands above the last one, the total."""
    em, last = plain.size, len(fields) - 1
    width = max(bold.width(label) + bold.width(value) for label, value in fields) + 1.5 * em
    for i, (label, value) in enumerate(fields):
        y = (i + 0.5) * pitch
        sheet.text(0, y, label, bold if i == last else names, ink.text)
        sheet.text(width, y, value, bold if i == last else plain, ink.text, 1.0)
    sheet.line(0, last * pitch, width, last * pitch, ink.rule, max(1, round(em / 14)))
