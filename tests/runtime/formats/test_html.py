"""Tests of HTML tables: parsed as by pandas and browsers, also with the text that models write around them."""

from __future__ import annotations

import io
import json
import tracemalloc

import pytest

from granite4v.errors import AnswerError
from granite4v.runtime.formats import Cell, Table, read, read_html, read_otsl, write_csv, write_html, write_markdown
from tests.helpers.tables import ODD_TEXTS, SMALL, SMALL_HTML, assert_error, random_table


def test_pandas_reads_our_html_as_we_do() -> None:
    pandas = pytest.importorskip("pandas")
    for seed in range(200):
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
def test_html_in_the_wrappings_that_models_use(text: str) -> None:
    assert read("tables_html", text) == [SMALL]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("No table.", "no table in 'No table.'; expected '<table>'."),
        ("<table></table>", "</table> at character 7 ends a table without rows; expected '<tr>'."),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>",
         "row 2, which ends at character 50, covers 1 columns; expected 2."),
        ("<table><tr></tr></table>",
         "row 1, which ends at character 11, covers 0 columns; expected at least one."),
        ('<table><tr><td rowspan="0">a</td></tr></table>',
         "rowspan at character 11 is '0'; expected an integer from 1 to 65534."),
        ('<table><tr><td colspan="1000000">a</td></tr></table>',
         "colspan at character 11 is '1000000'; expected an integer from 1 to 1000."),
        ('<table><tr><td>a</td><td rowspan="2">b</td><tr><td colspan="2">c</td></tr></table>',
         "row 2, which ends at character 69, has a cell over columns 1 to 2 that overlaps a cell from a row above; "
         "expected one cell for each slot."),
        ('<table><tr><td rowspan="3">a</td></tr></table>',
         "the cell at row 1, column 1 has rowspan 3, but the table ends with row 1; expected at most 1."),
        ("<table><tr>x<td>a</td></tr></table>",
         "'x' at character 11 is in a table but not in a cell; expected '<td>' or '<th>' before it."),
        ("<table>\n<tr><td>a</td></tr>\n<table>",
         "<table> at character 28 is inside a table; expected '</table>' before it."),
        ("<table><tr><td>a</td></tr><thead><tr><th>b</th></tr></thead></table>",
         "row 2, which ends at character 47, is in a <thead> below other rows; expected the header first."),
        ("<table><tr><td>a</td></tr><tr><td>b",
         "the answer ends at character 35 in row 2 of table 1; expected '</table>'. It was probably cut."),
    ],
)  # fmt: skip
def test_an_invalid_answer_gives_what_was_found_where_and_what_was_expected(text: str, message: str) -> None:
    assert_error("tables_html", text, message)


def test_column_spans_take_no_memory_before_they_are_refused() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(AnswerError, match="expected at most 1000000 slots"):
            read_html("<table><tr>" + "<td colspan=1000>" * 6000 + "</tr></table>")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_unclosed_markup_is_ignored() -> None:
    for mark in ("<!--", "<a ", "<![x", "<!", "<?", "</x ", "<a b='", "&#"):
        with pytest.raises(AnswerError, match="expected '</table>'"):
            read_html("<table><tr><td>" + mark * 30_000)
    for mark in ("<!-- x -->", "<!>", "<!DOCTYPE x [ ]>", "<![CDATA[ x >", "<?x ?>", "</ >", "<!-->", "<!ELEMENT br>"):
        assert read_html(f"<table><tr><td>a{mark}b</td></tr></table>")[0].texts() == [["ab"]]


def test_characters_that_html_cannot_represent_are_replaced() -> None:
    lxml = pytest.importorskip("lxml.html")
    table = Table(1, 3, 0, (Cell(0, 0, "a\0b\x1bc"), Cell(0, 1, "&#0; < é"), Cell(0, 2, "\ufffe日本")))
    texts = ["a\ufffdb\ufffdc", "&#0; < é", "\ufffd日本"]
    assert [cell.text for cell in lxml.fromstring(write_html(table)).iter("td")] == texts
    assert read_html(write_html(table))[0].texts() == [texts]
    assert write_markdown(table).splitlines()[0] == "| a\ufffdb\ufffdc | \\&#0; < é | \ufffd日本 |"
