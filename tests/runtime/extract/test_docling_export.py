"""Tests of the export to DoclingDocument, checked by docling-core."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from docling_core.types.doc import ContentLayer, CoordOrigin
from docling_core.types.doc.document import DoclingDocument

from granite4v.runtime.extract.docling_export import write_docling
from granite4v.runtime.extract.record import Record
from granite4v.runtime.formats import Cell, Table, read
from granite4v.runtime.formats.docling_ import docling_table

TABLE = (
    '<table><tr><th colspan="2">Sales</th></tr><tr><th>Year</th><th>Sum</th></tr>'
    '<tr><td rowspan="2">2020</td><td>5</td></tr><tr><td>6 | &lt;x&gt;</td></tr></table>'
)


def record(task: str, text: str, page: int) -> Record:
    return Record("a.pdf", page, 3, task, (100, 200), text=text, value=read(task, text), valid=True)


def test_everything_is_in_it_and_it_loads_again(tmp_path: Path) -> None:
    summary = "It rises."
    records = [
        record("tables_html", TABLE, 1),
        Record("a.pdf", 1, 3, "tables_otsl", (100, 200), value=read("tables_html", TABLE), valid=True),
        record("kvp", '{"no": 5, "lines": [{"name": "x", "price": null}], "paid": true}', 1),
        record("chart2csv", "Year,Sales\n2020,5\n", 2),
        record("chart2summary", summary, 2),
        record("chart2code", "print(1)", 2),
        Record("a.pdf", 3, 3, "prompt", (100, 200), value="An answer.", valid=True),
        Record("a.pdf", None, None, "kvp", error="cut short"),
    ]
    path = write_docling(tmp_path, "a", "in/a.pdf", records)
    assert path is not None and path.name == "a.docling.json"
    document = DoclingDocument.model_validate(json.loads(path.read_text(encoding="utf-8")))
    assert sorted(document.pages) == [1, 2, 3] and document.pages[1].size.as_tuple() == (100, 200)
    (table,) = document.tables
    assert table.prov[0].page_no == 1 and (table.data.num_rows, table.data.num_cols) == (4, 2)
    frame = table.export_to_dataframe(document)
    assert frame.shape == (2, 2) and frame.iloc[1, 1] == "6 | <x>" and frame.iloc[1, 0] == "2020"
    graph = document.key_value_items[0].graph
    pairs = {graph.cells[link.source_cell_id].text: graph.cells[link.target_cell_id].text for link in graph.links}
    assert pairs == {"no": "5", "lines[0].name": "x", "paid": "true"}
    (picture,) = document.pictures
    assert picture.meta is not None and picture.meta.tabular_chart is not None and picture.meta.description is not None
    assert [cell.text for cell in picture.meta.tabular_chart.chart_data.table_cells] == ["Year", "Sales", "2020", "5"]
    assert picture.meta.description.text == summary and picture.prov[0].page_no == 2
    assert [text.text for text in document.texts] == ["print(1)", "An answer."]
    assert "2020" in document.export_to_markdown()


def confidences(document: DoclingDocument, item: Any) -> list[dict[str, float]]:
    """Returns the confidences of an item, read as in docs/docling.md."""
    found = [child.resolve(document).meta.granite4v__confidence for child in item.children]
    assert all(child.resolve(document).content_layer == ContentLayer.INVISIBLE for child in item.children)
    return found


def unsure_records() -> list[Record]:
    """Returns records with confidences, for every kind of item."""
    two = read("tables_html", TABLE + TABLE)
    sure = {"0/0/0": {"mean": 0.9, "least": 0.8}, "0/1/0": {"mean": 0.7, "least": 0.2}}
    sure |= {"1/0/0": {"mean": 0.5, "least": 0.1}}
    chart = {"0/0/0": {"mean": 0.6, "least": 0.6}, "0/1/1": {"mean": 0.8, "least": 0.3}}
    return [
        replace(record("tables_html", TABLE, 1), value=two, confidence=sure),
        replace(record("kvp", '{"no": 5}', 1), confidence={"/no": {"mean": 0.4, "least": 0.3}}),
        replace(record("chart2csv", "Year,Sales\n2020,5\n", 2), confidence=chart),
        replace(record("chart2summary", "It rises.", 2), confidence={"": {"mean": 0.75, "least": 0.5}}),
        replace(record("chart2code", "print(1)", 2), confidence={"": {"mean": 0.25, "least": 0.125}}),
    ]


def test_items_stand_on_their_page_and_tell_how_sure_the_model_was(tmp_path: Path) -> None:
    """Both are in docling's own fields where it has any."""
    records = [*unsure_records(), record("kvp", '{"no": 6}', 3)]
    path = write_docling(tmp_path, "a", "a.pdf", records)
    assert path is not None
    document = DoclingDocument.load_from_json(path)
    own = [confidences(document, item) for item in document.tables]
    assert own == [[{"mean": pytest.approx(0.8), "least": 0.2}], [{"mean": 0.5, "least": 0.1}]]
    unsure, silent = document.key_value_items
    assert confidences(document, unsure) == [{"mean": 0.4, "least": 0.3}] and silent.children == []
    (picture,) = document.pictures
    assert picture.meta.tabular_chart.confidence == pytest.approx(0.7)
    assert picture.meta.description.confidence == 0.75
    (code,) = document.texts
    assert confidences(document, code) == [{"mean": 0.25, "least": 0.125}]
    assert code.prov[0].charspan == (0, len("print(1)"))
    for item in (*document.tables, *document.pictures, *document.texts, *document.key_value_items):
        (where,) = item.prov
        page = document.pages[where.page_no].size
        assert where.bbox.as_tuple() == (0, 0, 100, 200) and where.bbox.coord_origin == CoordOrigin.BOTTOMLEFT
        assert where.bbox.to_top_left_origin(page.height).as_tuple() == (0, 0, *page.as_tuple())


@pytest.mark.filterwarnings("ignore:Parent .* not found in indexed nodes")  # by docling, for groups on other pages
def test_confidences_show_in_no_export(tmp_path: Path) -> None:
    """Neither of the loaded document, nor of documents that docling filters or concatenates from it."""
    unsure = unsure_records()
    paths = [
        write_docling(tmp_path, "a", "a.pdf", unsure),
        write_docling(tmp_path, "b", "a.pdf", [replace(one, confidence=None) for one in unsure]),
    ]
    told, silent = (DoclingDocument.load_from_json(path).model_copy(update={"name": "a"}) for path in paths if path)
    assert told.groups and not silent.groups
    for export in ("markdown", "text", "html", "doctags"):
        first, second = (
            [getattr(shown, f"export_to_{export}")() for shown in (one, one.filter(page_nrs={2}))]
            for one in (told, silent)
        )
        assert first == second and "print(1)" in first[1]
    assert told.export_to_markdown(mark_meta=True) == silent.export_to_markdown(mark_meta=True)
    assert [table.export_to_markdown(told) for table in told.tables] == [
        table.export_to_markdown(silent) for table in silent.tables
    ]
    code = told.filter(page_nrs={2})
    assert confidences(code, code.texts[0]) == [{"mean": 0.25, "least": 0.125}]
    joined = DoclingDocument.concatenate([silent, told])
    assert [len(confidences(joined, table)) for table in joined.tables] == [0, 0, 1, 1]


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    """As in Parquet and xlsx, since docling's JSON parser rejects them."""
    lone = "a\ud800b"
    table = Table(1, 1, 1, (Cell(0, 0, lone),))
    values = {"tables_html": [table], "kvp": {lone: [lone]}, "chart2csv": table, "chart2summary": lone, "prompt": lone}
    records = [Record("a.pdf", 1, 1, task, (9, 9), value=value, valid=True) for task, value in values.items()]
    path = write_docling(tmp_path, "a\udcff", "a\udcff.pdf", records)
    assert path is not None
    document = DoclingDocument.load_from_json(path)
    (item,), (picture,), (graph,) = document.tables, document.pictures, document.key_value_items
    assert [cell.text for cell in item.data.table_cells] == ["a\ufffdb"]
    assert [cell.text for cell in picture.meta.tabular_chart.chart_data.table_cells] == ["a\ufffdb"]
    assert [cell.text for cell in graph.graph.cells] == ["a\ufffdb[0]", "a\ufffdb"]
    assert picture.meta.description.text == document.texts[0].text == "a\ufffdb" and document.name == "a\ufffd"


def test_a_section_of_a_table_is_one() -> None:
    """The header of a section is as wide as the table."""
    (table,) = read("tables_otsl", "<otsl><ched>a<ched>b<nl><srow>c<lcel><nl><rhed>d<fcel>e<nl></otsl>")
    flags = [(c.text, c.column_header, c.row_section, c.row_header) for c in docling_table(table).table_cells]
    assert flags == [
        ("a", True, False, False),
        ("b", True, False, False),
        ("c", False, True, False),
        ("d", False, False, True),
        ("e", False, False, False),
    ]


def test_a_document_that_could_not_be_read_has_no_file(tmp_path: Path) -> None:
    failed = [Record("a.pdf", None, None, "kvp", error="broken"), Record("a.pdf", 1, None, "kvp", error="broken")]
    assert write_docling(tmp_path, "sub/a", "a.pdf", failed) is None and list(tmp_path.iterdir()) == []
    path = write_docling(tmp_path, "sub/a", "a.pdf", [record("kvp", '{"x": 1}', 1)])
    assert path == tmp_path / "sub" / "a.docling.json"
    assert DoclingDocument.load_from_json(path).name == "a"
