"""Writes columns as Parquet files, through pyarrow (the extra 'parquet')."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from granite4v.paths import complete_file
from granite4v.runtime.formats import Table
from granite4v.runtime.formats.json_values import replace_surrogates

_ROWS = 10_000  # of a row group


def write_table(path: Path, table: Table) -> None:
    """Writes a table with all columns as text. Raises OutputError."""
    write_parquet(path, dict.fromkeys(table.column_names(), "string"), table.texts()[table.n_header_rows :])


def write_parquet(path: Path, columns: Mapping[str, str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows, complete or not at all. `columns`: pyarrow's type ('string', 'int64', 'double', 'bool') by column
    name. Raises OutputError."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in columns.items()])
    left = iter(rows)
    with complete_file(path) as partial, pyarrow.parquet.ParquetWriter(partial, schema) as file:
        while some := list(itertools.islice(left, _ROWS)):
            arrays = [
                pyarrow.array([replace_surrogates(value) for value in column], field.type)
                for column, field in zip(zip(*some, strict=True), schema, strict=True)
            ]
            file.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
