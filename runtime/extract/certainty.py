"""Cells and fields of records with their confidences, so that people can check the least certain ones first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from granite4v.runtime.extract.record import Record


@dataclass(frozen=True)
class Certainty:
    """How sure the model was of one cell or field. `where`: 'table 1, row 2, column 3' (from 1), the JSON pointer of a
    field, or '' for all of a text. `text`: what it says, None for a whole text. `least` and `mean`: token probabilities
    as in `Confidence`. `anchor`: the number of the page that was given with the record."""

    anchor: int
    source: str
    page: int | None
    task: str
    where: str
    text: str | None
    least: float
    mean: float


def certainties(record: Record, anchor: int = 0) -> Iterator[Certainty]:
    """Of each cell or field of a record that has a confidence."""
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
    """The `n` with the smallest least probability, smallest first; ties by their mean, then in order."""
    return heapq.nsmallest(n, found, key=lambda one: (one.least, one.mean))


def _field(value: Any, pointer: str) -> str | None:
    """What a JSON pointer leads to, as text; None where it leads nowhere, as in a value that was cut."""
    for part in pointer.split("/")[1:]:
        try:
            value = value[int(part)] if isinstance(value, list) else value[part.replace("~1", "/").replace("~0", "~")]
        except (LookupError, TypeError, ValueError):
            return None
    return "not there" if value is None else str(value)
