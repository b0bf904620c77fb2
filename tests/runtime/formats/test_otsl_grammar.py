"""Tests of the automaton of OTSL: with answers that docling-core reads, and with cases by hand."""

from __future__ import annotations

import itertools
import logging
import re
import warnings

import pytest

from granite4v.runtime.formats import read_otsl
from granite4v.runtime.grammar.automaton import advance, start
from tests.helpers.constrained import KINDS, allows, ended, grammar_of

OTSL = grammar_of("tables_otsl")


@pytest.mark.parametrize("kind", KINDS)
def test_otsl_is_what_docling_reads(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its parser takes a '<' in a text for a tag, so it gets another character instead."""
    from docling_core.types.doc.utils import parse_otsl_table_content

    n_tables = 0
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        for text in ended(kind, OTSL, range(60)):
            tables = read_otsl(text)
            parts = re.findall(r"<otsl>(.*?)</otsl>", text, flags=re.DOTALL)
            assert len(tables) == len(parts)
            for table, part in zip(tables, parts, strict=True):
                data = parse_otsl_table_content(re.sub(r"<(?![a-z/])", "‹", part))
                assert (data.num_rows, data.num_cols) == (table.n_rows, table.n_cols)
                found = [(c.start_row_offset_idx, c.start_col_offset_idx, c.row_span, c.col_span, c.text)
                         for c in data.table_cells]  # fmt: skip
                ours = [(c.row, c.col, c.rowspan, c.colspan, c.text.replace("<", "‹")) for c in table.cells]
                assert found == ours
                n_tables += 1
    assert not caplog.records and n_tables > 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<otsl><fcel>a<nl></otsl>", True),
        ("<otsl><ecel><nl></otsl><otsl><ecel><nl></otsl>", True),
        ("<otsl><ecel><nl></otsl>\n<otsl><ecel><nl></otsl>", True),
        ("[<otsl><ecel><nl></otsl>, <otsl><ecel><nl></otsl>]", True),
        ("[]", True),
        ("<otsl><fcel>p < 0.05<nl></otsl>", True),
        ("<otsl><fcel><LOQ<nl></otsl>", True),
        ("<otsl><fcel>a\nb<nl></otsl>", True),
        ("", False),
        ("<otsl></otsl>", False),
        ("<otsl><nl></otsl>", False),
        ("<otsl><fcel><nl></otsl>", False),  # an empty cell is <ecel>
        ("<otsl><fcel> \u3000<nl></otsl>", False),
        ("<otsl><ecel>a<nl></otsl>", False),
        ("<otsl><ecel><nl><ecel><ecel><nl></otsl>", False),
        ("<otsl><ecel><ecel><nl><ecel><nl></otsl>", False),
        ("<otsl><ecel><nl>", False),
        ("<otsl><lcel><nl></otsl>", False),
        ("<otsl><ucel><nl></otsl>", False),
        ("<otsl><xcel><nl></otsl>", False),
        ("<otsl><fcel>a<otsl><nl></otsl>", False),
        ("<otsl><fcel>a</fcel><nl></otsl>", False),  # our reader accepts it, docling-core does not
        ("<otsl><fcel>a\x00<nl></otsl>", False),
        ("[<otsl><ecel><nl></otsl>", False),
        ("[<otsl><ecel><nl></otsl>]<otsl><ecel><nl></otsl>", False),
    ],
)
def test_otsl(text: str, expected: bool) -> None:
    assert [allows(kind, OTSL, text) for kind in KINDS] == [expected] * 2


def is_covered_by_rectangles(rows: list[list[str]]) -> bool:
    """Applies the definition of the tags: each slot joins the cell that its tag continues; each cell must then fill its
    rectangle."""
    owner: dict[tuple[int, int], tuple[int, int]] = {}
    for i, row in enumerate(rows):
        for j, tag in enumerate(row):
            before = {"lcel": (i, j - 1), "ucel": (i - 1, j), "xcel": (i - 1, j - 1)}.get(tag)
            if before is not None and before not in owner:
                return False
            owner[i, j] = (i, j) if before is None else owner[before]
    for first in set(owner.values()):
        slots = {slot for slot, start_slot in owner.items() if start_slot == first}
        last = max(slots)
        for i, j in itertools.product(range(first[0], last[0] + 1), range(first[1], last[1] + 1)):
            expected = "ecel" if (i, j) == first else "lcel" if i == first[0] else "ucel" if j == first[1] else "xcel"
            if (i, j) not in slots or rows[i][j] != expected:
                return False
        if len(slots) != (last[0] - first[0] + 1) * (last[1] - first[1] + 1):
            return False
    return True


@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 3), (2, 2), (2, 3), (3, 2)])
def test_otsl_allows_the_grids_of_rectangles_and_no_others(n_rows: int, n_cols: int) -> None:
    n_allowed = 0
    for tags in itertools.product(("ecel", "lcel", "ucel", "xcel"), repeat=n_rows * n_cols):
        rows = [list(tags[i * n_cols : (i + 1) * n_cols]) for i in range(n_rows)]
        text = "".join("".join(f"<{tag}>" for tag in row) + "<nl>" for row in rows)
        position = advance(start(OTSL.rule), f"<otsl>{text}</otsl>".encode())
        assert (position is not None) == is_covered_by_rectangles(rows), text
        n_allowed += position is not None
    assert n_allowed > 1
