"""Draws random truths: the contents of synthetic tables, charts and forms, independent of their look.

`level` ranges from 0 (one short row, two labels, one field) to 1 (the full range).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from scripts.nano import values
from scripts.nano.truth import Cell, Chart, Form, Table

BLANK_AXIS, BLANK_SERIES = "Label", "Value"  # names of axis and series when the image does not show any
VALUE_LONGEST = 20  # characters of a form's value
MOST_FIELDS = 10
ENDING = 4  # the last letters of a field's name, which differ for all names of a form


# --- tables ---


def random_table(rng: Random, level: float) -> Table:
    """Draws a table of up to eight rows below at most two header rows, and up to five columns."""
    n_cols = min(rng.choices((1, 2, 3, 4, 5), (6, 24, 32, 26, 12))[0], 2 + round(3 * level))
    n_body = min(rng.choices(range(1, 9), (8, 20, 24, 18, 12, 8, 5, 5))[0], 1 + round(7 * level))
    n_head = 0 if level < 0.1 else rng.choices((0, 1, 2), (10, 82, 8))[0]
    spans = rng.random() < 0.24 * level and n_cols > 1
    row_heads = level > 0.2 and n_cols > 1 and n_head > 0 and rng.random() < 0.12
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
            empty = n_body > 1 and n_cols > 1 and not (row_heads and col == 0) and rng.random() < 0.015 * level
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
    """Draws header rows without repeated headings; if `grouped`, two rows, of which the upper one spans columns."""
    names = _distinct(rng, 2 * n_cols, lambda: values.heading(rng))
    if row_heads and not grouped and rng.random() < 0.5:
        names[0] = ""
    if not grouped:
        return [Cell(i, j, names[i * n_cols + j], header=True) for i in range(n_head) for j in range(n_cols)]
    top, bottom, col = [], [], 0
    while col < n_cols:
        alone = col == 0 and (row_heads or rng.random() < 0.7)
        width = 1 if alone else min(rng.choice((2, 2, 3)), n_cols - col)
        if width == 1:
            top.append(Cell(0, col, names[col], rowspan=2, header=True))
        else:
            top.append(Cell(0, col, names[col], colspan=width, header=True))
            bottom += [Cell(1, k, names[n_cols + k], header=True) for k in range(col, col + width)]
        col += width
    return top + bottom


def _row_spans(rng: Random, n_body: int) -> list[tuple[int, int]]:
    """Draws the first row and height of each row label; at least one is higher than a row."""
    spans, row = [], 0
    while row < n_body:
        height = min(rng.choice((1, 2, 2, 3)) if row else rng.choice((2, 2, 3)), n_body - row)
        spans.append((row, height))
        row += height
    return spans


def _without_blank_lines(rng: Random, cells: list[Cell], n_head: int, n_cols: int) -> list[Cell]:
    """Returns the cells with a word added wherever a complete body column or row was empty."""
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
    """Draws a bar, line or pie chart of two to seven labels."""
    kind = rng.choices(("bar", "line", "pie"), (50, 27, 23))[0]
    most = 2 + round(5 * level)
    count = min(rng.choices((2, 3, 4, 5, 6, 7), (10, 24, 26, 20, 12, 8))[0], most)
    axis, labels = _random_labels(rng, count, round(5 + 4 * level))
    n_series = 2 if kind != "pie" and level > 0.3 and rng.random() < 0.35 else 1
    named = n_series > 1 or (kind != "pie" and level > 0.2 and rng.random() < 0.5)
    series = tuple(_distinct(rng, n_series, lambda: values.phrase(rng, 9))) if named else (BLANK_SERIES,)
    shown_axis = axis if named else BLANK_AXIS
    title = values.phrase(rng, 8 if level < 0.2 else 20)
    return Chart(kind, title, shown_axis, tuple(labels), series, _chart_values(rng, kind, count, n_series))


def _random_labels(rng: Random, count: int, longest: int) -> tuple[str, list[str]]:
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
    return values.heading(rng), _distinct(rng, count, lambda: values.phrase(rng, longest))


def _distinct(rng: Random, count: int, make: Callable[[], str]) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        text = make()
        if text.lower() not in (t.lower() for t in found):
            found.append(text)
    return found


def _chart_values(rng: Random, kind: str, count: int, n_series: int) -> tuple[tuple[str, ...], ...]:
    """Draws values of one number format. The two values of a label differ clearly, and no slice of a pie is thin."""
    if kind == "pie" and rng.random() < 0.6:
        cuts = sorted(rng.sample(range(1, (100 - 5 * count)), count - 1))
        shares = [b - a + 5 for a, b in zip([0, *cuts], [*cuts, 100 - 5 * count], strict=True)]
        return tuple((f"{share}%",) for share in shares)
    spellings = ("{:.0f}", "{:.0f}", "{:.1f}", "{:.2f}", "{:,.0f}", "${:.0f}", "${:,.0f}", "{:.0f}%", "{:.1f}%")
    spell = rng.choice(spellings[:-2] if kind == "pie" else spellings)
    top = 100.0 if "%" in spell else 10.0 ** rng.choice((1, 2, 2, 3, 3) if "," not in spell else (3, 4, 4, 5))
    low = 0.15 if kind == "pie" else 0.06
    signed = kind != "pie" and "$" not in spell and rng.random() < 0.1
    rows = []
    for _ in range(count):
        row = [rng.uniform(low, 1)]
        while len(row) < n_series:
            other = rng.uniform(low, 1)
            if abs(other - row[0]) > 0.1:
                row.append(other)
        signs = [-1 if signed and rng.random() < 0.3 else 1 for _ in row]
        rows.append(tuple(spell.format(sign * value * top) for sign, value in zip(signs, row, strict=True)))
    return tuple(rows)


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
_TITLES = ("Order", "Receipt", "Registration", "Delivery note", "Application", "Record", "Work order", "Report")
_INVOICE: dict[str, Callable[[Random], str]] = {
    "invoice_number": values.code,
    "date": values.date,
    "customer": values.company,
}


def random_form(rng: Random, level: float) -> Form:
    """Draws a form of one to ten fields, some of which are not on the page."""
    invoice = level > 0.4 and rng.random() < 0.25
    makers = dict(_INVOICE) if invoice else {}
    count = rng.randint(1, 2 + round(6 * level))
    while len(makers) < max(count, len(_INVOICE) + 1 if invoice else 0):
        label, make = (values.phrase(rng), values.amount) if invoice else _random_field(rng, level)
        if values.snake_case(label)[-ENDING:] not in {name[-ENDING:] for name in [*makers, "total"]}:
            makers[values.snake_case(label)] = make
    if invoice:
        makers.pop("total", None)
        makers["total"] = values.amount
    fields: list[tuple[str, str | None]] = [(name, _value(rng, make, level)) for name, make in makers.items()]
    for _ in range(3):
        name = values.snake_case(_random_field(rng, level)[0])
        if (
            name[-ENDING:] not in {other[-ENDING:] for other in makers}
            and len(fields) < MOST_FIELDS
            and rng.random() < 0.17 * level
        ):
            makers[name] = values.word
            fields.insert(rng.randint(0, len(fields)), (name, None))
    if invoice:
        title = rng.choice(("Invoice", "INVOICE", f"Invoice {values.company(rng)}"))
    elif rng.random() < 0.75 * level:
        title = rng.choice(_TITLES) if rng.random() < 0.6 else values.phrase(rng, 20)
    else:
        title = ""
    return Form(title, tuple(fields))


def _random_field(rng: Random, level: float) -> tuple[str, Callable[[Random], str]]:
    """Draws a label and the function that draws its values."""
    if rng.random() < 0.6 * level:
        return rng.choice(tuple(_FIELDS.items()))
    longest = round(6 + 8 * level)
    return values.phrase(rng, longest), values.CELLS[values.column_kind(rng)]


def _value(rng: Random, make: Callable[[Random], str], level: float) -> str:
    longest = round(8 + (VALUE_LONGEST - 8) * level)
    for _ in range(50):
        text = make(rng)
        if len(text) <= longest:
            return text
    return values.short_word(rng)[:longest]
