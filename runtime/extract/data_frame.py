"""Reads the records of a results folder as a pandas data frame or an Arrow table (the extras 'pandas' and 'arrow')."""

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
    """Returns a pandas data frame with a row for each record of a results folder and a column for each `Record` field.

    Reads only `results.jsonl` and writes nothing, so a run may be writing to the folder: of records with the same key
    the last counts, an incomplete last line is left out, and the order is that of a finished run: by document, page and
    task. Values are those of `Record`. The type of a column does not depend on the records: `page` and `n_pages` are
    Int64 and `dpi` Float64, with pandas.NA for missing values; `valid` and `salvaged` are bool; all others are object,
    with None for missing values. `arrow`: return a pyarrow.Table instead, with columns of int64, double, bool and
    string, and null for missing values; nested values are JSON text, and lone surrogates become U+FFFD.

    Raises OutputError for a folder without results and for a file that holds anything but records; Granite4vError
    if pandas or pyarrow is not installed.
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
    """Returns a pyarrow.Table with a row for each record, in the form of `read_results`."""
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
    """Returns the pandas type of a column; object for text, since the missing values of string types are truthy."""
    return _DTYPES.get(name, "object")


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return None if value is None else str(replace_surrogates(value))
