"""Tests of Markdown tables, compared with docling-core's."""

from __future__ import annotations

import re

import lxml.html
import pytest
from markdown_it import MarkdownIt

from granite4v.runtime.formats import Cell, Table, write_markdown
from tests.helpers.docling import docling_item
from tests.helpers.tables import random_table


def test_markdown_has_the_rows_of_doclings() -> None:
    for seed in range(50):
        table = random_table(seed, ["12.50", "a, b", "Grüße", "two\nlines"])
        starts = {cell.row for cell in table.cells}
        if not starts.issuperset(range(table.n_header_rows)):
            continue  # docling does not count a header row in which no cell starts
        item, document = docling_item(table)
        theirs = [re.split(r"\s*\|\s*", line)[1:-1] for line in item.export_to_markdown(document).splitlines()]
        ours = [re.split(r"\s*\|\s*", line)[1:-1] for line in write_markdown(table).splitlines()]
        assert ours[0] == theirs[0]
        assert ours[2:] == theirs[2:]


@pytest.mark.parametrize(
    "text",
    ["<LOD>", "a <b>c</b>", "p < 0.05", "<0.1", "R&D", "&amp; &#42;", "5.2*", "*a* **b**", "_a_ snake_case", "`x`",
     "a|b", "C:\\x", "\\*", "~~no~~ ~5", "[a](b) [1]", "![i](u)", "<!-- gone -->", "<http://a.b>", "1_000_"],
)  # fmt: skip
def test_a_renderer_shows_every_text_as_it_is(text: str) -> None:
    rendered = (
        MarkdownIt("commonmark")
        .enable(["table", "strikethrough"])
        .render(write_markdown(Table(2, 1, 1, (Cell(0, 0, "head", header=True, header_level=1), Cell(1, 0, text)))))
    )
    root = lxml.html.fromstring(rendered)
    assert [cell.text_content() for cell in root.iter("td")] == [text]
    assert not [element.tag for cell in root.iter("td") for element in cell]
