"""Tests of the confidences of cells and fields: in the records of a run, and the least certain first in its report."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

import granite4v
from granite4v.runtime.extract.certainty import certainties, least_certain
from granite4v.runtime.extract.record import Record, decode, encode
from granite4v.runtime.extract.report import write_report
from granite4v.runtime.formats import read

TABLES = Record(
    "a.pdf", 2, 2, "tables_html", valid=True,
    value=read("tables_html", "<table><tr><td>A</td><td>b</td></tr></table>"),
    confidence={"0/0/0": {"mean": 0.9, "least": 0.8}, "0/0/1": {"mean": 0.3, "least": 0.1}},
)  # fmt: skip
FIELDS = Record(
    "b.png", 1, 1, "kvp", value={"a/b": ["x", None], "n": 5}, valid=True,
    confidence={"/a~1b/1": {"mean": 0.5, "least": 0.2}, "/n": {"mean": 0.99, "least": 0.98},
                "/gone": {"mean": 1, "least": 1}},
)  # fmt: skip


def test_each_says_where_and_what_it_is() -> None:
    found = [(one.where, one.text, one.least) for record in (TABLES, FIELDS) for one in certainties(record)]
    assert found[0] == ("table 1, row 1, column 1", "A", 0.8)
    assert found[2:] == [("/a~1b/1", "not there", 0.2), ("/n", "5", 0.98), ("/gone", None, 1)]


def test_a_record_without_confidences_has_none() -> None:
    assert list(certainties(Record("a", 1, 1, "kvp", value={"a": 1}, valid=True))) == []


def test_the_least_certain_come_first() -> None:
    found = least_certain((one for record in (FIELDS, TABLES) for one in certainties(record)), 3)
    assert [one.least for one in found] == [0.1, 0.2, 0.8]


def test_a_record_keeps_them() -> None:
    assert decode(encode(FIELDS)) == FIELDS


def test_the_report_opens_on_them(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", [TABLES, FIELDS])
    root = etree.fromstring((tmp_path / "report.html").read_bytes())
    section = next(e for e in root.iter("{*}section") if "Check first" in "".join(e.itertext()))
    rows = [["".join(cell.itertext()) for cell in row] for row in section.iter("{*}tr")][1:]
    assert rows[0][:4] == ["0.10", "0.30", "a.pdf, page 2", "tables_html table 1, row 1, column 2"]
    assert [row[0] for row in rows] == ["0.10", "0.20", "0.80", "0.98", "1.00"]
    assert section.getparent().tag.endswith("header")


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_has_them_where_they_are_asked_for(tmp_path: Path, wanted: bool) -> None:
    page = Path(__file__).parents[2] / "data/invoice.png"
    with granite4v.load() as model:
        (record,) = granite4v.extract(page, "tables_html", model=model, confidence=wanted, max_tokens=60)
        answer = model.generate(
            "<tables_html>", [page], max_tokens=60, constraint=granite4v.grammar_for("tables_html"), logprobs=0
        )
    assert (record.confidence is not None) == wanted
    if wanted:
        alone = granite4v.confidence(answer, "tables_html")
        assert record.confidence and len(record.confidence) == len(alone) > 3
        for (table, row, column), one in alone.items():
            figures = record.confidence[f"{table}/{row}/{column}"]
            assert figures == {"mean": pytest.approx(one.mean, abs=1e-3), "least": pytest.approx(one.least, abs=1e-3)}
