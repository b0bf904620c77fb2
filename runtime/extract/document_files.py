"""Writes the files of one document: its tables in the formats that were asked for, its fields, its code and prose.

Records are read and written one at a time, so a long document takes no more memory than a short one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from granite4v.errors import AnswerError, Granite4vError, OutputError
from granite4v.paths import FileOutputError, atomic_text_file, disk_errors, is_regular_file
from granite4v.runtime.extract.own_files import make_folders
from granite4v.runtime.extract.record import Record
from granite4v.runtime.formats import TASKS, Table, write
from granite4v.runtime.formats.tasks import QUESTION, task_or_question

TABLE_FORMATS = {"csv": "csv", "html": "html", "json": "json", "otsl": "otsl", "md": "markdown"}  # suffix: format
DOCLING = "docling"
FORMATS = (*TABLE_FORMATS, DOCLING)
# what is written before the first table, between two, and after the last
_FRAMES = {
    "html": ("", "\n", "\n"),
    "md": ("", "\n\n", "\n"),
    "otsl": ("", "\n", "\n"),
    "json": ("[\n", ",\n", "\n]\n"),
}
Say = Callable[[str], None]


def suffixes(task: str, formats: Sequence[str]) -> tuple[str, ...]:
    """Suffixes of the files of a task: the formats that were asked for if it gives tables, else that of its answers."""
    found = task_or_question(task)
    if formats and found.gives_tables:
        return tuple(name for name in formats if name in TABLE_FORMATS)
    return (found.suffix,)


def applies(format_name: str, tasks: Sequence[str]) -> bool:
    """Whether a format means anything for one of these tasks."""
    found = [task_or_question(task) for task in tasks]
    return format_name == DOCLING or any(task.gives_tables or task.suffix == format_name for task in found)


@dataclass
class Written:
    """The files of a document, and how many more could not be written."""

    paths: list[Path] = field(default_factory=list)
    n_failed: int = 0


def write_document(
    root: Path, stem: str, records: Iterable[Record], formats: Sequence[str], say: Say, *, csv_safe: bool = False
) -> Written:
    """Writes `stem.task.suffix` below `root` for every task with a value, each file complete or not at all.

    `formats`: of FORMATS, for tables; none for the format each task answers in. CSV has a file for each table;
    `csv_safe` writes it for spreadsheets, see `spreadsheet_text`. `say` gets a line about a table that a format cannot
    carry, and about a file that cannot be written. Raises OutputError when no other file could be written either.
    """
    writers: dict[tuple[str, str], _Writer] = {}
    with contextlib.ExitStack() as files:
        for record in records:
            if record.value is None:
                continue
            for suffix in suffixes(record.task, formats):
                if (record.task, suffix) not in writers:
                    place = _Place(root, f"{stem}.{record.task}", suffix, files.enter_context(contextlib.ExitStack()))
                    writers[record.task, suffix] = _writer(place, record, csv_safe)
                writer = writers[record.task, suffix]
                if not writer.place.failed:
                    _attempt(writer, functools.partial(writer.add, record), say, record)
        for writer in writers.values():
            if not writer.place.failed:
                _attempt(writer, writer.finish, say)
    places = [writer.place for writer in writers.values()]
    paths = [path for place in places if not place.failed for path in place.paths]
    return Written(paths, sum(place.failed for place in places))


def _attempt(writer: _Writer, step: Callable[[], None], say: Say, record: Record | None = None) -> None:
    """Does one step for one kind of file; an error in it is reported, and other files go on."""
    place = writer.place
    try:
        step()
        return
    except AnswerError as error:
        if record is not None:
            say(f"{record.source}, page {record.page}: {record.task} has no .{place.suffix}: {error}")
            return
        problem: Exception = error
    except Exception as error:
        if isinstance(error, OutputError) and not isinstance(error, FileOutputError):
            raise
        problem = error
    place.failed = True
    place.files.__exit__(type(problem), problem, None)
    say(f"'{place.stem}.{place.suffix}' is not written: {described(problem)}")


def remove_stale(root: Path, stem: str, keep: Iterable[Path]) -> None:
    """Removes files that an earlier state of the document left, other than `keep`. Raises OutputError."""
    folder, kept = (root / stem).parent, {path.name for path in keep}
    known = (*TASKS.values(), QUESTION)
    tasks = "|".join(re.escape(task.name) for task in known)
    endings = "|".join(sorted({*TABLE_FORMATS, *(task.suffix for task in known)}))
    ours = re.compile(
        rf"{re.escape(Path(stem).name)}\.(({tasks})(\.page\d+)?(-\d+)?\.({endings})|{re.escape(DOCLING)}\.json)"
    )
    if not folder.is_dir():
        return
    with disk_errors(folder):
        for path in folder.iterdir():
            if ours.fullmatch(path.name) and path.name not in kept and is_regular_file(path):
                path.unlink(missing_ok=True)


def described(error: BaseException) -> str:
    """What went wrong, for a person; errors that are not ours with their type."""
    if isinstance(error, Granite4vError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there was not enough memory; close other programs, or use a machine with more."
    if isinstance(error, RecursionError):
        return "it is nested too deeply."
    return f"an unexpected {type(error).__name__}: {str(error)[:300]}; please report it."


_NUMBER = re.compile(r"[+-]?\d+([.,'\s]\d+)*%?")


def spreadsheet_text(text: str) -> str:
    """The text of a cell, with an apostrophe before what a spreadsheet could take for a formula. Plain
    numbers, which may begin with a sign, stay as they are."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not _NUMBER.fullmatch(text) else text


def as_text(record: Record, suffix: str | None = None) -> str:
    """What was read, as one text: tables in the format of `suffix`, or the task's own."""
    suffix = suffix or task_or_question(record.task).suffix
    if record.tables:
        tables = record.value if isinstance(record.value, Table) else record.tables
        return write(tables, TABLE_FORMATS[suffix])
    if isinstance(record.value, str):
        return record.value
    return json.dumps(record.value, indent=2, ensure_ascii=False)


@dataclass
class _Place:
    """Where the files of one kind go. Those that were opened take their names when `files` is closed."""

    root: Path
    stem: str
    suffix: str
    files: contextlib.ExitStack
    paths: list[Path] = field(default_factory=list)
    failed: bool = False

    def path(self, part: str = "") -> Path:
        name = Path(f"{self.stem}{part}.{self.suffix}")
        path = make_folders(self.root, str(name.parent)) / name.name
        self.paths.append(path)
        return path

    def open(self) -> TextIO:
        return self.files.enter_context(atomic_text_file(self.path()))


class _Writer:
    """One kind of file of one task."""

    def __init__(self, place: _Place) -> None:
        self.place = place

    def add(self, record: Record) -> None:
        raise NotImplementedError

    def end(self) -> None:
        pass

    def finish(self) -> None:
        with self.place.files:
            self.end()


class _CsvFiles(_Writer):
    """A file for each table: no program reads two tables of different widths from one CSV file."""

    def __init__(self, place: _Place, safe: bool) -> None:
        super().__init__(place)
        self._safe = safe

    def add(self, record: Record) -> None:
        page = "" if record.n_pages == 1 else f".page{record.page}"
        tables = record.tables
        for number, table in enumerate(tables, 1):
            if self._safe:
                cells = tuple(replace(cell, text=spreadsheet_text(cell.text)) for cell in table.cells)
                table = replace(table, cells=cells)
            text = write(table, "csv")
            path = self.place.path(f"{page}{'' if len(tables) == 1 else f'-{number}'}")
            with atomic_text_file(path) as file:  # at once: a long document would have thousands open
                file.write(("\ufeff" if self._safe else "") + text + "\n")


class _TablesFile(_Writer):
    """All tables of a document in one file."""

    def __init__(self, place: _Place) -> None:
        super().__init__(place)
        self._head, self._between, self._tail = _FRAMES[place.suffix]
        self._file: TextIO | None = None
        self._any = False

    def add(self, record: Record) -> None:
        if self._file is None:
            self._file = self.place.open()
            self._file.write(self._head)
        for table in record.tables:
            text = write(table, TABLE_FORMATS[self.place.suffix])
            self._file.write((self._between if self._any else "") + text)
            self._any = True

    def end(self) -> None:
        if self._file is not None:
            self._file.write(self._tail)


class _FieldsFile(_Writer):
    """The fields of a page, or of each page in a list that says which."""

    def __init__(self, place: _Place, single: bool) -> None:
        super().__init__(place)
        self._single = single
        self._file: TextIO | None = None

    def add(self, record: Record) -> None:
        text = _json(record.value if self._single else {"page": record.page, "fields": record.value})
        first = self._file is None
        self._file = self._file or self.place.open()
        self._file.write(text if self._single else ("[\n" if first else ",\n") + text)

    def end(self) -> None:
        if self._file is not None:
            self._file.write("\n" if self._single else "\n]\n")


class _TextFile(_Writer):
    """Code or prose, page after page."""

    def __init__(self, place: _Place, single: bool) -> None:
        super().__init__(place)
        self._heading = "" if single else "# page {}\n\n" if place.suffix == "py" else "## Page {}\n\n"
        self._file: TextIO | None = None

    def add(self, record: Record) -> None:
        between = "\n" if self._file is not None else ""
        self._file = self._file or self.place.open()
        self._file.write(f"{between}{self._heading.format(record.page)}{record.value}\n")


def _writer(place: _Place, record: Record, csv_safe: bool) -> _Writer:
    single = record.n_pages == 1
    if task_or_question(record.task).gives_tables:
        return _CsvFiles(place, csv_safe) if place.suffix == "csv" else _TablesFile(place)
    return _FieldsFile(place, single) if place.suffix == "json" else _TextFile(place, single)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
