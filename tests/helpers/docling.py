"""Tables as docling-core's."""

from __future__ import annotations

from typing import Any

from granite4v.runtime.formats import Table


def docling_item(table: Table) -> tuple[Any, Any]:
    from docling_core.types.doc.document import DoclingDocument, TableCell, TableData

    cells = [
        TableCell(
            text=c.text, row_span=c.rowspan, col_span=c.colspan, start_row_offset_idx=c.row,
            end_row_offset_idx=c.row + c.rowspan, start_col_offset_idx=c.col, end_col_offset_idx=c.col + c.colspan,
            column_header=c.row < table.n_header_rows,
            row_header=c.header and c.row >= table.n_header_rows,
        )
        for c in table.cells
    ]  # fmt: skip
    document = DoclingDocument(name="page")
    data = TableData(num_rows=table.n_rows, num_cols=table.n_cols, table_cells=cells)
    return document.add_table(data=data), document
