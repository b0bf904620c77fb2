"""Turns batches of documents into batches of records, for pipelines that pass columns from function to function."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from granite4v.clip_projector.files import printable
from granite4v.errors import DocumentError
from granite4v.extras import check_installed
from granite4v.runtime.documents.sources import STDIN, Document, NotFound, find_documents
from granite4v.runtime.extract.batch_columns import CONTENTS, PATHS, columns_of
from granite4v.runtime.extract.data_frame import arrow_table
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.run import begin
from granite4v.runtime.model import Model


@dataclass(frozen=True)
class _Rows:
    """The documents of a batch. `documents`: for each row the sources of its documents, or the errors of those that
    were not found. `inputs`: the input to read, by source. `called`: names to use instead of sources."""

    documents: list[list[str | NotFound]]
    inputs: dict[str, str]
    called: Mapping[str, str]


def answered(batch: Any, options: ExtractOptions, model: Model) -> Any:
    """Returns a pyarrow.Table of the records about a batch of documents.

    Reads the file contents in the column `bytes`, named by the column `path`, or by row number without a path. If there
    is no column `bytes`, reads the paths and URLs in `path`. Repeats other columns next to the records of their row. A
    document that occurs in several rows is read once, and each of these rows gets its records.

    Raises ArgumentError for a batch that `columns_of` rejects.
    """
    check_installed("a batch of documents", "pyarrow", "arrow")
    import pyarrow

    columns = columns_of(batch)
    with tempfile.TemporaryDirectory(prefix="granite4v-") as folder:
        if columns.contents is None:
            rows = _named(columns.paths or [])
        else:
            rows = _written(columns.contents, columns.paths or [None] * columns.n_rows, Path(folder))
        read = _read(rows, options, model)
    records: list[Record] = []
    places: list[int] = []
    for place, documents in enumerate(rows.documents):
        for one in documents:
            found = _failed(one, options) if isinstance(one, NotFound) else read[one]
            records += found
            places += [place] * len(found)
    table = arrow_table(records)
    for name, values in columns.others.items():
        table = table.append_column(name, values.take(pyarrow.array(places, pyarrow.int64())))
    return table


def _named(paths: Sequence[Any]) -> _Rows:
    """Finds documents by path or URL; a directory or a glob may be several documents."""
    rows = _Rows([], {}, {})
    sources: dict[str, str] = {}  # by a document's identity, as in `find_documents`
    note = logging.getLogger("granite4v").info
    for number, path in enumerate(paths, 1):
        try:
            found = find_documents([_checked(path, number)], note)
        except DocumentError as error:
            found = [NotFound(_called(path, number), error)]
        documents: list[str | NotFound] = []
        for item in found:
            if isinstance(item, Document):
                source = sources.setdefault(
                    item.source if item.path is None else os.path.realpath(item.path), item.source
                )
                rows.inputs.setdefault(source, _input(item))
                documents.append(source)
            else:
                documents.append(item)
        rows.documents.append(documents)
    return rows


def _is_empty(name: Any) -> bool:
    return name is None or (isinstance(name, str) and not name)


def _called(name: Any, number: int) -> str:
    """Returns the name of a row's document in records."""
    if _is_empty(name):
        return f"row {number}"
    return printable(os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name))


def _checked(path: Any, number: int) -> str:
    """Returns the path or URL of a row as text. Raises DocumentError for any other value."""
    if _is_empty(path):
        raise DocumentError(f"row {number} of the batch has no '{PATHS}'; expected a path or a URL.")
    if not isinstance(path, str | os.PathLike):
        raise DocumentError(
            f"row {number} of the batch has the '{PATHS}' {path!r:.60}; expected a path or a URL, as text."
        )
    text = os.fsdecode(path)
    if text == STDIN:
        raise DocumentError(
            f"row {number} of the batch has the '{PATHS}' '-', standard input, which is not a pipeline's to read; "
            "expected a path or a URL."
        )
    return text


def _input(document: Document) -> str:
    """Returns the input that `begin` resolves to exactly this document."""
    if document.remote is not None:
        return document.remote.url
    path = str(document.path)
    return f"./{path}" if path == STDIN else path


def _written(contents: Sequence[Any], names: Sequence[Any], folder: Path) -> _Rows:
    """Writes the contents of documents as files into a folder."""
    called: dict[str, str] = {}
    documents: list[list[str | NotFound]] = []
    for number, (content, given) in enumerate(zip(contents, names, strict=True), 1):
        name = _called(given, number)
        if not isinstance(content, bytes | bytearray | memoryview):
            has = "nothing" if content is None else f"a value of type {type(content).__name__}"
            error = DocumentError(f"'{name}' has {has} in the column '{CONTENTS}'; expected the content of a file.")
            documents.append([NotFound(name, error)])
            continue
        path = folder / str(number)
        path.write_bytes(content)
        called[str(path)] = name
        documents.append([str(path)])
    return _Rows(documents, {path: path for path in called}, called)


def _read(rows: _Rows, options: ExtractOptions, model: Model) -> dict[str, list[Record]]:
    """Returns the records of each source."""
    if not rows.inputs:
        return {}
    read: dict[str, list[Record]] = {}
    try:
        with begin(list(rows.inputs.values()), options, model=model) as run:
            for record in run:
                read.setdefault(record.source, []).append(_renamed(record, rows.called))
    except DocumentError as error:  # no file is left to read
        return {source: _failed(NotFound(source, error), options) for source in rows.inputs}
    for source in rows.inputs.keys() - read.keys():
        replaced = DocumentError(f"'{source}' was replaced while the batch was read; read it again.")
        read[source] = _failed(NotFound(source, replaced), options)
    return read


def _failed(missing: NotFound, options: ExtractOptions) -> list[Record]:
    """Returns a record with the error for each task."""
    kind = type(missing.error).__name__
    return [
        Record(missing.source, None, None, task, error=str(missing.error), error_type=kind) for task in options.tasks
    ]


def _renamed(record: Record, called: Mapping[str, str]) -> Record:
    """Returns `record` with the document's own name in place of the temporary path, also in the error message."""
    if record.source not in called:
        return record
    name = called[record.source]
    error = None if record.error is None else record.error.replace(record.source, name)
    copy = None if record.copy_of is None else {**record.copy_of, "source": called[record.copy_of["source"]]}
    return replace(record, source=name, error=error, copy_of=copy, file_state=None)


def cores() -> int | None:
    """Returns how many cores OMP_NUM_THREADS, which Ray sets, leaves to this process; None for all."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) else None
