"""Lists cells and fields of records with their confidences, so that people can check the least certain ones first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from granite4v.runtime.extract.record import Record


@dataclass(frozen=True)
class Certainty:
    """The confidence of one cell or field.

    `where`: 'table 1, row 2, column 3' (from 1), the JSON pointer of a field, or '' for a complete text. `text`: its
    content; None for a complete text. `least` and `mean`: token probabilities as in `Confidence`. `anchor`: the page
    number that was passed with the record.
    """

    anchor: int
    source: str
    page: int | None
    task: str
    where: str
    text: str | None
    least: float
    mean: float


def certainties(record: Record, anchor: int = 0) -> Iterator[Certainty]:
    """Yields the certainty of each cell or field of a record that has a confidence."""
    by_slot = {
        (number, cell.row, cell.col): cell.text
        for number, table in enumerate(record.tables if record.confidence else ())
        for cell in table.cells
    }
    for key, figures in (record.confidence or {}).items():
        if record.kind in ("tables", "chart"):
            table, row, column = (int(part) for part in key.split("/"))
            where, text = f"table {table + 1}, row {row + 1}, column {column + 1}", by_slot.get((table, row, column))
        else:
            where, text = key, _field(record.value, key) if key else None
        yield Certainty(anchor, record.source, record.page, record.task, where, text, figures["least"], figures["mean"])


def least_certain(found: Iterable[Certainty], n: int) -> list[Certainty]:
    """Returns the `n` entries with the smallest `least`, smallest first; ties are ordered by `mean`, then as given."""
    return heapq.nsmallest(n, found, key=lambda one: (one.least, one.mean))


def _field(value: Any, pointer: str) -> str | None:
    """Returns what a JSON pointer refers to, as text; None if it refers to nothing, as in a truncated value."""
    for part in pointer.split("/")[1:]:
        try:
            value = value[int(part)] if isinstance(value, list) else value[part.replace("~1", "/").replace("~0", "~")]
        except (LookupError, TypeError, ValueError):
            return None
    return "not there" if value is None else str(value)
