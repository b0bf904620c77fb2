"""Tests of the automaton of HTML tables: with answers that lxml reads as rectangles, and with cases by hand."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import pytest

from granite4v.errors import AnswerError
from granite4v.runtime.formats import read_html
from granite4v.runtime.grammar.automaton import advance, start
from tests.helpers.constrained import KINDS, allows, ended, grammar_of

HTML = grammar_of("tables_html")


def slots_of(table: Any) -> tuple[Counter[tuple[int, int]], int, int]:
    """Returns how often each slot is covered under HTML's table model, and the numbers of rows and columns."""
    covered: Counter[tuple[int, int]] = Counter()
    rows = table.findall(".//tr")
    for i, row in enumerate(rows):
        j = 0
        for cell in row:
            while covered[i, j]:
                j += 1
            for down, right in itertools.product(
                range(int(cell.get("rowspan", 1))), range(int(cell.get("colspan", 1)))
            ):
                covered[i + down, j + right] += 1
    covered += Counter()
    return covered, len(rows), 1 + max(j for _, j in covered)


@pytest.mark.parametrize("kind", KINDS)
def test_html_is_a_rectangle_to_lxml(kind: str) -> None:
    import lxml.html

    n_spans = 0
    for text in ended(kind, HTML, range(60), max_tokens=400):
        found = [lxml.html.fromstring(part) for part in re.findall(r"<table>.*?</table>", text, flags=re.DOTALL)]
        for table, other in zip(read_html(text), found, strict=True):
            covered, n_rows, n_cols = slots_of(other)
            assert covered == Counter(itertools.product(range(n_rows), range(n_cols)))
            assert (table.n_rows, table.n_cols) == (n_rows, n_cols)
            texts = [" ".join(cell.text_content().split()) for cell in other.iter("td", "th")]
            assert texts == [" ".join(cell.text.split()) for cell in table.cells]
            n_spans += any(cell.rowspan > 1 or cell.colspan > 1 for cell in table.cells)
    assert n_spans


@pytest.mark.parametrize("kind", KINDS)
def test_html_is_well_formed(kind: str) -> None:
    from lxml import etree

    for text in ended(kind, HTML, range(60, 100), max_tokens=400):
        for part in re.findall(r"<table>.*?</table>", text, flags=re.DOTALL):
            strict = re.sub(r"<br/?>", "<br/>", part.replace("&", "&amp;"))
            strict = re.sub(r"<(?![a-zA-Z/])", "&lt;", strict)
            table = etree.fromstring(strict)
            assert {child.tag for child in table} <= {"thead", "tbody", "tr"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tr><td>a</td></tr>", True),
        ("<thead><tr><th>a</th></tr></thead><tbody><tr><td></td></tr></tbody>", True),
        ("<thead><tr><th>a</th></tr></thead><tr><td></td></tr>", True),
        ('<tr><td colspan="2">a</td></tr><tr><td>b</td><td>c</td></tr>', True),
        ('<tr><td rowspan="2" colspan="2">a</td><td>b</td></tr><tr><td>c</td></tr>', True),
        ('<tr><td rowspan="2">a</td></tr><tr></tr>', True),
        ("<tr><td>AT&amp;T &lt; 1 & 2 < 3 > 2</td></tr>", True),
        ("<tr><td>a<br>b<br/>m<sup>2</sup></td></tr>", True),
        ("", False),
        ("<thead></thead><tr><td>a</td></tr>", False),
        ("<tr></tr>", False),
        ("<tr><td>a</td></tr><tr></tr>", False),
        ("<tr><td>a</td></tr><tr><td>b</td><td>c</td></tr>", False),
        ("<tr><td>a</td><td>b</td></tr><tr><td>c</td></tr>", False),
        ('<tr><td>a</td></tr><tr><td colspan="2">c</td></tr>', False),
        ('<tr><td colspan="0">a</td></tr>', False),
        ('<tr><td rowspan="2">a</td></tr>', False),
        ('<thead><tr><td rowspan="2">a</td><td>b</td></tr></thead><tr><td>c</td></tr>', False),
        ('<tr><td colspan="2" colspan="2">a</td></tr>', False),
        ("<tr><td>a</th></tr>", False),
        ("<tr><td>a<sup>b</td></tr>", False),
        ("<tr><td>a<script></td></tr>", False),
        ("<tr><td>a<b>x<i>y</i></b></td></tr>", False),
        ("<tbody><tr><td>a</td></tr>", False),
        ("<tbody><tr><td>a</td></tr></tbody><thead><tr><td>a</td></tr></thead>", False),
    ],
)
def test_html(text: str, expected: bool) -> None:
    assert [allows(kind, HTML, f"<table>{text}</table>") for kind in KINDS] == [expected] * 2


def test_html_allows_what_our_reader_reads_and_nothing_else() -> None:
    cells = ["", *(f"<td{a}{b}>x</td>" for a in ("", ' colspan="2"') for b in ("", ' rowspan="2"'))]
    rows = ["".join(pair) for pair in itertools.product(cells, repeat=2)]
    n_allowed = 0
    for chosen in itertools.product(rows, repeat=2):
        text = "<table>" + "".join(f"<tr>{row}</tr>" for row in chosen) + "</table>"
        try:
            read_html(text)
            expected = True
        except AnswerError:
            expected = False
        assert (advance(start(HTML.rule), text.encode()) is not None) == expected, text
        n_allowed += expected
    assert n_allowed > 10
