"""Tests of the automaton of CSV: with answers that the standard library reads, and with cases by hand."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter

import pytest

from granite4v.runtime.formats import read_csv, write
from tests.helpers.constrained import KINDS, allows, ended, grammar_of
from tests.helpers.tables import ODD_TEXTS, random_table

CSV = grammar_of("chart2csv")


@pytest.mark.parametrize("kind", KINDS)
def test_csv_rows_are_as_wide_as_the_header(kind: str) -> None:
    widths: Counter[int] = Counter()
    for text in ended(kind, CSV, range(100)):
        inner = re.fullmatch(r"```(?:csv)?\n(.*?)\n```", text, flags=re.DOTALL)
        rows = list(csv.reader(io.StringIO(inner[1] if inner else text, newline=""), strict=True))
        assert rows and {len(row) for row in rows} == {len(rows[0])}
        assert read_csv(text).texts() == rows
        widths[len(rows[0])] += len(rows) > 1
    assert widths.total() > 10 and len(widths) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_csv_that_is_written_is_allowed(kind: str) -> None:
    for seed in range(25):
        table = random_table(seed, [text for text in ODD_TEXTS if "`" not in text], headers=False)
        text = write(table, "csv")
        assert allows(kind, CSV, text) and allows(kind, CSV, text + "\n") and allows(kind, CSV, f"```csv\n{text}\n```")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", True),
        ("a,b\n1,2", True),
        ("a,b\n1,2\n", True),
        (",\n,", True),
        ('"a,""b""\n",b\n"","1\n2"', True),
        ('""\n""', True),
        ("Größe, ü\n東京, 1", True),
        ("```csv\na,b\n1,2\n```", True),
        ("```\na\n```", True),
        ("", False),
        ("\n", False),
        ("a\n\n", False),
        ("a,b\n1", False),
        ("a,b\n1,2,3", False),
        ("a,b\n1,2\n\n", False),
        ('a"b', False),
        ('"a', False),
        ('"a"b', False),
        ("a\r\nb", False),
        ("```csv\na\n", False),
        ("```csv\n```", False),
        ("```python\na", False),
        ("a,b\n```\n", False),
    ],
)
def test_csv(text: str, expected: bool) -> None:
    assert [allows(kind, CSV, text) for kind in KINDS] == [expected] * 2
