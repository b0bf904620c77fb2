"""The records of a results folder as a data frame of pandas, or a table of Arrow (the extras 'pandas' and 'arrow')."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from granite4v.errors import Granite4vError, OutputError
from granite4v.paths import disk_errors
from granite4v.runtime.extract.output_directory import RESULTS
from granite4v.runtime.extract.record import Key, Record, decode
from granite4v.runtime.extract.results_log import NOT_OURS


def read_results(folder: str | Path, *, arrow: bool = False) -> Any:
    """A pandas data frame with a row for each record of a results folder, and a column for each field of `Record`.

    Reads `results.jsonl` alone and writes nothing, so a run may go on meanwhile: of records with the same key the last
    counts, in the place of the first, and an unfinished last line is left out. `value` is as in `Record`. `arrow`: a
    pyarrow.Table instead, all of whose columns are JSON's plain values; what is nested is JSON text.

    Raises OutputError for a folder without results and for a file that holds anything but records; Granite4vError
    where pandas or pyarrow is not installed.
    """
    extra, needed = ("arrow", ("pandas", "pyarrow")) if arrow else ("pandas", ("pandas",))
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise Granite4vError(f"read_results needs {name}; install it with pip install 'granite4v[{extra}]'.")
    import pandas

    records = _read(Path(folder) / RESULTS)
    columns = list(Record.__dataclass_fields__)
    if not arrow:
        return pandas.DataFrame(
            {name: pandas.Series([getattr(one, name) for one in records], dtype=_DTYPES.get(name)) for name in columns}
        )
    import pyarrow

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


def _read(path: Path) -> list[Record]:
    if not path.is_file():
        raise OutputError(f"there is no '{path}'; expected the folder that 'granite4v extract' was given by --out.")
    found: dict[Key, Record] = {}
    with disk_errors(path), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = decode(line)
            except NOT_OURS as error:
                raise OutputError(
                    f"line {number} of '{path}' is not a record of ours ({type(error).__name__}: {error!s:.80}); "
                    "the file was changed by something else."
                ) from None
            found[record.key] = record
    return list(found.values())
