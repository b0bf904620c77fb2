"""Tests of OTSL: as docling-core parses and writes it, also with the text that models write around it."""

from __future__ import annotations

import json
import re

import pytest

from granite4v.errors import AnswerError
from granite4v.runtime.formats import Cell, Table, read, read_otsl, write, write_otsl
from tests.helpers.docling import docling_item
from tests.helpers.tables import PLAIN_TEXTS, SMALL, SMALL_OTSL, assert_error, random_table, shape

CELL = re.compile(r"<([ef]cel|[cr]hed|srow)>((?:(?!<[a-z/]).)*)")


def test_docling_reads_our_otsl_as_we_do() -> None:
    from docling_core.types.doc.utils import parse_otsl_table_content

    for seed in range(400):
        table = random_table(seed, PLAIN_TEXTS)
        text = write_otsl(table)
        theirs, ours = parse_otsl_table_content(text), read_otsl(text)[0]
        assert (theirs.num_rows, theirs.num_cols) == (ours.n_rows, ours.n_cols)
        assert shape(ours) == [
            (c.start_row_offset_idx, c.start_col_offset_idx, c.row_span, c.col_span, c.text) for c in theirs.table_cells
        ]
        assert [[cell.text for cell in row] for row in theirs.grid] == ours.texts()


def neighbours_span_both_ways(table: Table) -> bool:
    """Whether a cell of several rows and columns has another one below it, so <xcel> does not show where it ends."""
    grid = table.grid()
    return any(
        cell.rowspan > 1 and cell.colspan > 1 and below.rowspan > 1 and below.colspan > 1
        for cell in table.cells
        for i in [cell.row + cell.rowspan]
        if i < table.n_rows
        for below in grid[i][cell.col : cell.col + cell.colspan]
    )


def test_we_read_doclings_otsl_as_it_was_meant() -> None:
    read_again = 0
    for seed in range(400):
        table = random_table(seed, PLAIN_TEXTS)
        item, document = docling_item(table)
        text = item.export_to_otsl(document, add_cell_location=False)
        if not neighbours_span_both_ways(table):
            assert shape(read_otsl(text)[0]) == shape(table), text
            read_again += 1
    assert read_again > 300


@pytest.mark.parametrize(
    "text",
    [
        SMALL_OTSL,
        SMALL_OTSL.removeprefix("<otsl>").removesuffix("</otsl>"),
        f"[{SMALL_OTSL}]",
        f"  [\n {SMALL_OTSL} ,\n]\n",
        f"```\n{SMALL_OTSL}\n```",
        f"```otsl\n{SMALL_OTSL}```",
        json.dumps([SMALL_OTSL]),
        SMALL_OTSL.replace("<nl>", "<nl>\n").replace("<ched>", "<ched> "),
        SMALL_OTSL.replace("<nl></otsl>", "</otsl>"),
        CELL.sub(r"<\1>\2</\1>", SMALL_OTSL),
        CELL.sub(r"<\1> \2 </\1>\n", SMALL_OTSL),
        re.sub(r"<((?:[elux]cel|nl))>", r"<\1/>", SMALL_OTSL),
        SMALL_OTSL.replace("<nl>", "<nl />"),
    ],
)
def test_otsl_in_the_wrappings_that_models_use(text: str) -> None:
    assert read("tables_otsl", text) == [SMALL]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("<fcel>p < 0.05<fcel>b<nl>", ["p < 0.05", "b"]),
        ("<fcel>a<b>c</b><fcel>x<nl>", ["a<b>c</b>", "x"]),
        ("<fcel><fcel>b<nl>", ["", "b"]),
        ("<fcel> <fcel>b<nl>", ["", "b"]),
    ],
)
def test_otsl_texts_that_docling_loses(rows: str, expected: list[str]) -> None:
    """docling-core takes any '<...>' for a tag, and the tag that follows an empty <fcel> for its text."""
    assert read_otsl(f"<otsl>{rows}</otsl>")[0].texts() == [expected]


@pytest.mark.parametrize(
    ("rows", "spans"),
    [
        ("<fcel>A<lcel><nl><ucel><xcel><nl>", [(2, 2)]),
        ("<fcel>A<xcel><nl><xcel><xcel><nl>", [(2, 2)]),
        ("<fcel>A<lcel><nl><ucel><lcel><nl>", [(2, 2)]),
        ("<fcel>A<lcel><nl><ucel><ucel><nl>", [(2, 2)]),
        ("<fcel>C<fcel>A<xcel><nl><fcel>B<xcel><xcel><nl>", [(1, 1), (2, 2), (1, 1)]),
        ("<fcel>A<lcel><nl><fcel>B<lcel><nl>", [(1, 2), (1, 2)]),
    ],
)
def test_otsl_spans(rows: str, spans: list[tuple[int, int]]) -> None:
    assert [(cell.rowspan, cell.colspan) for cell in read_otsl(rows)[0].cells] == spans


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no OTSL tag in ''; expected '<otsl>'."),
        ("No table.", "'No table.' at character 0 is not in a cell; expected an OTSL tag before it."),
        ("<otsl></otsl>",
         "</otsl> at character 6 ends a table without rows; expected a cell before it."),
        ("<otsl><fcel>a<fcel>b<nl><fcel>c<nl></otsl>",
         "row 2, at character 24, has 1 columns; expected 2 as in the rows above."),
        ("<otsl><lcel><nl></otsl>",
         "<lcel> in row 1, column 1, at character 6, does not continue a cell; expected a cell on its left."),
        ("<otsl><fcel>a<ucel><nl></otsl>",
         "<ucel> in row 1, column 2, at character 13, does not continue a cell; expected a cell above it."),
        ("<otsl><xcel><nl></otsl>",
         "<xcel> in row 1, column 1, at character 6, does not continue a cell; expected one cell above and "
         "on its left."),
        ("<otsl><fcel>a<lcel><nl><ucel><fcel>b<nl></otsl>",
         "<ucel> in row 2, column 1, at character 23, continues the cell of row 1, column 1, but not over all its 2 "
         "columns; expected a rectangle."),
        ("<otsl><fcel>a</ched><nl></otsl>",
         "</ched> at character 13 closes nothing; expected '<ched>' before it."),
        ("<otsl><fcel>a</fcel></fcel><nl></otsl>",
         "</fcel> at character 20 closes nothing; expected '<fcel>' before it."),
        ("<otsl><fcel>a</fcel>b<nl></otsl>",
         "'b' at character 20 is not in a cell; expected an OTSL tag before it."),
        ("<otsl><fcel/>b<nl></otsl>",
         "'b' at character 13 is not in a cell; expected an OTSL tag before it."),
        ("<otsl><ecel>a<nl></otsl>",
         "'a' at character 12 follows <ecel>, an empty cell; expected a tag."),
        ("<otsl><nl></otsl>", "<nl> at character 6 ends row 1, which has no cells; expected one."),
        ("<otsl><fcel>a<nl>b</otsl>",
         "'b' at character 17 is not in a cell; expected an OTSL tag before it."),
        ("<otsl><fcel>a<otsl>",
         "<otsl> at character 13 is inside a table; expected '</otsl>' before it."),
        ("</otsl>", "</otsl> at character 0 does not end a table; expected '<otsl>' before it."),
        ("<otsl><fcel>a<nl><fcel>b",
         "the answer ends at character 24 in row 2 of table 1; expected '</otsl>'. It was probably cut."),
        ("<otsl>" + "<fcel>" * 3 + "<nl><ucel><fcel><ucel><nl><ucel><ucel><lcel><nl></otsl>",
         "<ucel> in row 3, column 2, at character 56, continues the cell of row 2, column 2, but not over all its 1 "
         "columns; expected a rectangle."),
    ],
)  # fmt: skip
def test_an_invalid_answer_gives_what_was_found_where_and_what_was_expected(text: str, message: str) -> None:
    assert_error("tables_otsl", text, message)


@pytest.mark.parametrize("tag", ["<nl>", "</fcel>", "<ecel/>", "<nl />"])
def test_a_text_with_a_tag_cannot_be_written(tag: str) -> None:
    message = f"^the text of row 1, column 1 contains '{tag}', which OTSL cannot hold\\.$"
    with pytest.raises(AnswerError, match=message):
        write(Table(1, 1, 0, (Cell(0, 0, "a" + tag),)), "otsl")


def test_doclings_granite_vision_stage_reads_closed_tags_as_we_do() -> None:
    from docling.utils.otsl import parse_otsl_output

    for seed in range(200):
        text = CELL.sub(r"<\1>\2</\1>" if seed % 2 else r"<\1>\2", write_otsl(random_table(seed, PLAIN_TEXTS)))
        _, cells, n_rows, n_cols = parse_otsl_output(text)
        [table] = read_otsl(text)
        assert (n_rows, n_cols) == (table.n_rows, table.n_cols)
        found = {(c.start_row_offset_idx, c.start_col_offset_idx): c.text for c in cells}
        assert found == {(c.row, c.col): c.text for c in table.cells}
