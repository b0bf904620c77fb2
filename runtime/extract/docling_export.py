"""A document's records as one DoclingDocument, through docling-core (the extra 'docling').

Tables, charts as picture items with their data, fields as key-value pairs, prose and code as text, each on its page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granite4v.paths import atomic_text_file
from granite4v.runtime.extract.own_files import make_folders
from granite4v.runtime.extract.record import Record
from granite4v.runtime.formats import Table

if TYPE_CHECKING:
    from docling_core.types.doc import DoclingDocument

SUFFIX = "docling.json"


def write_docling(root: Path, stem: str, source: str, records: Iterable[Record]) -> Path | None:
    """Writes `stem.docling.json` below `root`, complete or not at all, and returns its path.

    None, and no file, for a document of which no page could be read. Raises OutputError.
    """
    name = Path(stem).name
    document = as_docling(name, source, records)
    if not document.pages:
        return None
    path = make_folders(root, str(Path(stem).parent)) / f"{name}.{SUFFIX}"
    with atomic_text_file(path) as file:
        json.dump(document.export_to_dict(), file, ensure_ascii=False)
        file.write("\n")
    return path


def as_docling(name: str, source: str, records: Iterable[Record]) -> DoclingDocument:
    """The document. Where several tasks read the tables of a page, the first that read any counts."""
    from docling_core.types.doc import DocItemLabel, DoclingDocument, Size

    document = DoclingDocument(name=name)
    table_task: dict[int, str] = {}
    charts: dict[int, Any] = {}
    for record in records:
        if record.page is None or record.size_px is None:
            continue
        if record.page not in document.pages:
            document.add_page(record.page, Size(width=record.size_px[0], height=record.size_px[1]))
        where = _whole_page(record)
        if record.kind == "tables" and record.tables:
            if table_task.setdefault(record.page, record.task) == record.task:
                for table in record.tables:
                    document.add_table(_table_data(table), prov=where)
        elif record.kind == "chart" and isinstance(record.value, Table):
            _chart_on(document, charts, record).meta.tabular_chart = _chart_data(record.value)
        elif record.task == "chart2summary" and record.value:
            _chart_on(document, charts, record).meta.description = _description(record.value)
        elif record.kind == "fields" and record.value:
            document.add_key_values(_graph(record.value), prov=where)
        elif record.kind == "code" and record.value:
            document.add_text(DocItemLabel.CODE, record.value, prov=where)
        elif isinstance(record.value, str) and record.value:
            document.add_text(DocItemLabel.TEXT, record.value, prov=where)
    return document


def _whole_page(record: Record) -> Any:
    from docling_core.types.doc import BoundingBox, ProvenanceItem

    assert record.size_px is not None and record.page is not None
    width, height = record.size_px
    box = BoundingBox(l=0, t=0, r=width, b=height)  # from the top left: where on the page it stood is not known
    return ProvenanceItem(page_no=record.page, bbox=box, charspan=(0, 0))


def _table_data(table: Table) -> Any:
    from docling_core.types.doc import TableCell, TableData

    cells = [
        TableCell(
            text=cell.text,
            start_row_offset_idx=cell.row,
            end_row_offset_idx=cell.row + cell.rowspan,
            start_col_offset_idx=cell.col,
            end_col_offset_idx=cell.col + cell.colspan,
            row_span=cell.rowspan,
            col_span=cell.colspan,
            column_header=cell.row < table.n_header_rows,
            row_header=cell.header and cell.row >= table.n_header_rows,
        )
        for cell in table.cells
    ]
    return TableData(table_cells=cells, num_rows=table.n_rows, num_cols=table.n_cols)


def _chart_on(document: DoclingDocument, charts: dict[int, Any], record: Record) -> Any:
    """Docling's picture item that holds what was read from the charts of a page."""
    from docling_core.types.doc import PictureMeta

    assert record.page is not None
    if record.page not in charts:
        charts[record.page] = document.add_picture(prov=_whole_page(record))
        charts[record.page].meta = PictureMeta()
    return charts[record.page]


def _chart_data(table: Table) -> Any:
    from docling_core.types.doc import TabularChartMetaField

    return TabularChartMetaField(chart_data=_table_data(table), created_by="granite4v")


def _description(text: str) -> Any:
    from docling_core.types.doc import DescriptionMetaField

    return DescriptionMetaField(text=text, created_by="granite4v")


def _graph(fields: Any) -> Any:
    """A key for every field that has a value, named by its path, and a link from each to its value."""
    from docling_core.types.doc import GraphCell, GraphCellLabel, GraphData, GraphLink, GraphLinkLabel

    cells: list[Any] = []
    links: list[Any] = []
    for name, value in _leaves(fields, ""):
        key = len(cells)
        cells.append(GraphCell(label=GraphCellLabel.KEY, cell_id=key, text=name, orig=name))
        cells.append(GraphCell(label=GraphCellLabel.VALUE, cell_id=key + 1, text=value, orig=value))
        links.append(GraphLink(label=GraphLinkLabel.TO_VALUE, source_cell_id=key, target_cell_id=key + 1))
    return GraphData(cells=cells, links=links)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every value that is not null, by its path, such as 'lines[0].price'."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    elif value is not None:
        yield name, value if isinstance(value, str) else json.dumps(value)
