"""The files of one document: its tables in the forms that were asked for, its fields, its code and prose.

A document's records are read one after another and written as they come, so its length costs no memory.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from granite4v.errors import AnswerError
from granite4v.runtime.extraction.durable import whole_file
from granite4v.runtime.extraction.record import CHART, TABLES, Record
from granite4v.runtime.outputs import Table, write

TABLE_FORMATS = {"csv": "csv", "html": "html", "json": "json", "otsl": "otsl", "md": "markdown"}  # suffix: form
DOCLING = "docling"
FORMATS = (*TABLE_FORMATS, DOCLING)
NATIVE = {
    CHART: "csv",
    "tables_html": "html",
    "tables_json": "json",
    "tables_otsl": "otsl",
    "kvp": "json",
    "chart2code": "py",
}
PROSE = "md"
MAX_NAME_BYTES = 100
# what stands before the first table, between two, and behind the last
_FRAMES = {
    "html": ("", "\n", "\n"),
    "md": ("", "\n\n", "\n"),
    "otsl": ("", "\n", "\n"),
    "json": ("[\n", ",\n", "\n]\n"),
}
Say = Callable[[str], None]


class Names:
    """Names for documents, made from their paths: fit for any disk, and no two the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._names: dict[str, str] = {}

    def name(self, source: str) -> str:
        """The same name for the same path."""
        if source not in self._names:
            self._names[source] = self._new_name(source)
        return self._names[source]

    def _new_name(self, source: str) -> str:
        stem = Path(source.rstrip("/\\")).stem if source not in ("", "-") else "stdin"
        plain = re.sub(r"[^\w.+-]+", "_", stem).strip("._") or "document"
        plain = plain.encode("utf-8", "replace")[:MAX_NAME_BYTES].decode("utf-8", "ignore")
        found, n = plain, 1
        while found.casefold() in self._taken:
            n += 1
            found = f"{plain}-{n}"
        self._taken.add(found.casefold())
        return found


def suffixes(task: str, formats: Sequence[str]) -> tuple[str, ...]:
    """What files a task becomes: those asked for where it gives tables, else its own kind."""
    if formats and (task in TABLES or task == CHART):
        return tuple(name for name in formats if name in TABLE_FORMATS)
    return (NATIVE.get(task, PROSE),)


def write_document(folder: Path, name: str, records: Iterable[Record], formats: Sequence[str], say: Say) -> list[Path]:
    """Writes `name.task.suffix` for every task with a value, each file whole or not at all; returns their paths.

    `formats`: of FORMATS, for tables; none for the form each task answers in. CSV has a file for each table. `say`
    gets a line about a table that a form cannot carry. Raises OutputError.
    """
    writers: dict[tuple[str, str], _Writer] = {}
    with contextlib.ExitStack() as files:
        for record in records:
            if record.value is None:
                continue
            for suffix in suffixes(record.task, formats):
                if (record.task, suffix) not in writers:
                    writers[record.task, suffix] = _writer(folder, f"{name}.{record.task}", suffix, record, files)
                try:
                    writers[record.task, suffix].add(record)
                except AnswerError as error:
                    say(f"{record.source}, page {record.page}: {record.task} has no .{suffix}: {error}")
        for writer in writers.values():
            writer.end()
    return [path for writer in writers.values() for path in writer.paths]


def as_text(record: Record, suffix: str | None = None) -> str:
    """What was read, as one text: tables in the form of `suffix`, or the task's own."""
    suffix = suffix or NATIVE.get(record.task, PROSE)
    if record.tables:
        tables = record.value if isinstance(record.value, Table) else record.tables
        return write(tables, TABLE_FORMATS[suffix])
    if isinstance(record.value, str):
        return record.value
    return json.dumps(record.value, indent=2, ensure_ascii=False)


class _Writer:
    """One kind of file of one task. Whatever it opens goes into place when `files` is closed."""

    def __init__(self, folder: Path, stem: str, suffix: str, files: contextlib.ExitStack) -> None:
        self._folder, self._stem, self._suffix, self._files = folder, stem, suffix, files
        self.paths: list[Path] = []

    def open(self, part: str = "") -> TextIO:
        path = self._folder / f"{self._stem}{part}.{self._suffix}"
        self.paths.append(path)
        return self._files.enter_context(whole_file(path))

    def add(self, record: Record) -> None:
        raise NotImplementedError

    def end(self) -> None:
        pass


class _CsvFiles(_Writer):
    """A file for each table: no program reads two tables of different widths from one."""

    def add(self, record: Record) -> None:
        page = "" if record.n_pages == 1 else f".page{record.page}"
        tables = record.tables
        for number, table in enumerate(tables, 1):
            text = write(table, "csv")
            path = self._folder / f"{self._stem}{page}{'' if len(tables) == 1 else f'-{number}'}.csv"
            with whole_file(path) as file:  # at once: a long document would have thousands open
                file.write(text + "\n")
            self.paths.append(path)


class _TablesFile(_Writer):
    """All tables of a document in one file."""

    def __init__(self, folder: Path, stem: str, suffix: str, files: contextlib.ExitStack) -> None:
        super().__init__(folder, stem, suffix, files)
        self._head, self._between, self._tail = _FRAMES[suffix]
        self._file: TextIO | None = None
        self._any = False

    def add(self, record: Record) -> None:
        if self._file is None:
            self._file = self.open()
            self._file.write(self._head)
        for table in record.tables:
            text = write(table, TABLE_FORMATS[self._suffix])
            self._file.write((self._between if self._any else "") + text)
            self._any = True

    def end(self) -> None:
        if self._file is not None:
            self._file.write(self._tail)


class _FieldsFile(_Writer):
    """The fields of a page, or of each page in a list that says which."""

    def __init__(self, folder: Path, stem: str, suffix: str, files: contextlib.ExitStack, single: bool) -> None:
        super().__init__(folder, stem, suffix, files)
        self._single = single
        self._file: TextIO | None = None

    def add(self, record: Record) -> None:
        first = self._file is None
        self._file = self._file or self.open()
        if self._single:
            self._file.write(_json(record.value))
        else:
            self._file.write("[\n" if first else ",\n")
            self._file.write(_json({"page": record.page, "fields": record.value}))

    def end(self) -> None:
        if self._file is not None:
            self._file.write("\n" if self._single else "\n]\n")


class _TextFile(_Writer):
    """Code or prose, page after page."""

    def __init__(self, folder: Path, stem: str, suffix: str, files: contextlib.ExitStack, single: bool) -> None:
        super().__init__(folder, stem, suffix, files)
        self._heading = "" if single else "# page {}\n\n" if suffix == "py" else "## Page {}\n\n"
        self._file: TextIO | None = None

    def add(self, record: Record) -> None:
        between = "\n" if self._file is not None else ""
        self._file = self._file or self.open()
        self._file.write(f"{between}{self._heading.format(record.page)}{record.value}\n")


def _writer(folder: Path, stem: str, suffix: str, record: Record, files: contextlib.ExitStack) -> _Writer:
    single = record.n_pages == 1
    if record.task in TABLES or record.task == CHART:
        kind = _CsvFiles if suffix == "csv" else _TablesFile
        return kind(folder, stem, suffix, files)
    if suffix == "json":
        return _FieldsFile(folder, stem, suffix, files, single)
    return _TextFile(folder, stem, suffix, files, single)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
