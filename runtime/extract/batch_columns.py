"""Reads the columns of a batch of documents, in any form in which pipelines pass batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from granite4v.errors import ArgumentError
from granite4v.runtime.extract.record import Record

PATHS, CONTENTS = "path", "bytes"


@dataclass(frozen=True)
class Columns:
    """The columns of a batch. `paths` and `contents`: the values of the columns 'path' and 'bytes', None for a missing
    value or a missing column. `others`: all other columns as Arrow arrays, by name."""

    n_rows: int
    paths: list[Any] | None
    contents: list[Any] | None
    others: dict[str, Any]


def columns_of(batch: Any) -> Columns:
    """Returns the columns of a dict of lists or NumPy arrays, a pandas.DataFrame, a pyarrow.Table or a RecordBatch.

    Raises ArgumentError for a batch of another type, with neither a column 'path' nor 'bytes', or with a column that
    cannot be repeated next to the records.
    """
    found = _by_name(batch)
    if PATHS not in found and CONTENTS not in found:
        raise ArgumentError(f"a batch has the columns {', '.join(found)}; expected '{PATHS}' or '{CONTENTS}'.")
    taken = [name for name in found if name in Record.__dataclass_fields__]
    if taken:
        raise ArgumentError(
            f"the batch has a column '{taken[0]}', as the records do; rename it, for instance to 'my_{taken[0]}', or "
            "leave it out."
        )
    for name, values in found.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise ArgumentError(f"the column '{name}' is {values!r:.60}; expected a list or an array of values.")
    lengths = {name: len(values) for name, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"the columns of a batch have different lengths: {lengths}; expected a value for each row.")
    return Columns(
        next(iter(lengths.values())),
        _listed(found.get(PATHS)),
        _listed(found.get(CONTENTS)),
        {name: _as_arrow(name, values) for name, values in found.items() if name not in (PATHS, CONTENTS)},
    )


def _by_name(batch: Any) -> dict[str, Any]:
    import pyarrow

    if isinstance(batch, pyarrow.Table | pyarrow.RecordBatch):
        pairs = list(zip(batch.schema.names, batch.columns, strict=True))
    elif isinstance(batch, Mapping) or _is_data_frame(batch):
        pairs = [(str(name), values) for name, values in batch.items()]
    else:
        raise ArgumentError(
            f"a batch is a {type(batch).__name__}; expected a dict of columns, a pandas.DataFrame or a pyarrow.Table."
        )
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ArgumentError(f"two columns of a batch have the same name: {', '.join(name for name, _ in pairs)}.")
    return found


def _is_data_frame(batch: Any) -> bool:
    """Does not import pandas: if there is a DataFrame, its creator has done so."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(batch, pandas.DataFrame)


def _listed(values: Any) -> list[Any] | None:
    if values is None:
        return None
    listed = values.to_pylist() if hasattr(values, "to_pylist") else list(values)  # Arrow; any other
    return [None if _is_missing(value) else value for value in listed]


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas
        return True
    return isinstance(value, Real) and math.isnan(value)  # Python or NumPy


def _as_arrow(name: str, values: Any) -> Any:
    import pyarrow

    if isinstance(values, pyarrow.Array | pyarrow.ChunkedArray):
        return values
    try:
        return pyarrow.array(values.tolist() if getattr(values, "ndim", 1) > 1 else values)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(
            f"the column '{name}' cannot be repeated beside the records, since Arrow has no type for its values "
            f"({error!s:.200}); leave it out of the batch."
        ) from None
