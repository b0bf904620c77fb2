"""One record: what was extracted from one page for one task, with its provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from granite4v.runtime.formats import Cell, Table, read_tables_json
from granite4v.runtime.formats.table import with_header_rows
from granite4v.runtime.formats.tables_json import write_tables_json_list
from granite4v.runtime.formats.tasks import Kind, task_or_question

_KEPT: dict[Kind, str] = {
    "tables": "up to the last complete row",
    "chart": "up to the last complete row",
    "fields": "up to the last complete field",
    "code": "up to the last complete line",
    "prose": "up to where it was cut",
}
Key = tuple[str, int | None, str]  # source, page, task: unique within a run


@dataclass(frozen=True)
class Record:
    """What was extracted from one page for one task; a line of `results.jsonl` has the same fields.

    Which page. `source`: the document's path as it was first given, '-' for standard input. `page` counts from 1 of
    `n_pages`. `size_px` (width, height), `dpi` (of PDFs) and `digest` (SHA-256 of size and pixels) are those of the
    page image. All of them are None when a document could not be opened. `file_state`: size and modification time of
    the file, by which a later run recognizes it; None if there is no file or it was not found. `stem`: path prefix of
    the document's files in the output directory, '/' between folders; None without a directory.

    The request. `task`; `prompt_sha256`; `schema_sha256` for 'kvp'; `model`: SHA-256 of the model's files by role.

    The result. `text`: the answer as generated. `value` is what `formats.read` gives: a list of Table, a Table (chart
    data), a dict or list (fields) or a str (code, prose); None when nothing could be parsed. In JSON, tables are
    objects as in `tables_json`, and chart data is a list of rows, the header first. `valid`: the value has the task's
    format, and matches the schema if there is one; `validity_error` says why not. `salvaged`: the answer was truncated,
    and the part up to the last complete row, field or line was kept (all of it for prose); `validity_error` then says
    what was wrong. `finish_reason` as in `Answer`. `copy_of`: the page with identical pixels from which the answer was
    copied. `error`: why there is no answer, and `error_type` the name of the exception; None otherwise. `warnings`:
    warnings about the page. `timings`: counters (`n_...`) and seconds (`..._s`) of `Answer.timings`, and `seconds`, the
    total; the cost of this record, so zero for a copy and different in every run. `confidence`: `mean` and `least`
    token probability of each cell ('table/row/column' from 0) or field (JSON pointer) of the value, as
    `confidence_as_json` gives them; None where the run did not ask for them, and in records of earlier versions.
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
    file_state: str | None = None
    stem: str | None = None
    error_type: str | None = None
    confidence: Mapping[str, Mapping[str, float]] | None = None

    @property
    def key(self) -> Key:
        return (self.source, self.page, self.task)

    @property
    def kind(self) -> Kind:
        """What kind of value the task gives."""
        return task_or_question(self.task).kind

    @property
    def failed(self) -> bool:
        """Whether there is no valid answer."""
        return self.error is not None or not self.valid

    @property
    def kept(self) -> str:
        """How much of a truncated answer is kept, in words; meaningless for complete answers."""
        return _KEPT[self.kind]

    @property
    def tables(self) -> list[Table]:
        """The tables of the value, including chart data; an empty list for other kinds of value."""
        if isinstance(self.value, Table):
            return [self.value]
        return [item for item in self.value if isinstance(item, Table)] if isinstance(self.value, list) else []

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON data: tables in the form of `tables_json`, chart data as rows, the header first."""
        content = {name: getattr(self, name) for name in _TYPES}  # asdict would recurse into thousands of cells
        return {**content, "value": _value_as_json(self.value)}

    @classmethod
    def from_dict(cls, content: Any) -> Record:
        """Returns the record that `as_dict` was called on; raises ValueError, KeyError, TypeError or AnswerError for
        anything else."""
        if not isinstance(content, Mapping):
            raise TypeError(f"it is {content!r:.40}")
        for name, value in content.items():
            if not isinstance(value, _TYPES[name]):
                raise TypeError(f"'{name}' is {value!r:.40}")
        size_px = content["size_px"]
        return cls(
            **{
                **content,
                "warnings": tuple(content["warnings"]),
                "size_px": None if size_px is None else (size_px[0], size_px[1]),
                "value": _value_from_json(content["task"], content["value"]),
            }
        )


# types of the JSON data, in the order of the fields
_TYPES: dict[str, Any] = {
    "source": str,
    "page": int | None,
    "n_pages": int | None,
    "task": str,
    "size_px": list | tuple | None,
    "dpi": float | int | None,
    "digest": str | None,
    "prompt_sha256": str,
    "schema_sha256": str | None,
    "model": Mapping,
    "text": str,
    "value": object,
    "valid": bool,
    "validity_error": str | None,
    "salvaged": bool,
    "finish_reason": str | None,
    "copy_of": Mapping | None,
    "error": str | None,
    "warnings": list | tuple,
    "timings": Mapping,
    "file_state": str | None,
    "stem": str | None,
    "error_type": str | None,
    "confidence": Mapping | None,
}


def encode(record: Record) -> bytes:
    """Returns one line of UTF-8 JSON, including its line break. Raises ValueError for NaN and infinity, which JSON does
    not have."""
    content = record.as_dict()
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, from a file's name or a field
        return json.dumps(content, allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Record:
    """Returns the record of a line of `encode`; raises ValueError, KeyError, TypeError, RecursionError or AnswerError
    for any other line."""
    return Record.from_dict(json.loads(line, parse_constant=_refuse))


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name}, which JSON does not have")


def _value_as_json(value: Any) -> Any:
    if isinstance(value, Table):
        return value.texts()
    if isinstance(value, list) and value and all(isinstance(item, Table) for item in value):
        return json.loads(write_tables_json_list(value))
    return value


def _value_from_json(task: str, value: Any) -> Any:
    kind = task_or_question(task).kind
    if kind == "chart" and value is not None:
        return _chart(value)
    if kind == "tables" and value is not None:
        return read_tables_json(json.dumps(value))
    return value


def _chart(rows: Sequence[Sequence[str]]) -> Table:
    cells = [Cell(i, j, text) for i, row in enumerate(rows) for j, text in enumerate(row)]
    return with_header_rows(len(rows), len(rows[0]), 1, cells)
