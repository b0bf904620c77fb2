"""One record: what was read from one page for one task, with all it takes to trust or repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from granite4v.runtime.outputs import Cell, Table, read_tables_json
from granite4v.runtime.outputs.table import with_header_rows
from granite4v.runtime.outputs.tables_json import write_tables_json_list

Key = tuple[str, int | None, str]  # source, page, task: no two records of a run have the same

CHART = "chart2csv"
TABLES = ("tables_html", "tables_json", "tables_otsl")


@dataclass(frozen=True)
class Record:
    """What was read from one page for one task.

    `page` counts from 1; it is None, as are `n_pages`, `size_px` (width, height), `dpi` and `digest` (of the pixels),
    when a document could not be opened. `value` is what `outputs.read` gives: a list of Table, a Table (chart data),
    a dict or list (fields) or a str (code, prose); None when nothing could be read. `valid`: the value has the task's
    form, and fits the schema if there is one; `validity_error` says why not, or what was wrong with an answer of
    which only the whole part was kept (`salvaged`). `finish_reason` as in `Answer`. `copy_of`: the page with the same
    pixels that the answer was taken from. `error`: why there is no answer.
    `warnings`: what a person should know of the page. `model`: SHA-256 of the model's files.
    `timings`: counters (`n_...`) and seconds (`..._s`) of `Answer.timings`, and `seconds`, all of it; what this
    record cost, so they are zero in a copy and differ from run to run.
    """

    source: str
    page: int | None
    n_pages: int | None
    task: str
    size_px: tuple[int, int] | None = None
    dpi: float | None = None
    digest: str | None = None
    prompt_sha256: str = ""
    schema_sha256: str | None = None
    model: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    value: Any = None
    valid: bool = False
    validity_error: str | None = None
    salvaged: bool = False
    finish_reason: str | None = None
    copy_of: Mapping[str, Any] | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return (self.source, self.page, self.task)

    @property
    def failed(self) -> bool:
        """There is no answer, or none that is valid."""
        return self.error is not None or not self.valid

    @property
    def tables(self) -> list[Table]:
        """The tables of the value, chart data included; an empty list when it is something else."""
        if isinstance(self.value, Table):
            return [self.value]
        return [item for item in self.value if isinstance(item, Table)] if isinstance(self.value, list) else []

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON data: tables in the form of `tables_json`, chart data as rows, the header first."""
        shallow = asdict(self) if not self.tables else asdict(_without_value(self))
        return {**shallow, "value": _value_as_json(self.value)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Record:
        """The record that `as_dict` gave; raises KeyError, TypeError or AnswerError for anything else."""
        size_px = content["size_px"]
        return cls(
            **{
                **content,
                "warnings": tuple(content["warnings"]),
                "size_px": None if size_px is None else (size_px[0], size_px[1]),
                "value": _value_from_json(content["task"], content["value"]),
            }
        )


def encode(record: Record) -> bytes:
    """One line of UTF-8, its line break included."""
    content = record.as_dict()
    try:
        return json.dumps(content, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, from a file's name or a field
        return json.dumps(content).encode() + b"\n"


def decode(line: bytes) -> Record:
    """The record of such a line; raises ValueError, KeyError, TypeError or AnswerError for any other."""
    return Record.from_dict(json.loads(line))


def _without_value(record: Record) -> Record:
    from dataclasses import replace

    return replace(record, value=None)  # asdict would take thousands of cells apart for nothing


def _value_as_json(value: Any) -> Any:
    if isinstance(value, Table):
        return value.texts()
    if isinstance(value, list) and value and all(isinstance(item, Table) for item in value):
        return json.loads(write_tables_json_list(value))
    return value


def _value_from_json(task: str, value: Any) -> Any:
    if task == CHART and value is not None:
        return _chart(value)
    if task in TABLES and value is not None:
        return read_tables_json(json.dumps(value))
    return value


def _chart(rows: Sequence[Sequence[str]]) -> Table:
    cells = [Cell(i, j, text) for i, row in enumerate(rows) for j, text in enumerate(row)]
    return with_header_rows(len(rows), len(rows[0]), 1, cells)
