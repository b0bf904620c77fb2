"""Batches of documents to batches of records, for pipelines that hand columns from function to function."""

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
    """A pyarrow.Table of the records about a batch: of the files in its column `bytes`, which are called what its
    column `path` says, or else of the paths and URLs in that column. Raises ArgumentError for a batch with neither."""
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
    except DocumentError as error:  # none of the files is there, which is no reason to end a pipeline
        if len(paths) > 1:
            return [record for path in paths for record in _records([path], options, model)]
        kind = type(error).__name__
        return [Record(paths[0], None, None, task, error=str(error), error_type=kind) for task in options.tasks]
    with run:
        return list(run)


def _renamed(record: Record, called: Mapping[str, str]) -> Record:
    """`record` about a document by its own name, which messages have as well."""
    name = called[record.source]
    error = None if record.error is None else record.error.replace(record.source, name)
    copy = None if record.copy_of is None else {**record.copy_of, "source": called[record.copy_of["source"]]}
    return replace(record, source=name, error=error, copy_of=copy, file_state=None)


def cores() -> int | None:
    """Those that Ray, or whoever sets OMP_NUM_THREADS, leaves this process; None for all."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) else None
