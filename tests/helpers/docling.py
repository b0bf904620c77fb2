"""Tables converted to docling-core's table items."""

from __future__ import annotations

from typing import Any

from granite4v.runtime.formats import Table
from granite4v.runtime.formats.docling_ import docling_table


def docling_item(table: Table) -> tuple[Any, Any]:
    from docling_core.types.doc.document import DoclingDocument

    document = DoclingDocument(name="page")
    return document.add_table(data=docling_table(table)), document
