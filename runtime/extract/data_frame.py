"""The records of a results folder as a data frame of pandas, or a table of Arrow (the extras 'pandas' and 'arrow')."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from granite4v.extras import check_installed
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.results_log import ResultsLog
from granite4v.runtime.formats.json_values import replace_surrogates


def read_results(folder: str | Path, *, arrow: bool = False) -> Any:
    """A pandas data frame with a row for each record of a results folder, and a column for each field of `Record`.

    Reads `results.jsonl` alone and writes nothing, so a run may go on meanwhile: of records with the same key the last
    counts, an unfinished last line is left out, and the order is that of a finished run: by document, page and task.
    Values are those of `Record`. A column has the same type whatever the records hold: `page` and `n_pages` Int64 and
    `dpi` Float64, with pandas.NA for what is missing; `valid` and `salvaged` bool; all others object, with None.
    `arrow`: a pyarrow.Table instead, of int64, double, bool and string, with null for what is missing; what is nested
    is JSON text, and lone surrogates are replaced.

    Raises OutputError for a folder without results and for a file that holds anything but records; Granite4vError
    where pandas or pyarrow is not installed.
    """
    check_installed("read_results", *(("pyarrow", "arrow") if arrow else ("pandas", "pandas")))
    with ResultsLog.open_to_read(Path(folder)) as log:
        records = list(log)
    if arrow:
        return arrow_table(records)
    import pandas

    columns = list(Record.__dataclass_fields__)
    return pandas.DataFrame(
        {name: pandas.Series([getattr(one, name) for one in records], dtype=_dtype(name)) for name in columns}
    )


def arrow_table(records: Iterable[Record]) -> Any:
    """A pyarrow.Table with a row for each record, as `read_results` has it."""
    import pyarrow

    columns = list(Record.__dataclass_fields__)
    types = {name: _ARROW_TYPES.get(_dtype(name), "string") for name in columns}
    rows = [
        {name: _text(value) if types[name] == "string" else value for name, value in one.as_dict().items()}
        for one in records
    ]
    return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(types.items())))


_DTYPES = {"page": "Int64", "n_pages": "Int64", "dpi": "Float64", "valid": "bool", "salvaged": "bool"}
_ARROW_TYPES = {"Int64": "int64", "Float64": "float64", "bool": "bool"}


def _dtype(name: str) -> str:
    """Of a column in pandas: never that of strings, whose missing values are true in a condition."""
    return _DTYPES.get(name, "object")


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return None if value is None else str(replace_surrogates(value))
