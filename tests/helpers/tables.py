"""Tables for tests: random ones, a small one in every format, and texts that formats could trip over."""

from __future__ import annotations

import random

import pytest

from granite4v.errors import AnswerError, Granite4vError
from granite4v.runtime.formats import Cell, Table, read

PLAIN_TEXTS = [
    "12.50",
    "-3",
    "Grüße",
    "a, b",
    'say "hi"',
    "x|y",
    "[1]",
    "{a}",
    "日本語",
    "50 %",
    "`code`",
    "\\frac",
    "a & b",
]
ODD_TEXTS = [
    *PLAIN_TEXTS,
    "p < 0.05",
    "a<b>c",
    "<td>",
    "&amp;",
    "&lt;",
    "</otsl",
    "<loc_12>",
    "é\u00a0x",
    "'",
    "x > y",
    "#",
]
LINES = ["two\nlines", "three\n\nlines"]
SMALL = Table(
    3,
    3,
    1,
    (
        Cell(0, 0, "Item", header=True, header_level=1),
        Cell(0, 1, "Price", colspan=2, header=True, header_level=1),
        Cell(1, 0, "Total", colspan=3, header=True),
        Cell(2, 0, "Tea", header=True),
        Cell(2, 1, ""),
        Cell(2, 2, "3 < 4"),
    ),
)
SMALL_OTSL = "<otsl><ched>Item<ched>Price<lcel><nl><srow>Total<lcel><lcel><nl><rhed>Tea<ecel><fcel>3 < 4<nl></otsl>"
SMALL_HTML = (
    '<table><thead><tr><th>Item</th><th colspan="2">Price</th></tr></thead><tbody><tr><th colspan="3">Total</th></tr>'
    "<tr><th>Tea</th><td></td><td>3 &lt; 4</td></tr></tbody></table>"
)


def random_table(seed: int, texts: list[str], headers: bool = True, empty: bool = True, most: int = 7) -> Table:
    """Returns a random table: header rows come first, no cell crosses their border, and each header row has a text.
    Body rows may have row headers and section rows."""
    rng = random.Random(seed)
    n_rows, n_cols = rng.randint(1, most), rng.randint(1, most - 1)
    n_header_rows = rng.randint(0, min(2, n_rows)) if headers else 0
    covered: set[tuple[int, int]] = set()
    cells: list[Cell] = []
    for i in range(n_rows):
        last_row = n_header_rows if i < n_header_rows else n_rows
        for j in range(n_cols):
            if (i, j) in covered:
                continue
            height, width = 1, 1
            if rng.random() < 0.3:
                height, width = rng.randint(1, last_row - i), rng.randint(1, n_cols - j)
                while any((i, j + w) in covered for w in range(width)):
                    width -= 1
            covered |= {(i + h, j + w) for h in range(height) for w in range(width)}
            in_head = i < n_header_rows
            is_empty = empty and rng.random() < 0.2 and not (in_head and j == 0)
            text = "" if is_empty else " ".join(rng.choices(texts, k=rng.randint(1, 2)))
            header = in_head or (headers and not is_empty and (j == 0 or width == n_cols) and rng.random() < 0.5)
            cells.append(Cell(i, j, text, height, width, header, i + 1 if in_head else 0))
    return Table(n_rows, n_cols, n_header_rows, tuple(cells))


def carried_by_otsl(table: Table) -> bool:
    """Whether OTSL can represent the table: each header row needs a text, because an empty header row is a row of empty
    cells."""
    return all(any(cell.text for cell in row) for row in table.grid()[: table.n_header_rows])


def shape(table: Table) -> list[tuple[int, int, int, int, str]]:
    return [(c.row, c.col, c.rowspan, c.colspan, c.text) for c in table.cells]


def first_rows(table: Table, n_rows: int) -> list[list[str]]:
    return table.texts()[:n_rows]


def assert_error(task: str, text: str, message: str) -> None:
    """Checks that reading the answer fails with exactly this message."""
    with pytest.raises(AnswerError) as caught:
        read(task, text)
    assert str(caught.value) == message
    assert isinstance(caught.value, Granite4vError)
