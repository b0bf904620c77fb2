"""Tests of Markdown tables, compared with docling-core's."""

from __future__ import annotations

import re

from granite4v.runtime.formats import write_markdown
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
