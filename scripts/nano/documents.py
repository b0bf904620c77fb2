"""Made-up tables, charts and forms with their pictures: what the nano model learns to read.

`draw_document` makes all of it from one seed; `draw` draws a content that a caller chose. A `level` from
0 to 1 goes from one short row on clean paper to the full range of layouts, noise and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import values
from drawing import RGB, Face, Glyphs, Ink, Sheet, face, fonts, held_out_font, page, photographed
from PIL import Image
from truth import Cell, Chart, Form, Table

__all__ = ["HELD_OUT_SEEDS", "KINDS", "Document", "Glyphs", "draw", "draw_document", "fonts", "held_out_font"]

HELD_OUT_SEEDS = 1_000_000_000  # seeds from here on are never trained on
KINDS = ("table", "chart", "form")
BLANK_AXIS, BLANK_SERIES = "Label", "Value"  # what a chart calls them when the picture does not say
_TRIES = 30


@dataclass(frozen=True)
class Document:
    """A picture and what it says."""

    kind: str
    picture: Image.Image
    truth: Table | Chart | Form
    glyphs: Glyphs
    font: str
    seed: int


def draw_document(seed: int, kind: str | None = None, level: float = 1.0, font: str | None = None) -> Document:
    """The document of a seed; the same arguments give the same picture with the same library versions."""
    rng = Random(f"{seed} {kind} {level} {font}")
    kind = kind or rng.choices(KINDS, (45, 27, 28))[0]
    for _ in range(_TRIES):
        document = _drawn(rng, RANDOM[kind](rng, level), seed, level, font)
        if document:
            return document
    raise AssertionError(f"no document of kind '{kind}' fits a page at seed {seed}")


def draw(truth: Table | Chart | Form, seed: int = 0, level: float = 1.0, font: str | None = None) -> Document:
    """A given content in a style of the seed's choice; ValueError when no page can hold it readably."""
    rng = Random(f"{seed} {level} {font}")
    for _ in range(_TRIES):
        document = _drawn(rng, truth, seed, level, font)
        if document:
            return document
    raise ValueError(f"this {type(truth).__name__} is too large for a page of readable text")


def _drawn(rng: Random, truth: Table | Chart | Form, seed: int, level: float, font: str | None) -> Document | None:
    font = font or rng.choice(sorted(fonts()))
    clean = rng.random() < 1 - 0.5 * level
    ink, layout_seed = _ink(rng, level), rng.getrandbits(32)
    lay, kind = LAYOUTS[type(truth)]
    margin = rng.uniform(0.5, 1.2)

    def at(size: float) -> Sheet:
        return lay(truth, Random(layout_seed), font, size, ink)

    drawn = page(rng, at, ink.paper, margin)
    if not drawn or at(13.0).has_overlaps():
        return None
    picture, glyphs = drawn
    if not clean:
        picture, glyphs = photographed(rng, picture, glyphs, ink.paper, margin * 8, level)
    return Document(kind, picture, truth, glyphs, font, seed)


def _ink(rng: Random, level: float) -> Ink:
    def tint(low: int, high: int, spread: int) -> RGB:
        grey = rng.randint(low, high)
        r, g, b = (max(0, min(255, grey + rng.randint(-spread, spread))) for _ in range(3))
        return r, g, b

    paper = tint(215, 255, 5) if rng.random() < 0.5 * level else (255, 255, 255)
    text = tint(0, 70, 0) if rng.random() < 0.7 else (rng.randint(0, 40), rng.randint(0, 50), rng.randint(60, 120))
    rule = tint(0, 150, 0)
    depth = rng.randint(14, 40)
    shade = (paper[0] - depth, paper[1] - depth, paper[2] - rng.choice((depth, depth // 2)))
    if rng.random() < 0.3:
        first = rng.randint(40, 100)
        series = tuple((v, v, v) for v in range(first, 215, 22))
    else:
        series = tuple(_vivid(rng.random() if i == 0 else rng.random(), rng) for i in range(8))
    return Ink(paper, text, rule, shade, series)


def _vivid(hue: float, rng: Random) -> RGB:
    import colorsys

    r, g, b = colorsys.hsv_to_rgb(hue, rng.uniform(0.45, 0.95), rng.uniform(0.5, 0.9))
    return round(r * 255), round(g * 255), round(b * 255)


# --- tables ---


def random_table(rng: Random, level: float) -> Table:
    """A table of up to eight rows below at most two header rows, and up to five columns."""
    n_cols = min(rng.choices((1, 2, 3, 4, 5), (6, 24, 32, 26, 12))[0], 2 + round(3 * level))
    n_body = min(rng.choices(range(1, 9), (8, 20, 24, 18, 12, 8, 5, 5))[0], 1 + round(7 * level))
    n_head = 0 if level < 0.1 else rng.choices((0, 1, 2), (15, 70, 15))[0]
    spans = rng.random() < 0.32 * level and n_cols > 1
    row_heads = level > 0.2 and n_cols > 1 and n_head > 0 and rng.random() < 0.2
    if n_cols < 3:
        n_head = min(n_head, 1)
    grouped = spans and n_head > 0 and n_cols > 2 and rng.random() < 0.7
    n_head = 2 if grouped else n_head
    kinds = [values.column_kind(rng) for _ in range(n_cols)]
    if row_heads or rng.random() < 0.5:
        kinds[0] = rng.choice(("word", "phrase", "code", "date"))
    cells = _head_cells(rng, n_head, n_cols, grouped, row_heads)
    labels = _row_spans(rng, n_body) if spans and n_body > 2 and (not grouped or rng.random() < 0.3) else []
    section = rng.randrange(n_body) if spans and not labels and not grouped and n_body > 1 else None
    for i in range(n_body):
        row = n_head + i
        if i == section:
            cells.append(Cell(row, 0, values.phrase(rng), colspan=n_cols))
            continue
        for col in range(n_cols):
            if col == 0 and labels:
                height = dict(labels).get(i)
                if height:
                    cells.append(Cell(row, 0, values.phrase(rng, 10), height, header=row_heads))
                continue
            empty = n_body > 1 and n_cols > 1 and not (row_heads and col == 0) and rng.random() < 0.05 * level
            text = "" if empty else _short(rng, kinds[col], level)
            cells.append(Cell(row, col, text, header=row_heads and col == 0))
    return Table(n_head + n_body, n_cols, n_head, tuple(_without_blank_lines(rng, cells, n_head, n_cols)))


def _short(rng: Random, kind: str, level: float) -> str:
    longest = round(6 + 8 * level)
    for _ in range(50):
        text = values.cell_text(rng, kind)
        if len(text) <= longest:
            return text
    return values.cell_text(rng, "word")[:longest]


def _head_cells(rng: Random, n_head: int, n_cols: int, grouped: bool, row_heads: bool) -> list[Cell]:
    corner = "" if row_heads and rng.random() < 0.5 else values.heading(rng)
    if not grouped:
        return [
            Cell(i, j, corner if (i, j) == (0, 0) else values.heading(rng) if i == 0 else values.short_word(rng), header=True)
            for i in range(n_head)
            for j in range(n_cols)
        ]
    top, bottom, col = [], [], 0
    if row_heads or rng.random() < 0.7:
        top.append(Cell(0, 0, corner, rowspan=2, header=True))
        col = 1
    while col < n_cols:
        width = min(rng.choice((2, 2, 3)), n_cols - col)
        if width == 1:
            top.append(Cell(0, col, values.heading(rng), rowspan=2, header=True))
        else:
            top.append(Cell(0, col, values.phrase(rng), colspan=width, header=True))
            bottom += [Cell(1, col + k, values.heading(rng), header=True) for k in range(width)]
        col += width
    return top + bottom


def _row_spans(rng: Random, n_body: int) -> list[tuple[int, int]]:
    """First row and height of each row label; at least one is higher than a row."""
    spans, row = [], 0
    while row < n_body:
        height = min(rng.choice((1, 2, 2, 3)) if row else rng.choice((2, 2, 3)), n_body - row)
        spans.append((row, height))
        row += height
    return spans


def _without_blank_lines(rng: Random, cells: list[Cell], n_head: int, n_cols: int) -> list[Cell]:
    """The cells with a word wherever a whole body column or row was empty."""
    columns = {c.col for c in cells if c.text and c.colspan < n_cols and c.row >= n_head}
    rows = {c.row for c in cells if c.text}
    kept = []
    for cell in cells:
        if not cell.text and (cell.row not in rows or (cell.col not in columns and cell.row >= n_head)):
            columns.add(cell.col)
            rows.add(cell.row)
            cell = Cell(cell.row, cell.col, values.short_word(rng), cell.rowspan, cell.colspan, cell.header)
        kept.append(cell)
    return kept


def lay_table(table: Table, rng: Random, font: str, size: float, ink: Ink) -> Sheet:
    """A sheet of the table: headers stand out by weight, shade or rule, and spans by rules or lines under groups."""
    sheet = Sheet()
    body_spans = any(c.rowspan > 1 or c.colspan > 1 for c in table.cells if c.row >= table.n_header_rows)
    rules = rng.choices(("grid", "rows", "head", "none"), (45, 25, 18, 12))[0]
    if body_spans:
        rules = "grid" if any(c.colspan > 1 for c in table.cells if c.row >= table.n_header_rows) else rng.choice(("grid", "rows"))
    bold_head, shaded_head = rng.random() < 0.6, rng.random() < 0.5
    if font == "Aileron":
        bold_head = False
    if not (bold_head or shaded_head or rules == "head"):
        shaded_head = True
    striped = not body_spans and rng.random() < 0.15
    pad = rng.uniform(0.35, 0.8) * size if rules == "grid" else rng.uniform(0.65, 1.0) * size
    row_height = rng.uniform(1.3, 1.9) * size
    line = max(1, round(size / 14))
    strong = max(line, round(size / rng.choice((8, 14))))
    aligns = [_column_align(rng, table, col) for col in range(table.n_cols)]
    plain, bold = face(font, size), face(font, size, bold=font != "Aileron")
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
        if cell.header and cell.row >= table.n_header_rows and font == "Aileron":
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


# --- charts ---

_LABELS: dict[str, tuple[str, ...]] = {
    "Month": values.MONTHS,
    "Day": values.WEEKDAYS,
    "Quarter": ("Q1", "Q2", "Q3", "Q4"),
    "Region": ("North", "South", "East", "West", "Center", "Coast", "Inland"),
    "Grade": ("A", "B", "C", "D", "E", "F", "G"),
    "Size": ("XS", "S", "M", "L", "XL", "XXL"),
}


def random_chart(rng: Random, level: float) -> Chart:
    """A bar, line or pie chart of two to seven labels."""
    kind = rng.choices(("bar", "line", "pie"), (50, 27, 23))[0]
    most = 2 + round(5 * level)
    count = min(rng.choices((2, 3, 4, 5, 6, 7), (10, 24, 26, 20, 12, 8))[0], most)
    axis, labels = _random_labels(rng, count, kind)
    n_series = 2 if kind != "pie" and level > 0.3 and rng.random() < 0.35 else 1
    named = n_series > 1 or (kind != "pie" and level > 0.2 and rng.random() < 0.5)
    series = tuple(_distinct(rng, n_series, lambda: values.phrase(rng, 9))) if named else (BLANK_SERIES,)
    shown_axis = axis if kind != "pie" and level > 0.2 and rng.random() < 0.4 else BLANK_AXIS
    title = values.phrase(rng, 8 if level < 0.2 else 20)
    return Chart(kind, title, shown_axis, tuple(labels), series, _chart_values(rng, kind, count, n_series))


def _random_labels(rng: Random, count: int, kind: str) -> tuple[str, list[str]]:
    chance = rng.random()
    if chance < 0.35:
        axis = rng.choice(sorted(_LABELS))
        pool = _LABELS[axis]
        if len(pool) >= count:
            start = rng.randrange(len(pool) - count + 1)
            return axis, list(pool[start : start + count])
    if chance < 0.5:
        first = rng.randint(1990, 2035 - count)
        return "Year", [str(first + i) for i in range(count)]
    if chance < 0.6:
        return "City", _distinct(rng, count, lambda: values.city(rng))
    return values.heading(rng), _distinct(rng, count, lambda: values.phrase(rng, 9))


def _distinct(rng: Random, count: int, make: Callable[[], str]) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        text = make()
        if text.lower() not in (t.lower() for t in found):
            found.append(text)
    return found


def _chart_values(rng: Random, kind: str, count: int, n_series: int) -> tuple[tuple[str, ...], ...]:
    """Values of one spelling; the two of a label differ, and no slice of a pie is thin."""
    if kind == "pie" and rng.random() < 0.6:
        cuts = sorted(rng.sample(range(1, (100 - 5 * count)), count - 1))
        shares = [b - a + 5 for a, b in zip([0, *cuts], [*cuts, 100 - 5 * count], strict=True)]
        return tuple((f"{share}%",) for share in shares)
    spell = rng.choice(("{:.0f}", "{:.0f}", "{:.1f}", "{:.2f}", "{:,.0f}", "{:.0f}%", "{:.1f}%", "${:.0f}", "${:,.0f}"))
    top = 100.0 if "%" in spell else 10.0 ** rng.choice((1, 2, 2, 3, 3) if "," not in spell else (3, 4, 4, 5))
    low = 0.15 if kind == "pie" else 0.02
    rows = []
    for _ in range(count):
        row = [spell.format(rng.uniform(low, 1) * top)]
        while len(row) < n_series:
            text = spell.format(rng.uniform(low, 1) * top)
            if text not in row:
                row.append(text)
        rows.append(tuple(row))
    return tuple(rows)


def _number(text: str) -> float:
    return float("".join(c for c in text if c.isdigit() or c in ".-"))


def lay_chart(chart: Chart, rng: Random, font: str, size: float, ink: Ink) -> Sheet:
    """A sheet of the chart: the title on top, each value beside its bar, point or slice."""
    plain, bold = face(font, size), face(font, size * rng.choice((1.0, 1.0, 1.15)), bold=font != "Aileron" and rng.random() < 0.5)
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


def _legend(sheet: Sheet, chart: Chart, left: float, middle: float, y: float, plain: Face, ink: Ink, centred: bool) -> None:
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
            sheet.text(x, y - 0.6 * em, value, plain, ink.text, 0.5, ink.paper)
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
        for (xa, ya), (xb, yb) in zip(points, points[1:], strict=False):
            sheet.line(xa, ya, xb, yb, ink.series[j], line)
        for px, py in points:
            sheet.disc(px, py, 0.22 * em, ink.series[j])
    for i, row in enumerate(numbers):
        middle = (i + 0.5) * slot
        for j, number in enumerate(row):
            below = len(row) > 1 and number < max(row)
            sheet.text(middle, y(number) + (0.75 if below else -0.75) * em, chart.values[i][j], plain, ink.text, 0.5, ink.paper)
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


# --- forms ---

_FIELDS: dict[str, Callable[[Random], str]] = {
    "Name": values.person,
    "Full name": values.person,
    "Contact": values.person,
    "Customer": values.company,
    "Company": values.company,
    "Supplier": values.company,
    "City": values.city,
    "Country": values.city,
    "Date": values.date,
    "Due date": values.date,
    "Date of birth": values.date,
    "Order number": values.code,
    "Reference": values.code,
    "Customer ID": values.code,
    "Account": values.code,
    "Phone": values.phone,
    "Total": values.amount,
    "Amount": values.amount,
    "Tax": values.amount,
    "Quantity": values.integer,
    "Price": values.amount,
    "Status": values.flag,
    "Time": values.clock,
    "Weight": values.measure,
    "Department": values.short_word,
    "Item": values.phrase,
    "Rate": values.percent,
    "Year": values.year,
}
_TITLES = ("Order", "Receipt", "Registration", "Delivery note", "Application", "Record", "Work order", "Report", "Request")
VALUE_LONGEST = 20
_INVOICE = {"Invoice number": values.code, "Date": values.date, "Customer": values.company}


def random_form(rng: Random, level: float) -> Form:
    """One to ten fields; some of what is asked for is not on the page."""
    invoice = level > 0.4 and rng.random() < 0.25
    count = 1 + round(level) if level < 0.1 else rng.randint(1, 2 + round(6 * level))
    if level < 0.1:
        count = rng.randint(1, 2)
    fields: dict[str, str | None] = {}
    makers = dict(_INVOICE) if invoice else {}
    while len(makers) < max(count, 4 if invoice else 1):
        label, make = _random_field(rng)
        if invoice:
            label, make = values.phrase(rng), values.amount
        makers.setdefault(label, make)
    if invoice:
        makers.pop("Total", None)
        makers["Total"] = values.amount
    labels = list(makers)
    for label in labels:
        fields[values.snake_case(label)] = _value(rng, makers[label])
    title = rng.choice(("Invoice", "INVOICE", f"Invoice {values.company(rng)}")) if invoice else _form_title(rng, level)
    absent = [values.snake_case(_random_field(rng)[0]) for _ in range(3) if level > 0.15 and rng.random() < 0.17]
    listed = list(fields.items())
    for name in absent:
        if name not in fields and len(listed) < 10:
            fields[name] = None
            listed.insert(rng.randint(0, len(listed)), (name, None))
    return Form(title, tuple(listed))


def _random_field(rng: Random) -> tuple[str, Callable[[Random], str]]:
    if rng.random() < 0.6:
        label = rng.choice(tuple(_FIELDS))
        return label, _FIELDS[label]
    kind = values.column_kind(rng)
    return values.phrase(rng).capitalize(), values.CELLS[kind]


def _value(rng: Random, make: Callable[[Random], str]) -> str:
    text = make(rng)
    while len(text) > VALUE_LONGEST:
        text = make(rng)
    return text


def _form_title(rng: Random, level: float) -> str:
    if rng.random() > 0.75 * level:
        return ""
    return rng.choice(_TITLES) if rng.random() < 0.6 else values.phrase(rng, 20)


def _label(name: str) -> str:
    """The label a field is drawn with."""
    return name.replace("_", " ").capitalize()


def lay_form(form: Form, rng: Random, font: str, size: float, ink: Ink) -> Sheet:
    """A sheet of the form: lines 'Label: value' in one or two columns, boxes, or an invoice's list of amounts."""
    sheet = Sheet()
    shown = [(_label(name), value) for name, value in form.fields if value is not None]
    plain, bold = face(font, size), face(font, size, bold=font != "Aileron")
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
                sheet.text(x + 0.5 * size, y + 0.8 * size, label + mark, names, ink.rule if ink.rule[0] < 90 else ink.text)
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
        heading = face(font, size * title_size, bold=font != "Aileron")
        sheet.text(x0 + align * (x1 - x0), y0 - 1.2 * size, form.title, heading, ink.text, align)
    return sheet


RANDOM: dict[str, Callable[[Random, float], Table | Chart | Form]] = {
    "table": random_table,
    "chart": random_chart,
    "form": random_form,
}
LAYOUTS: dict[type, tuple[Callable[..., Sheet], str]] = {
    Table: (lay_table, "table"),
    Chart: (lay_chart, "chart"),
    Form: (lay_form, "form"),
}
