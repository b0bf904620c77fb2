"""Tests of the report: well-formed, everything escaped, failures first, charts drawn from their numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lxml import etree
from lxml import html as lxml_html

from granite4v.clip_projector import load_image
from granite4v.runtime.extract.charts import HEIGHT, WIDTH, number, redraw
from granite4v.runtime.extract.page_images import keep_image
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.report import write_report
from granite4v.runtime.formats import read, read_csv
from granite4v.runtime.formats.json_values import MAX_NESTING
from tests.helpers.pictures import text_picture

NASTY = "<script>alert('x')</script> & \"quotes\" \x00\x1b \x9b31m\u202egnp.exe\u2028 {{ 7 * 7 }} ]]>"
SVG = "{http://www.w3.org/2000/svg}"
XHTML = "{http://www.w3.org/1999/xhtml}"
TABLE = '<table><tr><th colspan="2">T</th></tr><tr><td rowspan="2">a</td><td>b</td></tr><tr><td>c</td></tr></table>'


def records() -> list[Record]:
    nasty_table = read("tables_json", '{"dimensions": {"columns": 1}, "cells": [{"row": 1, "col": 1, "content": "N"}]}')
    tables = read("tables_html", TABLE)
    chart = read_csv(f'x,"{NASTY.replace(chr(34), "")}"\na,5')
    fields = {"items": [{"keys": 1, NASTY: None}], "values": {"get": True}, "empty": [], "list": ["x", ["y"]], "e": {}}
    return [
        Record("a.pdf", 1, 2, "tables_html", (60, 80), 72, "d1", text=TABLE, value=tables, valid=True),
        Record("a.pdf", 1, 2, "kvp", (60, 80), 72.0, "d1", text="{}", value=fields, valid=True),
        Record("a.pdf", 2, 2, "tables_html", error=f"cannot be read: {NASTY}"),
        Record("a.pdf", 2, 2, "kvp", error=f"cannot be read: {NASTY}"),
        Record(
            NASTY, 1, 1, "chart2csv", (60, 80), None, "d2", text=NASTY, value=chart,
            salvaged=True, finish_reason="length", timings={"n_generated": 5, "seconds": 1.5}, validity_error="cut",
            valid=True, copy_of={"source": NASTY, "page": 3},
        ),
        Record("c.png", 1, 1, "tables_json", (1, 1), None, "d3", value=nasty_table, valid=True),
        Record("c.png", 1, 1, "tables_otsl", (1, 1), None, "d3", value=[], valid=True),
        Record("c.png", 1, 1, "chart2code", (1, 1), None, "d3", value=NASTY, valid=True),
        Record("c.png", 1, 1, "prompt", (1, 1), None, "d3", value=NASTY, valid=True),
        Record("c.png", 1, 1, "chart2csv", (1, 1), None, "d3", text="x", validity_error="no CSV", finish_reason="stop"),
    ]  # fmt: skip


@pytest.fixture
def report(tmp_path: Path) -> str:
    keep_image(tmp_path, "d1", load_image(text_picture((600, 1800))))
    write_report(tmp_path / "report.html", records())
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def text_of(element: etree._Element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_it_is_well_formed_and_says_everything(report: str) -> None:
    root = etree.fromstring(report.encode(), etree.XMLParser(resolve_entities=False))
    again = lxml_html.document_fromstring(report)  # as a browser reads it
    pages = list(root.iter(f"{XHTML}article"))
    assert len(pages) == len(again.findall(".//article")) == 4
    assert "a.pdf page 1 of 2" in text_of(pages[0]) and "no image of this page" in text_of(pages[1])
    table = next(pages[0].iter(f"{XHTML}table"))
    assert [(cell.tag.removeprefix(XHTML), dict(cell.attrib), text_of(cell)) for row in table for cell in row] == [
        ("th", {"colspan": "2"}, "T"), ("td", {"rowspan": "2"}, "a"), ("td", {}, "b"), ("td", {}, "c"),
    ]  # fmt: skip
    names = [text_of(element) for element in pages[0].iter(f"{XHTML}dt")]
    assert names == ["items", "values", "get", "empty", "list", "e"]
    assert "cut: kept up to the last complete row" in text_of(pages[2]) and "5 tokens, 1.5 s" in text_of(pages[2])
    assert "no table on this page" in text_of(pages[3])


def test_nothing_that_was_read_becomes_markup(report: str) -> None:
    root = etree.fromstring(report.encode())
    assert not list(root.iter(f"{XHTML}script"))
    shown = text_of(root)
    assert shown.count("<script>alert('x')</script>") >= 8 and "{{ 7 * 7 }}" in shown
    assert not re.search("[\x00\x1b\x9b\u202e]", report) and "\ufffdgnp.exe" in shown
    assert lxml_html.document_fromstring(report).findall(".//script") == []


def test_failures_come_first_and_lead_to_their_pages(report: str) -> None:
    root = etree.fromstring(report.encode())
    header, main = root.find(f".//{XHTML}header"), root.find(f".//{XHTML}main")
    assert header is not None and main is not None
    body = list(root.find(f"{XHTML}body"))  # type: ignore[arg-type]
    assert body.index(header) < body.index(main)
    section = next(element for element in header.iter(f"{XHTML}section"))
    assert "3 without a valid answer" in text_of(section) and "c.png, page 1, chart2csv: no CSV" in text_of(section)
    targets = {element.get("id") for element in root.iter(f"{XHTML}article")}
    links = [element.get("href", "") for element in header.iter(f"{XHTML}a")]
    assert links and all(link.removeprefix("#") in targets for link in links)


def test_a_list_of_records_is_not_looked_through_again_for_each_row(tmp_path: Path) -> None:
    class Counted(list[Any]):
        n_times = 0

        def __iter__(self) -> Iterator[Any]:
            self.n_times += 1
            return super().__iter__()

    items = Counted({"a": i, "b": "x"} for i in range(200))
    record = Record("page.png", 1, 1, "kvp", value={"items": items}, valid=True)
    write_report(tmp_path / "report.html", [record])
    assert 0 < items.n_times < 20
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<td>") == 400


def test_it_needs_no_network_and_no_scripts(report: str) -> None:
    assert "default-src 'none'" in report
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", report)
    assert addresses and all(address.startswith(("#", "data:image/webp;base64,")) for address in addresses)
    assert not re.search(r"\son\w+=", report.replace(NASTY, ""))


def test_pictures_are_small_and_upright(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    from granite4v.runtime.extract.page_images import data_url

    keep_image(tmp_path, "d1", load_image(text_picture((600, 1800))))
    url = data_url(tmp_path, "d1")
    assert url is not None
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert picture.format == "WEBP" and picture.size == (333, 1000)
    assert data_url(tmp_path, "d2") is None and data_url(tmp_path, None) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("-1,234.5", -1234.5), ("1.234,5", 1234.5), ("12,5", 12.5), ("1,234", 1234), ("1 234", 1234),
        ("12 %", 12), ("$5", 5), ("-$5", -5), ("€ 1.5M", 1.5e6), ("(3)", -3), ("−5", -5), ("1e3", 1000), (".5", 0.5),
        ("1,234,567", 1234567), ("1.234.567", 1234567), ("2 bn", 2e9), ("5 kg", 5),
        ("", None), ("n/a", None), ("Q1", None), ("2020-01", None), ("12a4", None), ("1e999", None),
    ],
)  # fmt: skip
def test_numbers_as_charts_write_them(text: str, value: float | None) -> None:
    assert number(text) == value


def test_bars_have_the_height_of_their_values() -> None:
    chart = redraw(read_csv("Quarter,Sales,Loss,Note\nQ1,50,-25,x\nQ2,100,,y\nQ3,0,10,z\n"))
    assert chart is not None and chart.series == ("Sales", "Loss") and not chart.lines
    assert [(bar.series, bar.title) for bar in chart.bars][:2] == [(0, "Q1, Sales: 50"), (0, "Q2, Sales: 100")]
    sales = {bar.title: bar for bar in chart.bars}
    assert sales["Q2, Sales: 100"].height == pytest.approx(2 * sales["Q1, Sales: 50"].height, abs=0.2)
    assert sales["Q1, Loss: -25"].y == chart.zero_y and sales["Q1, Loss: -25"].height > 0
    assert sales["Q2, Sales: 100"].y + sales["Q2, Sales: 100"].height == pytest.approx(chart.zero_y, abs=0.2)
    assert all(0 <= bar.x <= bar.x + bar.width <= WIDTH and 0 <= bar.y <= HEIGHT for bar in chart.bars)
    assert [label.text for label in chart.labels] == ["Q1", "Q2", "Q3"]
    assert {"0", "100"} <= {tick.text for tick in chart.ticks}


def test_what_follows_one_another_is_a_line_broken_where_a_value_is_missing() -> None:
    rows = "\n".join(f"{year},{'' if year == 2003 else year - 1990}" for year in range(2000, 2010))
    chart = redraw(read_csv(f"Year,n\n{rows}\n"))
    assert chart is not None and not chart.bars
    assert [len(points.split()) for _, points in chart.lines] == [3, 6]


@pytest.mark.parametrize("text", ["a\n1\n", "a,b\n", "a,b\nx,y\n", "a,b\nx,\n"])
def test_no_chart_without_numbers(text: str) -> None:
    assert redraw(read_csv(text)) is None


@pytest.mark.parametrize("text", ["a,b\nx,0\n", "a,b\nx,-5\n", "a,b\nx,1e-9\ny,1e12\n", "a,b\nx,5\ny,5\n"])
def test_every_scale_can_be_drawn(text: str) -> None:
    chart = redraw(read_csv(text))
    assert chart is not None and len(chart.ticks) >= 2
    assert all(0 <= tick.y <= HEIGHT for tick in chart.ticks)


@pytest.mark.parametrize("levels", [MAX_NESTING, MAX_NESTING + 1, 300, 5000])
def test_a_value_of_any_depth_ends_no_report(tmp_path: Path, levels: int) -> None:
    value: Any = "core"
    for _ in range(levels):
        value = {"a": value} if levels % 2 else [value]
    records = [Record("a", 1, 1, "kvp", value=value, text="as written", valid=True)]
    write_report(tmp_path / "report.html", records)
    text = (tmp_path / "report.html").read_text()
    assert ("core" in text) == (levels == MAX_NESTING) and "as written" in text and text.endswith("</html>")
