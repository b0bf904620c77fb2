"""Converts tables to docling-core's types (the extra 'docling')."""

from __future__ import annotations

from typing import TYPE_CHECKING

from granite4v.runtime.formats.otsl import is_section
from granite4v.runtime.formats.table import Table

if TYPE_CHECKING:
    from docling_core.types.doc import TableCell, TableData, TabularChartMetaField

CREATED_BY = "granite4v"


def docling_cells(table: Table) -> list[TableCell]:
    """The cells with docling's flags: column headers in header rows; row headers and sections below them."""
    from docling_core.types.doc import TableCell

    return [
        TableCell(
            text=cell.text,
            start_row_offset_idx=cell.row,
            end_row_offset_idx=cell.row + cell.rowspan,
            start_col_offset_idx=cell.col,
            end_col_offset_idx=cell.col + cell.colspan,
            row_span=cell.rowspan,
            col_span=cell.colspan,
            column_header=cell.row < table.n_header_rows,
            row_section=is_section(table, cell),
            row_header=cell.header and cell.row >= table.n_header_rows and not is_section(table, cell),
        )
        for cell in table.cells
    ]


def docling_table(table: Table) -> TableData:
    """The table as docling-core's TableData."""
    from docling_core.types.doc import TableData

    return TableData(table_cells=docling_cells(table), num_rows=table.n_rows, num_cols=table.n_cols)


def chart_field(table: Table, confidence: float | None = None) -> TabularChartMetaField:
    """The data of a chart and the model's confidence in it, as docling-core stores them."""
    from docling_core.types.doc import TabularChartMetaField

    return TabularChartMetaField(chart_data=docling_table(table), created_by=CREATED_BY, confidence=confidence)
