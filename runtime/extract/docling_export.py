"""Exports a document's records as one DoclingDocument, through docling-core (the extra 'docling').

It has tables, charts as picture items with their data, fields as key-value pairs, prose and code as text, each on its
page.
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
from granite4v.runtime.formats.docling_ import CREATED_BY, chart_field, docling_table
from granite4v.runtime.formats.json_values import replace_surrogates

if TYPE_CHECKING:
    from docling_core.types.doc import DoclingDocument

SUFFIX = "docling.json"


def write_docling(root: Path, stem: str, source: str, records: Iterable[Record]) -> Path | None:
    """Writes `stem.docling.json` below `root`, complete or not at all, and returns its path.

    Returns None and writes no file if no page of the document could be read. Raises OutputError.
    """
    name = Path(stem).name
    document = as_docling(name, source, records)
    if not document.pages:
        return None
    path = make_folders(root, str(Path(stem).parent)) / f"{name}.{SUFFIX}"
    with atomic_text_file(path) as file:
        # pydantic's parser rejects lone surrogates, even as escapes
        json.dump(replace_surrogates(document.export_to_dict()), file, ensure_ascii=False)
        file.write("\n")
    return path


def as_docling(name: str, source: str, records: Iterable[Record]) -> DoclingDocument:
    """Returns the document. If several tasks read the tables of a page, only the first that found any is used."""
    from docling_core.types.doc import DoclingDocument, Size

    document = DoclingDocument(name=name)
    table_task: dict[int, str] = {}
    charts: dict[int, Any] = {}
    for record in records:
        if record.page is None or record.size_px is None:
            continue
        if record.page not in document.pages:
            document.add_page(record.page, Size(width=record.size_px[0], height=record.size_px[1]))
        if record.kind == "tables" and record.tables:
            if table_task.setdefault(record.page, record.task) == record.task:
                _add_tables(document, record)
        elif record.kind == "chart" and isinstance(record.value, Table):
            meta = _chart_on(document, charts, record).meta
            meta.tabular_chart = chart_field(record.value, _confidence(record).get("mean"))
        elif record.task == "chart2summary" and record.value:
            _chart_on(document, charts, record).meta.description = _description(record)
        elif record.value:
            _add_item(document, record)
    return document


def _add_tables(document: DoclingDocument, record: Record) -> None:
    for number, table in enumerate(record.tables):
        item = document.add_table(docling_table(table), prov=_whole_page(record))
        _tell_confidence(document, item, _confidence(record, f"{number}/"))


def _add_item(document: DoclingDocument, record: Record) -> None:
    """Adds fields, code or text."""
    from docling_core.types.doc import DocItemLabel

    if record.kind == "fields":
        item = document.add_key_values(_graph(record.value), prov=_whole_page(record))
    elif isinstance(record.value, str):
        label = DocItemLabel.CODE if record.kind == "code" else DocItemLabel.TEXT
        item = document.add_text(label, record.value, prov=_whole_page(record, len(record.value)))
    else:
        return
    _tell_confidence(document, item, _confidence(record))


def _whole_page(record: Record, n_characters: int = 0) -> Any:
    """Returns the location of an item: the complete page image, since its place on the page is unknown.

    The origin is at the bottom left, as in docling's own documents. `n_characters`: length of a text item.
    """
    from docling_core.types.doc import BoundingBox, CoordOrigin, ProvenanceItem

    assert record.size_px is not None and record.page is not None
    width, height = record.size_px
    box = BoundingBox(l=0, b=0, r=width, t=height, coord_origin=CoordOrigin.BOTTOMLEFT)
    return ProvenanceItem(page_no=record.page, bbox=box, charspan=(0, n_characters))


def _confidence(record: Record, start: str = "") -> dict[str, float]:
    """Returns the mean over cells or fields of their mean token probability, and the least probability of any token;
    empty if the run did not record confidences. `start`: prefix of the keys to include."""
    found = [one for key, one in (record.confidence or {}).items() if key.startswith(start)]
    if not found:
        return {}
    return {"mean": sum(one["mean"] for one in found) / len(found), "least": min(one["least"] for one in found)}


def _tell_confidence(document: DoclingDocument, item: Any, confidence: dict[str, float]) -> None:
    """Stores the confidence of an item that has no confidence field in docling: as the custom field
    'granite4v__confidence' in the metadata of an invisible child group.

    It is not in the item's own metadata, since docling-core exports all fields of those to Markdown, text and HTML. A
    group stays with its item when docling filters or concatenates documents.
    """
    from docling_core.types.doc import ContentLayer
    from docling_core.types.doc.common.meta import BaseMeta

    if not confidence:
        return
    group = document.add_group(name=CREATED_BY, parent=item, content_layer=ContentLayer.INVISIBLE)
    group.meta = BaseMeta()
    group.meta.set_custom_field(CREATED_BY, "confidence", confidence)


def _chart_on(document: DoclingDocument, charts: dict[int, Any], record: Record) -> Any:
    """Returns docling's picture item for the charts of a page, adding it on the first call."""
    from docling_core.types.doc import PictureMeta

    assert record.page is not None
    if record.page not in charts:
        charts[record.page] = document.add_picture(prov=_whole_page(record))
        charts[record.page].meta = PictureMeta()
    return charts[record.page]


def _description(record: Record) -> Any:
    from docling_core.types.doc import DescriptionMetaField

    return DescriptionMetaField(text=record.value, created_by=CREATED_BY, confidence=_confidence(record).get("mean"))


def _graph(fields: Any) -> Any:
    """Returns docling's graph of the fields: a key for every field with a value, named by its path, linked to the
    value."""
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
    """Yields every value that is not null with its path, such as 'lines[0].price'."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    elif value is not None:
        yield name, value if isinstance(value, str) else json.dumps(value)
