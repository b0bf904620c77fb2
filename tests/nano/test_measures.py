"""How nano's answers are scored, checked by hand on small truths."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.nano import formats
from scripts.nano.documents import Document, draw_document
from scripts.nano.measures import Measured, measure, whole_part
from scripts.nano.truth import Cell, Chart, Form, Table

TABLE = Table(
    3,
    2,
    1,
    (
        Cell(0, 0, "Name", header=True),
        Cell(0, 1, "Price", header=True),
        Cell(1, 0, "salt"),
        Cell(1, 1, "2.50"),
        Cell(2, 0, "oil"),
        Cell(2, 1, ""),
    ),
)
CHART = Chart("bar", "Sales", "Month", ("Jan", "Feb"), ("North", "South"), (("1", "2"), ("3", "4")))
FORM = Form("Invoice", (("number", "A-7"), ("date", None), ("total", "9.00")))


def document(truth: Table | Chart | Form) -> Document:
    return replace(draw_document(1, "form"), truth=truth)


@pytest.mark.parametrize("task", ["<tables_otsl>", "<tables_html>", "<tables_json>"])
def test_a_cell_is_right_by_text_and_place(task: str) -> None:
    answer = formats.answer_for(task, TABLE)
    assert measure(document(TABLE), task, answer) == Measured(6, 6, True, 1.0)
    wrong = measure(document(TABLE), task, answer.replace("salt", "sait"))
    assert (wrong.right, wrong.n, wrong.exact) == (5, 6, False)
    assert wrong.teds is not None and 0.8 < wrong.teds < 1
    swapped = replace(TABLE, cells=tuple(replace(cell, row=(0, 2, 1)[cell.row]) for cell in TABLE.cells))
    swapped = replace(swapped, cells=tuple(sorted(swapped.cells, key=lambda cell: (cell.row, cell.col))))
    assert measure(document(TABLE), task, formats.answer_for(task, swapped)).right == 2


def test_cells_that_are_not_there_are_wrong_ones() -> None:
    row = (Cell(3, 0, "x"), Cell(3, 1, "y"))
    longer = replace(TABLE, n_rows=4, cells=TABLE.cells + row)
    found = measure(document(TABLE), "<tables_html>", formats.html(longer))
    assert (found.right, found.n, found.exact) == (6, 8, False)


def test_an_answer_that_does_not_parse_has_nothing_right() -> None:
    for text in ("", "<otsl><fcel>Name", "I see no table."):
        assert measure(document(TABLE), "<tables_otsl>", text) == Measured(0, 6, False, 0.0)
    assert measure(document(FORM), "kvp", '{"number": "A-7"') == Measured(0, 3, False)


def test_a_value_of_a_chart_is_right_beside_its_label_and_series() -> None:
    assert measure(document(CHART), "<chart2csv>", formats.chart_csv(CHART)) == Measured(4, 4, True)
    wrong = measure(document(CHART), "<chart2csv>", "Month,North,South\nJan,1,2\nFed,3,4\nMar,5,6")
    assert wrong == Measured(2, 6, False)


def test_a_field_that_is_not_on_the_page_is_null() -> None:
    assert measure(document(FORM), "kvp", formats.form_json(FORM)) == Measured(3, 3, True)
    assert measure(document(FORM), "kvp", '{"number": "A-7", "date": "x", "total": "9.0"}') == Measured(1, 3, False)
    assert measure(document(FORM), "kvp", '{"number": "A-7", "total": "9.00"}') == Measured(2, 3, False)


@pytest.mark.parametrize("task", ["tables_otsl", "tables_html", "tables_json"])
def test_of_a_cut_answer_whole_rows_are_measured(task: str) -> None:
    answer = formats.answer_for(f"<{task}>", TABLE)
    cut = answer[: answer.index("oil") + 2]
    found = measure(document(TABLE), f"<{task}>", whole_part(task, cut))
    assert (found.right, found.n, found.exact) == (4, 6, False)
    assert whole_part(task, answer[:8]) == ""


def test_of_a_cut_answer_whole_fields_are_measured() -> None:
    cut = formats.form_json(FORM)[:-3]
    assert measure(document(FORM), "kvp", whole_part("kvp", cut)) == Measured(2, 3, False)
    assert (
        measure(document(CHART), "<chart2csv>", whole_part("chart2csv", "Month,North,South\nJan,1,2\nFeb,3")).right == 2
    )
