"""Tests of chart data as CSV: parsed as by the standard library, and cut at every character."""

from __future__ import annotations

import csv
import io
import random

import pytest

from granite4v.runtime.formats import Cell, Table, read, read_csv, salvage, write_csv
from tests.helpers.tables import LINES, ODD_TEXTS, assert_error


def test_csv_comes_back_as_written() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        texts = [*ODD_TEXTS, *LINES, " x ", "", " ", "\t", "a\rb", "a\r\nb", '"', ","]
        n_rows, n_cols = rng.randint(1, 6), rng.randint(1, 4)
        rows = [[rng.choice(texts) for _ in range(n_cols)] for _ in range(n_rows)]
        cells = [Cell(i, j, text, 1, 1, not i, int(not i)) for i, row in enumerate(rows) for j, text in enumerate(row)]
        table = Table(n_rows, n_cols, 1, tuple(cells))
        assert read_csv(write_csv(table)) == table
        assert list(csv.reader(io.StringIO(write_csv(table), newline=""))) == rows


def test_csv_as_models_may_write_it() -> None:
    expected = [["a", "b"], ["1", "2, 3"]]
    for text in (
        'a,b\n1,"2, 3"',
        'a,b\r\n1,"2, 3"\r\n',
        '```csv\na,b\n\n1,"2, 3"\n```',
        'Data:\n```csv\na,b\n1,"2, 3"\n```',
    ):
        assert read("<chart2csv>", text).texts() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "no row in ' \\n'; expected CSV with a header row."),
        ("```csv\n \n\n```", "no row in '```csv\\n \\n\\n```'; expected CSV with a header row."),
        ("a,b\n1,2\n3", "row 3, on line 3, has 1 fields; expected 2 as in the header row."),
        ('a,b\n1,"2"x\n', "row 2, on line 2, is not CSV: ',' expected after '\"'; expected quotes around "
         "the whole field."),
        ('a,b\n1,"2\n', "row 2, on line 2, is not CSV: unexpected end of data; expected quotes around "
         "the whole field."),
    ],
)  # fmt: skip
def test_an_invalid_answer_gives_what_was_found_where_and_what_was_expected(text: str, message: str) -> None:
    assert_error("chart2csv", text, message)


def test_every_beginning_of_csv_gives_its_first_rows() -> None:
    for seed in range(20):
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
