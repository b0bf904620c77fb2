"""Synthetic documents: a seed gives the same image, content is true, glyphs are where they should be, nothing is off
the page."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from scripts.nano import documents, drawing, values
from scripts.nano.documents import KINDS, Document, draw, draw_document
from scripts.nano.truth import Cell, Chart, Form, Table

LEGAL = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,-%$:/()#&+'")
TABLE = Table(2, 2, 1, (*(Cell(0, j, t, header=True) for j, t in enumerate(("Item", "Price"))),
                        *(Cell(1, j, t) for j, t in enumerate(("Paper", "4.50")))))  # fmt: skip


def some(kind: str, count: int = 40, level: float = 1.0) -> list[Document]:
    return [draw_document(seed, kind, level) for seed in range(count)]


def texts(truth: Table | Chart | Form) -> list[str]:
    """Returns every text that has to be on the page."""
    if isinstance(truth, Table):
        return [cell.text for cell in truth.cells]
    if isinstance(truth, Chart):
        return [truth.title, *truth.labels, *(value for row in truth.values for value in row)]
    return [truth.title, *(value for _, value in truth.fields if value)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_document_again_and_another_seed_another(kind: str) -> None:
    first, again, other = draw_document(7, kind), draw_document(7, kind), draw_document(8, kind)

    assert first.picture.tobytes() == again.picture.tobytes()
    assert first.truth == again.truth and first.font == again.font
    assert np.array_equal(first.glyphs.x, again.glyphs.x)
    assert first.truth != other.truth


def test_cells_cover_the_grid_exactly_once() -> None:
    for table in (document.truth for document in some("table", 120)):
        assert isinstance(table, Table)
        covered = [
            (i, j)
            for c in table.cells
            for i in range(c.row, c.row + c.rowspan)
            for j in range(c.col, c.col + c.colspan)
        ]
        assert sorted(covered) == [(i, j) for i in range(table.n_rows) for j in range(table.n_cols)]
        assert [(c.row, c.col) for c in table.cells] == sorted((c.row, c.col) for c in table.cells)
        assert all(c.row + c.rowspan <= table.n_header_rows for c in table.cells if c.row < table.n_header_rows)


def test_some_tables_have_spans_and_some_fields_are_absent() -> None:
    tables = [document.truth for document in some("table", 60)]
    forms = [document.truth for document in some("form", 60)]

    assert any(c.colspan > 1 for t in tables if isinstance(t, Table) for c in t.cells)
    assert any(c.rowspan > 1 for t in tables if isinstance(t, Table) for c in t.cells)
    assert any(value is None for f in forms if isinstance(f, Form) for _, value in f.fields)


def test_charts_have_a_value_for_every_label_and_series_and_forms_no_field_twice() -> None:
    for chart in (document.truth for document in some("chart")):
        assert isinstance(chart, Chart)
        assert len(chart.values) == len(chart.labels) == len(set(chart.labels))
        assert all(len(row) == len(chart.series) for row in chart.values)
    for form in (document.truth for document in some("form")):
        assert isinstance(form, Form)
        assert 1 <= len(form.fields) <= 10
        assert len(dict(form.fields)) == len(form.fields)


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_of_the_truth_is_drawn_and_no_glyph_leaves_the_page(kind: str) -> None:
    for document in some(kind):
        drawn = "".join(map(chr, document.glyphs.code))
        for text in texts(document.truth):
            assert text.replace(" ", "") in drawn
            assert set(text) <= LEGAL
        width, height = document.picture.size
        assert document.glyphs.x.min() > 2 and document.glyphs.x.max() < width - 2
        assert document.glyphs.y.min() > 2 and document.glyphs.y.max() < height - 2


@pytest.mark.parametrize("kind", KINDS)
def test_glyph_centres_land_on_ink(kind: str) -> None:
    """At letters with ink in the middle the image is darker than the paper, also on rotated pages."""
    for document in some(kind, 25):
        grey = np.asarray(document.picture.convert("L"), np.float32)
        paper, darkest = np.median(grey), grey.min()
        solid = [i for i, code in enumerate(document.glyphs.code) if chr(code) in "lIixHsS8+-"]
        for i in solid:
            x, y = round(float(document.glyphs.x[i])), round(float(document.glyphs.y[i]))
            around = grey[max(0, y - 4) : y + 5, max(0, x - 1) : x + 2]
            assert around.min() < paper - 0.15 * (paper - darkest), (document.seed, chr(document.glyphs.code[i]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_sees_letters_of_readable_size(kind: str) -> None:
    """A capital letter is about 0.7 of a font size of at least 15 px, so the glyphs of a word are some pixels apart."""
    for document in some(kind):
        _, scale = drawing.best_grid(*document.picture.size)
        assert 0.3 < scale < 1.8
        steps = np.diff(document.glyphs.x)[np.abs(np.diff(document.glyphs.y)) < 3] * scale
        assert 4.0 < np.median(steps[(steps > 0) & (steps < 24)]) < 16.0


def test_the_lowest_level_is_one_clean_line() -> None:
    for document in some("table", 20, level=0.0):
        assert isinstance(document.truth, Table)
        assert document.truth.n_rows == 1 and document.truth.n_cols <= 2
    for document in some("form", 20, level=0.0):
        assert isinstance(document.truth, Form)
        assert len(document.truth.fields) <= 2


def test_the_held_out_font_is_none_of_the_training_fonts() -> None:
    assert drawing.AILERON in documents.fonts()
    assert drawing.HELD_OUT not in documents.fonts()
    try:
        held_out = documents.held_out_font()
    except LookupError as error:
        pytest.skip(str(error))
    assert draw_document(1, "table", font=held_out).font == held_out


def test_a_given_content_is_drawn_and_one_that_no_page_holds_is_refused() -> None:
    assert draw(TABLE, seed=3, level=0.0).truth == TABLE
    endless = Table(1, 1, 0, (Cell(0, 0, "word " * 60),))
    with pytest.raises(ValueError, match="too large"):
        draw(endless)


def test_grids_are_chosen_as_the_models_preprocessing_chooses_them() -> None:
    """Sizes worked out by hand: the largest part of the image is kept, then the waste is minimized."""
    assert drawing.best_grid(160, 160) == ((1, 1), 1.0)
    assert drawing.best_grid(250, 125) == ((2, 1), 1.28)
    assert drawing.best_grid(320, 640) == ((2, 4), 1.0)
    assert drawing.best_grid(3840, 480)[0] == (8, 1)


def test_cell_texts_are_short_and_of_their_kind() -> None:
    rng = Random(5)
    for kind in values.CELLS:
        for _ in range(50):
            text = values.cell_text(rng, kind)
            assert 0 < len(text) <= values.CELL_LONGEST and text == text.strip() and set(text) <= LEGAL
    assert values.snake_case("Invoice number") == "invoice_number"
