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
    write_parquet(path, dict.fromkeys(column_names(table), "string"), table.texts()[table.n_header_rows :])


def column_names(table: Table) -> list[str]:
    """Returns the column names of a table: the texts of its header rows, joined by ' - ', as in Markdown.

    A column without a name is called for instance 'column 3', and a duplicate name gets a number. Letter case is
    ignored, since databases ignore it.
    """
    names: list[str] = []
    taken: set[str] = set()
    header = table.texts()[: table.n_header_rows]
    for number in range(1, table.n_cols + 1):
        parts = [text for text, _ in itertools.groupby(row[number - 1] for row in header) if text]
        plain = name = replace_surrogates(" - ".join(parts)) or f"column {number}"
        n = 1
        while name.casefold() in taken:
            n += 1
            name = f"{plain} {n}"
        taken.add(name.casefold())
        names.append(name)
    return names


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
