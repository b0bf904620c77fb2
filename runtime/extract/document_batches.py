"""Turns batches of documents into batches of records, for pipelines that pass columns from function to function."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from granite4v.errors import DocumentError
from granite4v.extras import check_installed
from granite4v.runtime.extract.data_frame import arrow_table
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.questions import ArgumentError
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.run import begin
from granite4v.runtime.model import Model

PATHS, CONTENTS = "path", "bytes"  # columns of a batch


def answered(batch: Mapping[str, Sequence[Any]], options: ExtractOptions, model: Model) -> Any:
    """Returns a pyarrow.Table of the records about a batch of documents.

    Reads the file contents in the column `bytes`, named by the column `path`, or by row number without one. If there is
    no column `bytes`, reads the paths and URLs in `path`. Raises ArgumentError for a batch with neither.
    """
    check_installed("a batch of documents", "pyarrow", "arrow")
    if CONTENTS not in batch and PATHS not in batch:
        raise ArgumentError(f"a batch has the columns {', '.join(batch)}; expected '{PATHS}' or '{CONTENTS}'.")
    paths = [str(path) for path in batch.get(PATHS, ())]
    if CONTENTS not in batch:
        return arrow_table(_records(paths, options, model))
    contents = batch[CONTENTS]
    names = paths or [f"row {place}" for place in range(1, len(contents) + 1)]
    with tempfile.TemporaryDirectory(prefix="granite4v-") as folder:
        called = {}
        for place, (name, content) in enumerate(zip(names, contents, strict=True)):
            path = Path(folder) / str(place)
            path.write_bytes(content)
            called[str(path)] = name
        found = _records(list(called), options, model)
        return arrow_table([_renamed(record, called) for record in found])


def _records(paths: list[str], options: ExtractOptions, model: Model) -> list[Record]:
    if not paths:
        return []
    try:
        run = begin(paths, options, model=model)
    except DocumentError as error:  # nothing to read in any of the paths, which must not end a pipeline
        if len(paths) > 1:
            return [record for path in paths for record in _records([path], options, model)]
        kind = type(error).__name__
        return [Record(paths[0], None, None, task, error=str(error), error_type=kind) for task in options.tasks]
    with run:
        return list(run)


def _renamed(record: Record, called: Mapping[str, str]) -> Record:
    """Returns `record` with the document's own name in place of the temporary path, also in the error message."""
    name = called[record.source]
    error = None if record.error is None else record.error.replace(record.source, name)
    copy = None if record.copy_of is None else {**record.copy_of, "source": called[record.copy_of["source"]]}
    return replace(record, source=name, error=error, copy_of=copy, file_state=None)


def cores() -> int | None:
    """Returns how many cores OMP_NUM_THREADS, which Ray sets, leaves to this process; None for all."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) else None
