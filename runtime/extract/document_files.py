"""Writes the files of one document: its tables in the requested formats, its fields, its code and prose.

Records are read and written one at a time, so a long document takes no more memory than a short one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from granite4v.errors import AnswerError, Granite4vError, OutputError
from granite4v.extras import check_installed
from granite4v.paths import FileOutputError, atomic_text_file, disk_errors, is_regular_file
from granite4v.runtime.extract import docling_export
from granite4v.runtime.extract.fields_table import FORMATS as FIELDS_FORMATS
from granite4v.runtime.extract.fields_table import write_fields_table
from granite4v.runtime.extract.own_files import make_folders
from granite4v.runtime.extract.parquet import write_table
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.workbook import Workbook
from granite4v.runtime.formats import TASKS, Table, write
from granite4v.runtime.formats.tasks import QUESTION, task_or_question

TABLE_FORMATS = {"csv": "csv", "html": "html", "json": "json", "otsl": "otsl", "md": "markdown"}  # suffix: format
PARQUET, XLSX, DOCLING = "parquet", "xlsx", "docling"
FORMATS = (*TABLE_FORMATS, PARQUET, XLSX, DOCLING)
WORKBOOK = "tables"  # in place of a task's name: one workbook holds a document's tables of all tasks
# the package that a format needs, and the extra that installs it
_NEEDED = {PARQUET: ("pyarrow", "parquet"), XLSX: ("openpyxl", "xlsx"), DOCLING: ("docling-core", "docling")}
# what is written before the first table, between two, and after the last
_FRAMES = {
    "html": ('<meta charset="utf-8">\n', "\n", "\n"),  # without it, lxml and pandas read Latin-1
    "md": ("", "\n\n", "\n"),
    "otsl": ("", "\n", "\n"),
    "json": ("[\n", ",\n", "\n]\n"),
}
Say = Callable[[str], None]


class AboutResult(str):
    """A message to `say` about a result that is missing or not as requested. Plain strings are notes."""


def suffixes(task: str, formats: Sequence[str]) -> tuple[str, ...]:
    """Returns the suffixes of a document's files for a task: the requested formats, except docling, if the task gives
    tables, else the suffix of its answers."""
    found = task_or_question(task)
    if formats and found.gives_tables:
        return tuple(name for name in formats if name != DOCLING)
    return (found.suffix,)


def applies(format_name: str, tasks: Sequence[str]) -> bool:
    """Whether a format applies to at least one of these tasks."""
    found = [task_or_question(task) for task in tasks]
    return format_name == DOCLING or any(
        task.gives_tables or task.suffix == format_name or (task.kind == "fields" and format_name in FIELDS_FORMATS)
        for task in found
    )


def needs_folder(format_name: str, tasks: Sequence[str]) -> bool:
    """Whether a format exists only as files for these tasks, so that nothing could be printed."""
    found = [task_or_question(task) for task in tasks]
    return format_name in _NEEDED or not any(task.gives_tables or task.suffix == format_name for task in found)


def check_formats_installed(formats: Sequence[str]) -> None:
    """Raises Granite4vError, which says what to install, for a format whose extra is missing."""
    for name in formats:
        if name in _NEEDED:
            check_installed(f"the format '{name}'", *_NEEDED[name])


@dataclass
class Written:
    """The files that were written, and how many could not be, or lack a table that their format cannot represent."""

    paths: list[Path] = field(default_factory=list)
    n_failed: int = 0

    @contextlib.contextmanager
    def one_file(self, failed: str, say: Say) -> Iterator[None]:
        """Reports an error that concerns only one file, and goes on. Raises OutputError if it concerns the disk."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OutputError) and not isinstance(error, FileOutputError):
                raise
            self.n_failed += 1
            say(AboutResult(f"{failed}: {described(error)}"))


@dataclass(frozen=True)
class Form:
    """The form in which files are written. `formats`: of FORMATS, for tables and fields; empty for the format that each
    task answers in. `csv_safe`: write CSV for spreadsheets, see `spreadsheet_text`. `alone`: write only `formats`;
    otherwise a task without any of them gets a file in its own format."""

    formats: Sequence[str] = ()
    csv_safe: bool = False
    alone: bool = False


def write_document(
    root: Path, stem: str, source: str, records: Callable[[], Iterable[Record]], form: Form, say: Say
) -> Written:
    """Writes all files of a document below `root`: those of `write_answers`, and a DoclingDocument if requested."""
    written = write_answers(root, stem, records(), form, say)
    if DOCLING in form.formats:
        with written.one_file(f"'{stem}.{docling_export.SUFFIX}' is not written", say):
            path = docling_export.write_docling(root, stem, source, records())
            written.paths += [path] if path is not None else []
    return written


def write_fields(
    root: Path, records: Callable[[], Iterable[Record]], tasks: Iterable[str], form: Form, say: Say
) -> Written:
    """Writes `task.suffix` below `root`, one table of all pages of all documents, for every task that gives fields: in
    each of FIELDS_FORMATS that was requested, or whose file exists already and would otherwise be outdated. A CSV file
    that is only brought up to date stays safe for spreadsheets if it was."""
    written = Written()
    for task in tasks:
        for suffix in FIELDS_FORMATS if task_or_question(task).kind == "fields" else ():
            path = root / f"{task}.{suffix}"
            if suffix in form.formats or is_regular_file(path):
                with written.one_file(f"'{path}' is not written", say):
                    check_formats_installed([suffix])
                    is_safe = form.csv_safe or (suffix not in form.formats and is_csv_safe(path))
                    write_fields_table(path, task, records, spreadsheet_text if is_safe else None)
                    written.paths.append(path)
    return written


def write_answers(root: Path, stem: str, records: Iterable[Record], form: Form, say: Say) -> Written:
    """Writes `stem.task.suffix` below `root` for every task with a value, each file complete or not at all.

    CSV and Parquet have a file for each table. `say` gets a line about each table that a format cannot represent, and
    about each file that cannot be written. Raises OutputError if no other file could be written either.
    """
    writers: dict[tuple[str, str], _Writer] = {}
    with contextlib.ExitStack() as files:
        for record in records:
            if record.value is None:
                continue
            for suffix in suffixes(record.task, form.formats):
                if form.alone and suffix not in form.formats:
                    continue
                what = WORKBOOK if suffix == XLSX else record.task
                if (what, suffix) not in writers:
                    place = _Place(root, f"{stem}.{what}", suffix, files.enter_context(contextlib.ExitStack()))
                    writers[what, suffix] = _writer(place, record, form.csv_safe)
                writer = writers[what, suffix]
                if not writer.place.failed:
                    _attempt(writer, functools.partial(writer.add, record), say, record)
        for writer in writers.values():
            if not writer.place.failed:
                _attempt(writer, writer.finish, say)
    places = [writer.place for writer in writers.values()]
    paths = [path for place in places if not place.failed for path in place.paths]
    return Written(paths, sum(place.failed or place.n_missing for place in places))


def _attempt(writer: _Writer, step: Callable[[], None], say: Say, record: Record | None = None) -> None:
    """Runs one step of a writer. Reports an error that concerns only its table or file, so that the others go on."""
    place = writer.place
    try:
        step()
        return
    except AnswerError as error:
        if record is not None:
            place.n_missing += 1
            say(AboutResult(f"{record.source}, page {record.page}: {record.task} has no .{place.suffix}: {error}"))
            return
        problem: Exception = error
    except Exception as error:
        if isinstance(error, OutputError) and not isinstance(error, FileOutputError):
            raise
        problem = error
    place.failed = True
    place.files.__exit__(type(problem), problem, None)
    say(AboutResult(f"'{place.stem}.{place.suffix}' is not written: {described(problem)}"))


def remove_stale(root: Path, stem: str, keep: Iterable[Path], formats: Sequence[str] = FORMATS) -> None:
    """Removes files of earlier states of the document, except `keep`; only those of `formats`, if given. Raises
    OutputError."""
    folder, kept = (root / stem).parent, {path.name for path in keep}
    known = (*TASKS.values(), QUESTION)
    tasks = "|".join(re.escape(task.name) for task in known)
    endings = "|".join(sorted({*FORMATS, *(task.suffix for task in known)} if formats == FORMATS else formats))
    whole = [f"{WORKBOOK}.{XLSX}"] * (XLSX in formats) + [docling_export.SUFFIX] * (DOCLING in formats)
    alone = "|".join(map(re.escape, whole))
    # for instance 'letter.tables_html.page2-1.csv', 'letter.tables.xlsx' and 'letter.docling.json'
    ours = re.compile(rf"{re.escape(Path(stem).name)}\.(({tasks})(\.page\d+)?(-\d+)?\.({endings})|{alone})")
    if not folder.is_dir():
        return
    with disk_errors(folder):
        for path in folder.iterdir():
            if ours.fullmatch(path.name) and path.name not in kept and is_regular_file(path):
                path.unlink(missing_ok=True)


def described(error: BaseException) -> str:
    """Describes an error for a person; one that is not ours with its type."""
    if isinstance(error, Granite4vError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there was not enough memory; close other programs, or use a machine with more."
    if isinstance(error, RecursionError):
        return "it is nested too deeply."
    return f"an unexpected {type(error).__name__}: {str(error)[:300]}; please report it."


_NUMBER = re.compile(r"[+-]?\d+([.,'\s]\d+)*%?")


def is_csv_safe(path: Path) -> bool:
    """Whether a CSV file was written for spreadsheets: it begins with a byte order mark."""
    if path.suffix != ".csv" or not path.is_file():
        return False
    with disk_errors(path), path.open("rb") as file:
        return file.read(len(BOM_UTF8)) == BOM_UTF8


def spreadsheet_text(text: str) -> str:
    """Returns the text of a cell, with an apostrophe before anything that a spreadsheet could take for a formula. Plain
    numbers, which may begin with a sign, stay as they are."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not _NUMBER.fullmatch(text) else text


def as_text(record: Record, suffix: str | None = None) -> str:
    """Returns what was read as one text: tables in the format of `suffix`, or of the task by default."""
    suffix = suffix or task_or_question(record.task).suffix
    if record.tables:
        tables = record.value if isinstance(record.value, Table) else record.tables
        return write(tables, TABLE_FORMATS[suffix])
    if isinstance(record.value, str):
        return record.value
    return json.dumps(record.value, indent=2, ensure_ascii=False)


@dataclass
class _Place:
    """Where the files of one kind go. Files that were opened get their final names when `files` is closed."""

    root: Path
    stem: str
    suffix: str
    files: contextlib.ExitStack
    paths: list[Path] = field(default_factory=list)
    failed: bool = False
    n_missing: int = 0  # tables that the format cannot represent

    def path(self, part: str = "") -> Path:
        name = Path(f"{self.stem}{part}.{self.suffix}")
        path = make_folders(self.root, str(name.parent)) / name.name
        self.paths.append(path)
        return path

    def open(self) -> TextIO:
        return self.files.enter_context(atomic_text_file(self.path()))


class _Writer:
    """Writes one kind of file of one task."""

    def __init__(self, place: _Place) -> None:
        self.place = place

    def add(self, record: Record) -> None:
        raise NotImplementedError

    def end(self) -> None:
        pass

    def finish(self) -> None:
        with self.place.files:
            self.end()


class _TableFiles(_Writer):
    """Writes a file for each table: no program reads two tables of different widths from one CSV or Parquet file."""

    def add(self, record: Record) -> None:
        page = "" if record.n_pages == 1 else f".page{record.page}"
        for number, table in enumerate(record.tables, 1):
            part = f"{page}{'' if len(record.tables) == 1 else f'-{number}'}"
            self.add_table(table, functools.partial(self.place.path, part))

    def add_table(self, table: Table, path: Callable[[], Path]) -> None:
        """Writes one table and closes its file: a long document would have thousands open. `path`: called once the
        table is known to be valid."""
        raise NotImplementedError


class _CsvFiles(_TableFiles):
    def __init__(self, place: _Place, safe: bool) -> None:
        super().__init__(place)
        self._safe = safe

    def add_table(self, table: Table, path: Callable[[], Path]) -> None:
        if self._safe:
            cells = tuple(replace(cell, text=spreadsheet_text(cell.text)) for cell in table.cells)
            table = replace(table, cells=cells)
        text = write(table, "csv")
        with atomic_text_file(path()) as file:
            file.write(("\ufeff" if self._safe else "") + text + "\n")


class _ParquetFiles(_TableFiles):
    def add_table(self, table: Table, path: Callable[[], Path]) -> None:
        table.check_repeated()
        write_table(path(), table)


class _WorkbookFile(_Writer):
    """Writes all tables of a document to one workbook, with a sheet for each: 'p3 tables_html', 'p3-2 tables_html'."""

    def __init__(self, place: _Place) -> None:
        super().__init__(place)
        self._book: Workbook | None = None

    def add(self, record: Record) -> None:
        self._book = self._book or Workbook(self.place.path())
        for number, table in enumerate(record.tables, 1):
            table.check_repeated()
            page = f"p{record.page}{'' if number == 1 else f'-{number}'}"
            self._book.add(f"{page} {record.task}", table.texts(), table.n_header_rows)

    def end(self) -> None:
        if self._book is not None:
            self._book.save()


class _TablesFile(_Writer):
    """Writes all tables of a document to one file."""

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
    """Writes the fields of a single page, or a list of the fields of each page with its number."""

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
    """Writes code or prose, page after page."""

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
    if place.suffix in (PARQUET, XLSX):
        return _ParquetFiles(place) if place.suffix == PARQUET else _WorkbookFile(place)
    if task_or_question(record.task).gives_tables:
        return _CsvFiles(place, csv_safe) if place.suffix == "csv" else _TablesFile(place)
    return _FieldsFile(place, single) if place.suffix == "json" else _TextFile(place, single)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
