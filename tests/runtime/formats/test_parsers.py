"""Tables and fields: read back as written, as docling-core and pandas read them, and saved when an answer was cut."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import re
import tracemalloc
from typing import Any

import pytest

from granite4v.errors import AnswerError, Granite4vError
from granite4v.runtime.formats import (
    FORMATS,
    TASKS,
    Cell,
    Salvaged,
    Table,
    read,
    read_csv,
    read_fields,
    read_html,
    read_otsl,
    read_tables_json,
    salvage,
    write,
    write_csv,
    write_html,
    write_markdown,
    write_otsl,
    write_tables_json,
)
from granite4v.runtime.formats.json_prefix import read_prefix
from granite4v.runtime.formats.json_values import MAX_NESTING

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
FORM = {"chart2csv": "csv", "tables_html": "html", "tables_json": "json", "tables_otsl": "otsl"}
LINES = ["two\nlines", "three\n\nlines"]


def random_table(seed: int, texts: list[str], headers: bool = True, empty: bool = True, most: int = 7) -> Table:
    """Header rows first, no cell across their border, a text in each header row; body row headers and section rows."""
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
    """Whether each header row has a text (an empty header row is a row of empty cells)."""
    return all(any(cell.text for cell in row) for row in table.grid()[: table.n_header_rows])


def shape(table: Table) -> list[tuple[int, int, int, int, str]]:
    return [(c.row, c.col, c.rowspan, c.colspan, c.text) for c in table.cells]


def first_rows(table: Table, n_rows: int) -> list[list[str]]:
    return table.texts()[:n_rows]


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


def test_a_small_table_in_every_form() -> None:
    assert write(SMALL, "otsl") == SMALL_OTSL
    assert write(SMALL, "html") == SMALL_HTML
    assert write(SMALL, "csv") == "Item,Price,Price\nTotal,Total,Total\nTea,,3 < 4"
    assert write(SMALL, "markdown") == (
        "| Item | Price | Price |\n| --- | --- | --- |\n| Total | Total | Total |\n| Tea |  | 3 < 4 |"
    )
    found = json.loads(write(SMALL, "json"))
    assert found["dimensions"] == {"rows": 2, "columns": 3, "header_rows": 1, "total_rows": 3}
    assert found["cells"][1] == {
        "row": 1, "col": 2, "colspan": 2, "rowspan": 1, "type": "header", "header_level": 1, "content": "Price",
    }  # fmt: skip


# --- written and read again ---


@pytest.mark.parametrize("seed", range(300))
def test_tables_come_back_as_written(seed: int) -> None:
    table = random_table(seed, ODD_TEXTS)
    assert read_tables_json(write_tables_json(table)) == [table]
    assert read_html(write_html(table)) == [table]
    if carried_by_otsl(table):
        assert read_otsl(write_otsl(table)) == [table]
    with_lines = random_table(seed, [*ODD_TEXTS, *LINES])
    assert read_html(write_html(with_lines)) == [with_lines]
    assert read_tables_json(write_tables_json(with_lines)) == [with_lines]
    if carried_by_otsl(with_lines):
        assert read_otsl(write_otsl(with_lines)) == [with_lines]


@pytest.mark.parametrize("seed", range(200))
def test_csv_comes_back_as_written(seed: int) -> None:
    rng = random.Random(seed)
    texts = [*ODD_TEXTS, *LINES, " x ", "", " ", "\t", "a\rb", "a\r\nb", '"', ","]
    n_rows, n_cols = rng.randint(1, 6), rng.randint(1, 4)
    rows = [[rng.choice(texts) for _ in range(n_cols)] for _ in range(n_rows)]
    cells = [Cell(i, j, text, 1, 1, not i, int(not i)) for i, row in enumerate(rows) for j, text in enumerate(row)]
    table = Table(n_rows, n_cols, 1, tuple(cells))
    assert read_csv(write_csv(table)) == table
    assert list(csv.reader(io.StringIO(write_csv(table), newline=""))) == rows


@pytest.mark.parametrize("form", ["otsl", "html", "json"])
@pytest.mark.parametrize("n_tables", [0, 1, 3])
def test_several_tables_come_back_as_written(form: str, n_tables: int) -> None:
    tables = [table for table in (random_table(seed, ODD_TEXTS) for seed in range(50)) if carried_by_otsl(table)]
    if form == "html" and not n_tables:
        return  # nothing at all
    assert read(f"<tables_{form}>", write(tables[:n_tables], form)) == tables[:n_tables]


def test_json_carries_what_the_others_derive() -> None:
    table = Table(2, 1, 2, (Cell(0, 0, " x\t", header=True, header_level=2), Cell(1, 0, "", header_level=7)))
    assert read_tables_json(write_tables_json(table)) == [table]


# --- the independent judges ---


@pytest.mark.parametrize("seed", range(400))
def test_docling_reads_our_otsl_as_we_do(seed: int) -> None:
    from docling_core.types.doc.utils import parse_otsl_table_content

    table = random_table(seed, PLAIN_TEXTS)
    text = write_otsl(table)
    theirs, ours = parse_otsl_table_content(text), read_otsl(text)[0]
    assert (theirs.num_rows, theirs.num_cols) == (ours.n_rows, ours.n_cols)
    assert shape(ours) == [
        (c.start_row_offset_idx, c.start_col_offset_idx, c.row_span, c.col_span, c.text) for c in theirs.table_cells
    ]
    assert [[cell.text for cell in row] for row in theirs.grid] == ours.texts()


def docling_item(table: Table) -> tuple[Any, Any]:
    from docling_core.types.doc.document import DoclingDocument, TableCell, TableData

    cells = [
        TableCell(
            text=c.text, row_span=c.rowspan, col_span=c.colspan, start_row_offset_idx=c.row,
            end_row_offset_idx=c.row + c.rowspan, start_col_offset_idx=c.col, end_col_offset_idx=c.col + c.colspan,
            column_header=c.row < table.n_header_rows,
            row_header=c.header and c.row >= table.n_header_rows,
        )
        for c in table.cells
    ]  # fmt: skip
    document = DoclingDocument(name="page")
    data = TableData(num_rows=table.n_rows, num_cols=table.n_cols, table_cells=cells)
    return document.add_table(data=data), document


def neighbours_span_both_ways(table: Table) -> bool:
    """Whether <xcel> alone leaves open where a cell of several rows and columns ends: another one begins below it."""
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


@pytest.mark.parametrize("seed", range(50))
def test_markdown_holds_what_doclings_does(seed: int) -> None:
    table = random_table(seed, ["12.50", "a, b", "Grüße", "two\nlines"])
    starts = {cell.row for cell in table.cells}
    if not starts.issuperset(range(table.n_header_rows)):
        return  # docling counts no header row in which no cell starts
    item, document = docling_item(table)
    theirs = [re.split(r"\s*\|\s*", line)[1:-1] for line in item.export_to_markdown(document).splitlines()]
    ours = [re.split(r"\s*\|\s*", line)[1:-1] for line in write_markdown(table).splitlines()]
    assert ours[0] == theirs[0]
    assert ours[2:] == theirs[2:]


@pytest.mark.parametrize("seed", range(200))
def test_pandas_reads_our_html_as_we_do(seed: int) -> None:
    pandas = pytest.importorskip("pandas")
    table = random_table(seed, ODD_TEXTS, headers=False, empty=False)
    frame = pandas.read_html(
        io.StringIO(write_html(table)), keep_default_na=False, converters=dict.fromkeys(range(table.n_cols), str)
    )[0]
    assert frame.to_numpy().tolist() == read_html(write_html(table))[0].texts() == table.texts()


def test_pandas_finds_our_header_rows() -> None:
    pandas = pytest.importorskip("pandas")
    table = read_otsl("<ched>Year<ched>Sold<lcel><nl><ucel><ched>In<ched>Out<nl><fcel>2001<fcel>x<fcel>y<nl>")[0]
    assert table.n_header_rows == 2
    frame = pandas.read_html(io.StringIO(write_html(table)))[0]
    assert list(frame.columns) == [("Year", "Year"), ("Sold", "In"), ("Sold", "Out")]
    assert list(pandas.read_csv(io.StringIO(write_csv(table)), header=[0, 1]).columns) == list(frame.columns)


# --- forms as models write them ---


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
    ],
)
def test_otsl_with_what_may_stand_around_it(text: str) -> None:
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
    ("cells", "expected"),
    [
        ("<td>a<br>b</td>", "a\nb"),
        ("<td>a<br/>b</td>", "a\nb"),
        ("<td><p>a</p><p>b</p></td>", "a\nb"),
        ("<td><div>a <b>bold</b>\n  x</div></td>", "a bold x"),
        ("<td>&eacute; &#x3c; &amp;lt;</td>", "é < &lt;"),
        ("<td>p < 5</td>", "p < 5"),
        ("<td><ul><li>a<li>b</ul>", "a\nb"),
        ("<td>x<table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>y</td>", "x\n1 2\n3\ny"),
        ("<td/>", ""),
        ("<TD ALIGN=left>a</TD>", "a"),
        ("<td>a<!-- no --></td>", "a"),
        ("<td>é\u00a0x </td>", "é\u00a0x"),
        ("<td title='>'>a</td>", "a"),
        ('<td title="<td>" align = left x=y/z>a</td>', "a"),
        ("<td>&#" + "9" * 5000 + ";&#xD800;&#x110000;&#0;</td>", "\ufffd" * 4),
        ("<td>a<script>if (x < y) { z('</td>') }</script>b</td>", "aif (x < y) { z('</td>') }b"),
        ("<td>a<5 b</>c</td>", "a<5 bc"),
        ("<td>" + "<p>" * 50 + "a" + " <p> " * 50 + "b</td>", "a\nb"),
    ],
)
def test_html_cells(cells: str, expected: str) -> None:
    assert read_html(f"<table><tr>{cells}</tr></table>")[0].texts() == [[expected]]


@pytest.mark.parametrize(
    ("table", "n_header_rows"),
    [
        ("<tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr>", 1),
        ("<tbody><tr><th>a</th><th>b</th></tr><tr><th>1</th><td>2</td></tr></tbody>", 1),
        ("<thead><tr><td>a</td><td>b</td></tr></thead><tr><td>1</td><td>2</td></tr>", 1),
        ("<thead></thead><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr>", 0),
        ("<tr><td>a</td><td>b</td></tr><tr><td>1</td><td>2</td></tr>", 0),
        ("<caption>Of <b>things</b></caption><colgroup><col></colgroup><tr><td>a<td>b<tr><td>1<td>2", 0),
        ("<tr><td>a</td><td>b</td></tr><tfoot><tr><td>1</td><td>2</td></tr></tfoot>", 0),
    ],
)
def test_html_header_rows(table: str, n_header_rows: int) -> None:
    found = read_html(f"<table>{table}</table>")[0]
    assert (found.n_header_rows, found.texts()) == (n_header_rows, [["a", "b"], ["1", "2"]])


@pytest.mark.parametrize(
    "text",
    [
        f"Here it is: {SMALL_HTML}",
        f"```html\n{SMALL_HTML}\n```",
        f"[{SMALL_HTML}]",
        json.dumps([SMALL_HTML]),
        f'["{SMALL_HTML}"]',  # quotation marks inside are not escaped
        f"<html><body>\n{SMALL_HTML}\n</body></html>",
    ],
)
def test_html_with_what_may_stand_around_it(text: str) -> None:
    assert read("tables_html", text) == [SMALL]


def test_json_as_models_may_write_it() -> None:
    text = write_tables_json(SMALL)
    assert read("tables_json", f"```json\n{text}\n```") == [SMALL]
    assert read("tables_json", f"Here:\n```json\n{text}```") == [SMALL]
    assert read("tables_json", f"[{text}, {text}]") == [SMALL, SMALL]
    assert read("tables_json", text.replace('"rows": 2', '"rows": 3')) == [SMALL]
    short = '{"dimensions": {"columns": 2, "total_rows": 1}, "cells": [{"row": 1, "col": 2, "content": 12.50}, '
    short += '{"row": 1, "col": 1, "content": null}]}'
    assert read_tables_json(short)[0].texts() == [["", "12.50"]]


def test_csv_as_models_may_write_it() -> None:
    expected = [["a", "b"], ["1", "2, 3"]]
    for text in (
        'a,b\n1,"2, 3"',
        'a,b\r\n1,"2, 3"\r\n',
        '```csv\na,b\n\n1,"2, 3"\n```',
        'Data:\n```csv\na,b\n1,"2, 3"\n```',
    ):
        assert read("<chart2csv>", text).texts() == expected


def test_code_prose_and_fields() -> None:
    assert read("chart2code", "```python\nprint(1)\n```") == read("chart2code", "print(1)\n") == "print(1)"
    assert read("chart2summary", " Sales rose.\n") == "Sales rose."
    assert read("kvp", '```json\n{"a": null, "b": [1.5]}\n```') == {"a": None, "b": [1.5]}
    assert read_fields("[]") == []


# --- answers that do not fit ---


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("tables_otsl", "", "no OTSL tag in ''; expected '<otsl>'."),
        ("tables_otsl", "No table.", "'No table.' at character 0 is not in a cell; expected an OTSL tag before it."),
        ("tables_otsl", "<otsl></otsl>",
         "</otsl> at character 6 ends a table without rows; expected a cell before it."),
        ("tables_otsl", "<otsl><fcel>a<fcel>b<nl><fcel>c<nl></otsl>",
         "row 2, at character 24, has 1 columns; expected 2 as in the rows above."),
        ("tables_otsl", "<otsl><lcel><nl></otsl>",
         "<lcel> in row 1, column 1, at character 6, does not continue a cell; expected a cell on its left."),
        ("tables_otsl", "<otsl><fcel>a<ucel><nl></otsl>",
         "<ucel> in row 1, column 2, at character 13, does not continue a cell; expected a cell above it."),
        ("tables_otsl", "<otsl><xcel><nl></otsl>",
         "<xcel> in row 1, column 1, at character 6, does not continue a cell; expected one cell above and "
         "on its left."),
        ("tables_otsl", "<otsl><fcel>a<lcel><nl><ucel><fcel>b<nl></otsl>",
         "<ucel> in row 2, column 1, at character 23, continues the cell of row 1, column 1, but not over all its 2 "
         "columns; expected a rectangle."),
        ("tables_otsl", "<otsl><ecel>a<nl></otsl>",
         "'a' at character 12 follows <ecel>, an empty cell; expected a tag."),
        ("tables_otsl", "<otsl><nl></otsl>", "<nl> at character 6 ends row 1, which has no cells; expected one."),
        ("tables_otsl", "<otsl><fcel>a<nl>b</otsl>",
         "'b' at character 17 is not in a cell; expected an OTSL tag before it."),
        ("tables_otsl", "<otsl><fcel>a<otsl>",
         "<otsl> at character 13 is inside a table; expected '</otsl>' before it."),
        ("tables_otsl", "</otsl>", "</otsl> at character 0 does not end a table; expected '<otsl>' before it."),
        ("tables_otsl", "<otsl><fcel>a<nl><fcel>b",
         "the answer ends at character 24 in row 2 of table 1; expected '</otsl>'. It was probably cut."),
        ("tables_html", "No table.", "no table in 'No table.'; expected '<table>'."),
        ("tables_html", "<table></table>", "</table> at character 7 ends a table without rows; expected '<tr>'."),
        ("tables_html", "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>",
         "row 2, which ends at character 50, covers 1 columns; expected 2."),
        ("tables_html", "<table><tr></tr></table>",
         "row 1, which ends at character 11, covers 0 columns; expected at least one."),
        ("tables_html", '<table><tr><td rowspan="0">a</td></tr></table>',
         "rowspan at character 11 is '0'; expected a whole number from 1 to 65534."),
        ("tables_html", '<table><tr><td colspan="1000000">a</td></tr></table>',
         "colspan at character 11 is '1000000'; expected a whole number from 1 to 1000."),
        ("tables_html", '<table><tr><td>a</td><td rowspan="2">b</td><tr><td colspan="2">c</td></tr></table>',
         "row 2, which ends at character 69, has a cell over columns 1 to 2 that overlaps a cell from a row above; "
         "expected one cell for each slot."),
        ("tables_html", '<table><tr><td rowspan="3">a</td></tr></table>',
         "the cell at row 1, column 1 has rowspan 3, but the table ends with row 1; expected at most 1."),
        ("tables_html", "<table><tr>x<td>a</td></tr></table>",
         "'x' at character 11 is in a table but not in a cell; expected '<td>' or '<th>' before it."),
        ("tables_html", "<table>\n<tr><td>a</td></tr>\n<table>",
         "<table> at character 28 is inside a table; expected '</table>' before it."),
        ("tables_html", "<table><tr><td>a</td></tr><thead><tr><th>b</th></tr></thead></table>",
         "row 2, which ends at character 47, is in a <thead> below other rows; expected the header first."),
        ("tables_html", "<table><tr><td>a</td></tr><tr><td>b",
         "the answer ends at character 35 in row 2 of table 1; expected '</table>'. It was probably cut."),
        ("tables_json", '{"cells": [',
         "invalid JSON at character 11, before '': Expecting value; expected one JSON value."),
        ("tables_json", "```json\n{,}\n```",
         "invalid JSON at character 9, before ',}\\n```': Expecting property name enclosed in double quotes; expected "
         "one JSON value."),
        ("tables_json", "3", "table 1 is 3; expected an object with 'dimensions' and 'cells'."),
        ("tables_json", '{"cells": []}', "'dimensions' of table 1 is None; expected an object."),
        ("tables_json", '{"dimensions": {}, "cells": [{"row": 0, "col": 1, "content": ""}]}',
         "'row' of cell 1 of table 1 is 0; expected an integer of 1 or more."),
        ("tables_json", '{"dimensions": {}, "cells": [{"row": 1, "col": true, "content": ""}]}',
         "'col' of cell 1 of table 1 is True; expected an integer of 1 or more."),
        ("tables_json", '{"dimensions": {}, "cells": [{"row": 1, "col": 1, "type": "x"}]}',
         "'type' of cell 1 of table 1 is 'x'; expected 'header' or 'data'."),
        ("tables_json", '{"dimensions": {}, "cells": [{"row": 1, "col": 1, "type": []}]}',
         "'type' of cell 1 of table 1 is []; expected 'header' or 'data'."),
        ("tables_json", '{"dimensions": {}, "cells": [{"row": 1, "col": 1, "content": []}]}',
         "'content' of cell 1 of table 1 is []; expected text."),
        ("tables_json", '{"dimensions": {}, "cells": [7]}', "cell 1 of table 1 is 7; expected an object."),
        ("tables_json", '{"dimensions": {"columns": 2, "total_rows": 1}, "cells": [{"row": 1, "col": 1}]}',
         "table 1: row 1, column 2 is not covered by any cell; expected one cell for each slot."),
        ("tables_json", '{"dimensions": {"columns": 1}, "cells": [{"row": 1, "col": 1}, {"row": 1, "col": 1}]}',
         "table 1: row 1, column 1 is covered twice, by the cells that start at row 1, column 1 and at row 1, column "
         "1; expected one cell for each slot."),
        ("tables_json", '{"dimensions": {"columns": 1, "total_rows": 1}, "cells": [{"row": 2, "col": 1}]}',
         "table 1: the cell at row 2, column 1 spans 1 rows and 1 columns; expected it to lie within 1 rows and 1 "
         "columns."),
        ("tables_json", '{"dimensions": {"columns": 2000000}, "cells": [{"row": 1, "col": 1, "colspan": 2000000}]}',
         "table 1: a table of 1 rows and 2000000 columns; expected at most 1000000 slots."),
        ("tables_json", '{"dimensions": {"columns": 1, "rows": 5}, "cells": [{"row": 1, "col": 1}]}',
         "'rows' of 'dimensions' of table 1 is 5; expected 1 (those below the header) or 1 (all)."),
        ("tables_json", '{"dimensions": {"columns": 1, "header_rows": 2}, "cells": [{"row": 1, "col": 1}]}',
         "table 1: a table of 1 rows has 2 header rows; expected 0 to 1."),
        ("chart2csv", " \n", "no row in ' \\n'; expected CSV with a header row."),
        ("chart2csv", "```csv\n \n\n```", "no row in '```csv\\n \\n\\n```'; expected CSV with a header row."),
        ("chart2csv", "a,b\n1,2\n3", "row 3, on line 3, has 1 fields; expected 2 as in the header row."),
        ("chart2csv", 'a,b\n1,"2"x\n', "row 2, on line 2, is not CSV: ',' expected after '\"'; expected quotes around "
         "the whole field."),
        ("chart2csv", 'a,b\n1,"2\n', "row 2, on line 2, is not CSV: unexpected end of data; expected quotes around "
         "the whole field."),
        ("chart2code", "", "the answer is empty; expected text."),
        ("kvp", '"x"', "the answer is 'x'; expected a JSON object."),
        ("kvp", '{"a": NaN}', "JSON that cannot be read: it holds NaN, which is not JSON; expected ordinary numbers."),
        ("kvp", '{"a": 1e400}',
         "JSON that cannot be read: it holds the number 1e400, which is larger than a double can be; expected ordinary "
         "numbers."),
        ("kvp", '{"a": ' + "1" * 10_000 + "}",
         "JSON that cannot be read: it holds an integer of 10,000 digits, more than 1,000; expected ordinary numbers."),
        ("kvp", "[" * 65 + "]" * 65, "JSON nested deeper than 64 levels; expected a few."),
        ("kvp", '{"a": ' * 600 + "1" + "}" * 600, "JSON nested deeper than 64 levels; expected a few."),
        ("kvp", "[" * 100_000 + "]" * 100_000, "JSON nested deeper than 64 levels; expected a few."),
        ("tables_json", "[" * 600 + "]" * 600, "JSON nested deeper than 64 levels; expected a few."),
        ("tables_json", '{"dimensions": {}, "cells": [{"row": 1, "col": 1, "rowspan": 20000000000, "content": ""}]}',
         "'rowspan' of cell 1 of table 1 is 20000000000; expected at most 1,000,000,000."),
        ("tables_json", json.dumps([{"dimensions": {"columns": 500_000}, "cells": [
            {"row": 1, "col": 1, "colspan": 500_000, "content": ""}]}] * 3),
         "3 tables of 1,500,000 slots together; expected at most 1,000,000."),
        ("tables_otsl", "<otsl>" + "<fcel>" * 3 + "<nl><ucel><fcel><ucel><nl><ucel><ucel><lcel><nl></otsl>",
         "<ucel> in row 3, column 2, at character 56, continues the cell of row 2, column 2, but not over all its 1 "
         "columns; expected a rectangle."),
        ("kvp", '{"a": 1} and so on',
         "invalid JSON at character 9, before 'and so on': Extra data; expected one JSON value."),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_says_what_where_and_what_was_expected(task: str, text: str, message: str) -> None:
    with pytest.raises(AnswerError) as caught:
        read(task, text)
    assert str(caught.value) == message
    assert isinstance(caught.value, Granite4vError)


def test_a_form_that_cannot_carry_a_text_says_so() -> None:
    with pytest.raises(AnswerError, match=r"^the text of row 1, column 1 contains '<nl>', which OTSL cannot hold\.$"):
        write(Table(1, 1, 0, (Cell(0, 0, "a<nl>"),)), "otsl")


def test_unknown_tasks_and_forms_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"unknown task 'x'; known: {', '.join(TASKS)}."):
        read("x", "")
    with pytest.raises(ValueError, match=f"unknown format 'x'; known: {', '.join(FORMATS)}."):
        write(SMALL, "x")


# --- answers that were cut ---


def assert_prefix(found: Table, truth: Table) -> None:
    assert found.texts() == first_rows(truth, found.n_rows)
    assert found.n_cols == truth.n_cols
    assert found.n_header_rows == min(truth.n_header_rows, found.n_rows)
    assert [cell.header for cell in found.cells] == [cell.header for cell in truth.cells if cell.row < found.n_rows]


@pytest.mark.parametrize("form", ["otsl", "html", "json", "otsl strings", "html strings"])
@pytest.mark.parametrize("seed", range(8))
def test_every_beginning_of_tables_gives_their_first_rows(form: str, seed: int) -> None:
    form, _, strings = form.partition(" ")
    candidates = (random_table(1000 * seed + k, ODD_TEXTS, most=5) for k in range(50))
    tables = [table for table in candidates if carried_by_otsl(table)][: 1 + seed % 3]
    text = (
        json.dumps([write(one, form) for one in tables]) if strings else write(tables if seed % 2 else tables[0], form)
    )
    tables = read(f"tables_{form}", text)
    n_before = 0
    for end in range(len(text) + 1):
        found = salvage(f"tables_{form}", text[:end])
        if found is None:
            assert not n_before
            continue
        for one, truth in zip(found.value, tables, strict=False):
            assert_prefix(one, truth)
        assert all(one.n_rows == truth.n_rows for one, truth in list(zip(found.value, tables, strict=False))[:-1])
        n_rows = sum(one.n_rows for one in found.value)
        assert n_rows >= n_before
        n_before = n_rows
        if form != "html":  # in HTML nothing tells that another table was to follow
            assert found.cut == (end < len(text))
        assert read(f"tables_{form}", write(found.value, form)) == found.value
    assert found is not None
    assert (found.value, found.cut) == (tables, False)


def test_rows_are_kept_as_soon_as_they_are_whole() -> None:
    for form, last in (("otsl", "<nl>"), ("html", "</tr>"), ("json", "}")):
        text = write(SMALL, form)
        for i, n_rows in enumerate([1, 2, 3] if form != "json" else []):
            ends = [found.end() for found in re.finditer(re.escape(last), text)]
            kept, before = salvage(f"tables_{form}", text[: ends[i]]), salvage(f"tables_{form}", text[: ends[i] - 1])
            assert kept is not None
            assert kept.value[0].n_rows == n_rows
            assert (before.value[0].n_rows if before else 0) == n_rows - 1
    text = write_tables_json(SMALL)
    kept = salvage("tables_json", text[: text.index("Tea")])
    assert kept is not None
    assert first_rows(kept.value[0], 9) == first_rows(SMALL, 2)


def test_json_cells_before_their_dimensions_are_kept() -> None:
    found = json.loads(write_tables_json(SMALL))
    text = json.dumps({"cells": found["cells"], "dimensions": found["dimensions"]})
    kept = salvage("tables_json", text[: text.index("dimensions")])
    assert kept is not None
    assert kept.value[0].texts() == SMALL.texts()


@pytest.mark.parametrize("seed", range(20))
def test_every_beginning_of_csv_gives_its_first_rows(seed: int) -> None:
    rng = random.Random(seed)
    texts = [*ODD_TEXTS, *LINES, ""]
    n_cols = rng.randint(1, 4)
    rows = [[rng.choice(texts) for _ in range(n_cols)] for _ in range(rng.randint(1, 6))]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    text = f"```csv\n{out.getvalue()}```" if seed % 2 else out.getvalue()
    for end in range(len(text) + 1):
        found = salvage("chart2csv", text[:end])
        if found is not None:
            assert found.value.texts() == rows[: found.value.n_rows]
            assert found.cut == (not seed % 2 or end < len(text))
            assert read_csv(write_csv(found.value)) == found.value
    assert found is not None
    assert found.value.n_rows == len(rows)


def is_prefix(found: Any, truth: Any) -> bool:
    if isinstance(truth, dict) and isinstance(found, dict):
        pairs = list(zip(found.items(), truth.items(), strict=False))
        same = all(a == b for a, b in pairs[:-1]) and len(found) <= len(truth)
        return same and all(a[0] == b[0] and is_prefix(a[1], b[1]) for a, b in pairs[-1:])
    if isinstance(truth, list) and isinstance(found, list):
        last = list(zip(found, truth, strict=False))[-1:]
        same = found[:-1] == truth[: max(0, len(found) - 1)] and len(found) <= len(truth)
        return same and all(is_prefix(a, b) for a, b in last)
    return type(found) is type(truth) and bool(found == truth)


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind >= 6:
        items = [random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        return items if kind == 6 else {f'k{k} \\ "': item for k, item in enumerate(items)}
    return [
        None,
        True,
        False,
        rng.randint(-100, 100),
        rng.uniform(-1e9, 1e9),
        rng.choice([*ODD_TEXTS, *LINES, "", "😀"]),
    ][kind]


@pytest.mark.parametrize("seed", range(60))
def test_every_beginning_of_fields_gives_the_first_fields(seed: int) -> None:
    rng = random.Random(seed)
    value = {f"field {k}": random_value(rng, 3) for k in range(rng.randint(1, 5))}
    text = json.dumps(value, ensure_ascii=seed % 2 == 0, indent=2 if seed % 3 == 0 else None)
    for end in range(len(text) + 1):
        found = salvage("kvp", text[:end])
        if found is not None:
            assert is_prefix(found.value, value), text[:end]
            assert found.value
            assert found.cut == (end < len(text))
            assert json.loads(json.dumps(found.value)) == found.value
    assert found is not None
    assert found.value == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 12', None),
        ('{"a": 12,', {"a": 12}),
        ('{"a": tru', None),
        ('{"a": "x", "b": "y', {"a": "x"}),
        ('{"a": "x", "b": [1, {"c": 2, "d": {', {"a": "x", "b": [1, {"c": 2}]}),
        ('{"a": "x", "b": [{', {"a": "x"}),
        ('```json\n{"a": "x", "b"', {"a": "x"}),
        ('{"a": 1, b: 2}', {"a": 1}),  # wrong in the middle
        ("{", None),
        ("", None),
        ("sorry", None),
        ("null", None),
        ('"x"', None),
    ],
)
def test_fields_are_kept_to_the_last_whole_one(text: str, expected: Any) -> None:
    found = salvage("kvp", text)
    assert (found.value if found else None) == expected
    assert found is None or found.cut


def test_nesting_without_end_ends_nothing() -> None:
    assert salvage("kvp", "[" * 200_000) is None
    assert salvage("kvp", '{"a": [1, 2], "b": ' + "[" * 200_000) == Salvaged({"a": [1, 2]}, True)
    found = read_prefix("[1," * 50_000)
    assert len(found.unclosed) == MAX_NESTING and found.end == 3 * MAX_NESTING - 1


@pytest.mark.parametrize("levels", [MAX_NESTING - 1, MAX_NESTING])
def test_values_up_to_the_nesting_limit_are_read(levels: int) -> None:
    text = '{"a": ' * levels + "1" + "}" * levels
    assert read("kvp", text) == json.loads(text)
    assert salvage("kvp", text) == Salvaged(json.loads(text), False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": "\\ud800", "\\udc00b": ["\\ude00\\ud83d"]}', {"a": "\ufffd", "\ufffdb": ["\ufffd\ufffd"]}),
        ('{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}', {"a": "\U0001f600", "b": "\\ud800"}),
        ('{"a": "\ud800"}', {"a": "\ufffd"}),
        ('{"a": "\\u0000", "a": 2}', {"a": 2}),
        ('{"a": ' + "9" * 1000 + ', "b": 1e308, "c": -0.0}', {"a": 10**1000 - 1, "b": 1e308, "c": -0.0}),
    ],
)
def test_what_other_programs_cannot_read_does_not_leave_the_parser(text: str, expected: Any) -> None:
    assert read("kvp", text) == expected
    found = salvage("kvp", text)
    assert found is not None
    assert found.value == expected
    json.dumps(found.value, allow_nan=False, ensure_ascii=False).encode()


def test_a_number_that_is_too_large_ends_what_is_kept() -> None:
    assert salvage("kvp", '{"a": 1, "b": 1e400, "c": 2}') == Salvaged({"a": 1}, True)
    assert salvage("kvp", '{"a": 1, "b": ' + "1" * 1001 + ', "c": 2}') == Salvaged({"a": 1}, True)


# --- long answers ---


def test_spans_of_long_tables_are_read() -> None:
    wide = read_otsl("<otsl>" + "<fcel>" * 8000 + "<nl>" + "<ucel>" * 8000 + "<nl></otsl>")[0]
    assert (wide.n_rows, wide.n_cols, len(wide.cells)) == (2, 8000, 8000)
    assert {cell.rowspan for cell in wide.cells} == {2}
    tall = read_html("<table><tr><td rowspan=12000>x<td>y" + "<tr><td>z" * 11_999 + "</table>")[0]
    assert (tall.n_rows, tall.n_cols, tall.cells[0].rowspan) == (12_000, 2, 12_000)
    begun = '{"dimensions": {"columns": 1}, "cells": [{"row": 1, "col": 1, "content": "a", "rowspan": 900000}'
    found = salvage("tables_json", begun + ', {"row": 900001, "col": 1, "content": "b"}' * 1500)
    assert found is not None
    assert [(table.n_rows, len(table.cells)) for table in found.value] == [(900_000, 1)]


def test_column_spans_take_no_memory_before_they_are_refused() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(AnswerError, match="expected at most 1000000 slots"):
            read_html("<table><tr>" + "<td colspan=1000>" * 6000 + "</tr></table>")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["csv", "markdown"])
def test_texts_are_not_repeated_out_of_bounds(form: str) -> None:
    table = Table(1000, 1000, 0, (Cell(0, 0, "x" * 60, 1000, 1000),))
    with pytest.raises(AnswerError, match=r"^a table that has 60,000,000 characters when cells repeat their text in "):
        write(table, form)
    assert read_html(write_html(table)) == [table]


def test_markup_that_never_ends_is_let_go() -> None:
    for mark in ("<!--", "<a ", "<![x", "<!", "<?", "</x ", "<a b='", "&#"):
        with pytest.raises(AnswerError, match="expected '</table>'"):
            read_html("<table><tr><td>" + mark * 30_000)
    for mark in ("<!-- x -->", "<!>", "<!DOCTYPE x [ ]>", "<![CDATA[ x >", "<?x ?>", "</ >", "<!-->", "<!ELEMENT br>"):
        assert read_html(f"<table><tr><td>a{mark}b</td></tr></table>")[0].texts() == [["ab"]]


def test_html_written_holds_what_html_can() -> None:
    lxml = pytest.importorskip("lxml.html")
    table = Table(1, 3, 0, (Cell(0, 0, "a\0b\x1bc"), Cell(0, 1, "&#0; < é"), Cell(0, 2, "\ufffe日本")))
    texts = ["a\ufffdb\ufffdc", "&#0; < é", "\ufffd日本"]
    assert [cell.text for cell in lxml.fromstring(write_html(table)).iter("td")] == texts
    assert read_html(write_html(table))[0].texts() == [texts]
    assert write_markdown(table).splitlines()[0] == "| a\ufffdb\ufffdc | &#0; < é | \ufffd日本 |"


@pytest.mark.parametrize(
    ("task", "text", "rows"),
    [
        ("tables_otsl", "<otsl><fcel>a<fcel>b<nl><fcel>c<nl><fcel>d<fcel>e<nl></otsl>", [["a", "b"]]),
        ("tables_html", "<table><tr><td>a</td></tr><tr><td>b</td><td>c</td></tr></table>", [["a"]]),
        ("tables_json", '{"dimensions": {"columns": 1}, "cells": [{"row": 1, "col": 1, "content": "a"}, 7]}', [["a"]]),
    ],
)
def test_an_answer_that_is_wrong_in_the_middle_is_kept_up_to_there(task: str, text: str, rows: list[list[str]]) -> None:
    found = salvage(task, text)
    assert found is not None
    assert found.cut
    assert [table.texts() for table in found.value] == [rows]


@pytest.mark.parametrize("seed", range(60))
def test_damaged_answers_are_read_or_refused_and_what_is_saved_can_be_written(seed: int) -> None:
    rng = random.Random(seed)
    table = random_table(seed, ODD_TEXTS, most=4)
    texts = {"tables_otsl": write_otsl(table), "tables_html": write_html(table), "chart2csv": write_csv(table)}
    texts["tables_json"] = texts["kvp"] = write_tables_json(table)
    pieces = [
        "<",
        ">",
        '"',
        "[",
        "]",
        "{",
        "}",
        ",",
        "\n",
        "```",
        "\\",
        "\0",
        "<nl>",
        "<xcel>",
        "</tr>",
        "<table>",
        "-1",
        "9e9",
        "null",
    ]
    for task, text in texts.items():
        for _ in range(20):
            damaged = text
            for _ in range(rng.randint(1, 4)):
                at, n_lost = rng.randint(0, len(damaged)), rng.randint(0, 12)
                damaged = damaged[:at] + rng.choice(["", *pieces]) + damaged[at + n_lost :]
            with contextlib.suppress(AnswerError):
                read(task, damaged)
            found = salvage(task, damaged)
            if found is not None and task != "kvp":
                assert read(task, write(found.value, FORM[task])) is not None


def test_code_and_prose_that_were_cut() -> None:
    found = salvage("chart2code", "```python\nx = 1\ny = ")
    assert found is not None
    assert (found.value, found.cut) == ("x = 1", True)
    assert salvage("chart2code", "x = ") is None
    found = salvage("chart2summary", "Sales ro")
    assert found is not None
    assert (found.value, found.cut) == ("Sales ro", True)
    assert salvage("chart2summary", " ") is None
    for task in TASKS:
        assert salvage(task, "") is None
