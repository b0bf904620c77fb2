"""Ground truths of documents for tests of nano's output formats: one of each kind with every feature, and many random
tables."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from scripts.nano import corpus
from scripts.nano.truth import Cell, Chart, Form, Table

N_SAMPLES = 300

TABLE = Table(
    n_rows=4,
    n_cols=3,
    n_header_rows=2,
    cells=(
        Cell(0, 0, "", 2, 1, header=True),
        Cell(0, 1, "Price & tax", 1, 2, header=True),
        Cell(1, 1, "Net", header=True),
        Cell(1, 2, "", header=True),
        Cell(2, 0, "A <b>", header=True),
        Cell(2, 1, "12.00", 2, 2),
        Cell(3, 0, ""),
    ),
)
BARS = Chart("bar", "Sales", "Year", ("2019", "2020"), ("Net", "Tax"), (("1,200", "3"), ("-4.50", "30%")))
PIE = Chart("pie", "Votes", "City", ("Oslo", "Lima"), ("Share",), (("40%",), ("60%",)))
FORM = Form("Invoice", (("invoice_number", 'A-1 "b"'), ("due_date", None), ("total", "é 3")))


def tables() -> Iterator[Table]:
    rng = Random(7)
    yield TABLE  # the only one with a cell that spans both rows and columns
    for _ in range(N_SAMPLES):
        yield corpus.random_table(rng)
