"""Reads the records of a results folder as a pandas data frame or an Arrow table (the extras 'pandas' and 'arrow')."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from granite4v.extras import check_installed
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.results_log import ResultsLog


def read_results(folder: str | Path, *, arrow: bool = False) -> Any:
    """Returns a pandas data frame with a row for each record of a results folder and a column for each `Record` field.

    Reads only `results.jsonl` and writes nothing, so a run may be writing to the folder: of records with the same key
    the last counts, an incomplete last line is left out, and the order is that of a finished run: by document, page and
    task. `value` is as in `Record`. `arrow`: return a pyarrow.Table instead, with plain JSON values in all columns;
    nested values are JSON text.

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
        {name: pandas.Series([getattr(one, name) for one in records], dtype=_DTYPES.get(name)) for name in columns}
    )


def arrow_table(records: Iterable[Record]) -> Any:
    """Returns a pyarrow.Table with a row for each record, in the form of `read_results`."""
    import pyarrow

    columns = list(Record.__dataclass_fields__)
    rows = [{name: _plain(value) for name, value in one.as_dict().items()} for one in records]
    return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema([(name, _arrow_type(name)) for name in columns]))


_DTYPES = {
    "page": "Int64", "n_pages": "Int64", "dpi": "Float64", "valid": "bool", "salvaged": "bool",
    **dict.fromkeys(("value", "size_px", "model", "copy_of", "warnings", "timings", "confidence"), "object"),
}  # fmt: skip
_ARROW_TYPES = {"Int64": "int64", "Float64": "float64", "bool": "bool"}


def _arrow_type(name: str) -> str:
    return _ARROW_TYPES.get(_DTYPES.get(name, ""), "string")


def _plain(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else value
