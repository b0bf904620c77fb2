"""`report.html`: each page next to its extracted values, in one file without network access or scripts.

Built from the log one page at a time, however long it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from granite4v.errors import OutputError
from granite4v.paths import atomic_text_file, disk_errors
from granite4v.runtime.extract.certainty import Certainty, certainties, least_certain
from granite4v.runtime.extract.charts import redraw
from granite4v.runtime.extract.own_files import check_own
from granite4v.runtime.extract.page_images import data_url
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.report_template import TEMPLATE
from granite4v.runtime.formats import Cell, Table
from granite4v.runtime.formats.json_values import MAX_NESTING, is_deeper

_TITLE, _HEAD_BYTES = b"<title>What was read", 1000
_N_UNCERTAIN = 50
# characters that neither HTML nor XML can represent, other control characters, and bidirectional embeddings and
# overrides, with which a file name could reverse the text after it
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Failure:
    """A record without a valid answer, and the number of its page in the report."""

    anchor: int
    record: Record


@dataclass
class Contents:
    """The top of the report. Kept in memory, so it contains no answers."""

    documents: list[tuple[int, str, int]] = field(default_factory=list)  # anchor of the first page, source, n_pages
    failures: list[Failure] = field(default_factory=list)
    uncertain: list[Certainty] = field(default_factory=list)  # the least certain cells and fields, least first
    tasks: list[str] = field(default_factory=list)
    model: dict[str, str] = field(default_factory=dict)
    n_pages: int = 0
    n_records: int = 0
    n_salvaged: int = 0


@dataclass(frozen=True)
class PageView:
    anchor: int
    source: str
    number: int | None
    n_pages: int | None
    image: str | None  # a data URL
    size_px: tuple[int, int] | None
    records: list[Record]


def is_report(path: Path) -> bool:
    """Whether there is a report at `path`. Raises OutputError for anything else, which a report would replace."""
    check_own(path)
    with disk_errors(path):
        found = path.read_bytes()[:_HEAD_BYTES] if path.exists() else b""
    if found and _TITLE not in found:
        raise OutputError(
            f"'{path}' is not a report that 'granite4v extract' made; move it elsewhere, or give another directory."
        )
    return bool(found)


def write_report(path: Path, records: Iterable[Record]) -> None:
    """Writes the report of `records`, which are read twice. Page images are taken from the report's folder.

    Raises OutputError.
    """
    template = _environment().from_string(TEMPLATE)
    with atomic_text_file(path) as file:
        for piece in template.generate(contents=_contents(records), pages=_pages(records, path.parent)):
            file.write(piece)


def _contents(records: Iterable[Record]) -> Contents:
    found = Contents()
    for anchor, page in enumerate(_by_page(records), 1):
        mine = (one for record in page if record.copy_of is None for one in certainties(record, anchor))
        found.uncertain = least_certain([*found.uncertain, *mine], _N_UNCERTAIN)
        found.n_pages += 1
        if not found.documents or found.documents[-1][1] != page[0].source:
            found.documents.append((anchor, page[0].source, 0))
        first, source, n = found.documents[-1]
        found.documents[-1] = (first, source, n + 1)
        for record in page:
            found.n_records += 1
            found.n_salvaged += record.salvaged
            found.model = found.model or dict(record.model)
            if record.task not in found.tasks:
                found.tasks.append(record.task)
            if record.failed:
                found.failures.append(Failure(anchor, replace(record, text="", value=None)))
    return found


def _pages(records: Iterable[Record], folder: Path) -> Iterator[PageView]:
    for anchor, page in enumerate(_by_page(records), 1):
        first = page[0]
        page = [_shown(record) for record in page]
        image = data_url(folder, first.digest)
        yield PageView(anchor, first.source, first.page, first.n_pages, image, first.size_px, page)


def _shown(record: Record) -> Record:
    """Returns the record without a value that is too deeply nested for the template; earlier versions kept those."""
    return replace(record, value=None) if is_deeper(record.value, MAX_NESTING) else record


def _by_page(records: Iterable[Record]) -> Iterator[list[Record]]:
    for _, page in groupby(records, key=lambda record: (record.source, record.page)):
        yield list(page)


def _environment() -> Any:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    environment.globals.update(rows=_rows, chart=_chart, plain=_plain, columns=_columns)
    return environment


def _printable(value: Any) -> Any:
    return _UNPRINTABLE.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _rows(table: Table) -> list[list[Cell]]:
    """Returns the cells that begin in each row."""
    rows: list[list[Cell]] = [[] for _ in range(table.n_rows)]
    for cell in table.cells:
        rows[cell.row].append(cell)
    return rows


def _chart(record: Record) -> Any:
    return redraw(record.value) if record.kind == "chart" and isinstance(record.value, Table) else None


def _plain(value: Any) -> bool:
    return not isinstance(value, dict | list)


def _columns(value: Any) -> list[str]:
    """Returns the keys of a list of flat objects that can be shown as a table (at most 8); none for anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return []
    keys = list(dict.fromkeys(key for item in value for key in item))
    flat = all(_plain(cell) for item in value for cell in item.values())
    return keys if flat and 0 < len(keys) <= 8 else []
