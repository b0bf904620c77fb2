"""`results.jsonl`: one record per line, each written to disk before the next is started, and recovered after a crash.

A record replaces an older one with the same key: its line is appended, and the older line is removed from the file when
the log is closed, or by the next run. Only the positions of records are kept in memory, not their content.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

from granite4v.errors import AnswerError, OutputError
from granite4v.paths import atomic_binary_file, disk_errors, output_error
from granite4v.runtime.extract.output_directory import RESULTS
from granite4v.runtime.extract.own_files import open_own
from granite4v.runtime.extract.record import Key, Record, decode, encode

MAX_LINE_BYTES = 1 << 28  # far above what an answer of a full context takes
NOT_OURS = (ValueError, KeyError, TypeError, IndexError, AnswerError, RecursionError)
_BEGINNING = b'{"source": '  # of every record, by which an incomplete first line is recognized as ours


@dataclass
class Counts:
    """Numbers of records by outcome."""

    n_records: int = 0
    n_failed: int = 0
    n_invalid: int = 0
    n_salvaged: int = 0
    n_cut: int = 0  # salvaged, and what was kept is valid
    n_copied: int = 0

    @property
    def n_incomplete(self) -> int:
        """Records without an answer, with an invalid answer, or with a truncated one."""
        return self.n_failed + self.n_invalid + self.n_cut

    def add(self, entry: Entry, sign: int = 1) -> None:
        self.n_records += sign
        self.n_failed += sign * entry.failed
        self.n_invalid += sign * (not entry.failed and not entry.valid)
        self.n_salvaged += sign * entry.salvaged
        self.n_cut += sign * (entry.salvaged and entry.valid and not entry.failed)
        self.n_copied += sign * entry.copied


@dataclass(frozen=True, slots=True)
class Entry:
    """The position of a record in bytes, and what is known of it without reading it. `failed`: it has an error."""

    start: int
    length: int
    digest: str | None
    file_state: str | None
    error_type: str | None
    failed: bool
    valid: bool
    salvaged: bool
    copied: bool

    @classmethod
    def of(cls, record: Record, start: int, length: int) -> Entry:
        return cls(
            start,
            length,
            record.digest and sys.intern(record.digest),
            record.file_state and sys.intern(record.file_state),
            record.error_type and sys.intern(record.error_type),
            record.error is not None,
            record.valid,
            record.salvaged,
            record.copy_of is not None,
        )


class ResultsLog:
    """The records of one run, one for each key. Allows one writer at a time: see `output_directory`.

    Reading order: documents as first recorded, their pages by number (records about the document itself last), the
    tasks of a page as first recorded; see `arrange`. `close` leaves the file in this order, too.
    """

    def __init__(self, file: BinaryIO, path: Path, *, lasting: bool) -> None:
        """`lasting`: False for a file that is temporary or only read. Raises OutputError for a damaged one."""
        self._file, self._path, self._lasting = file, path, lasting
        self._end = 0
        self._entries: dict[Key, Entry] = {}
        self._documents: dict[str, dict[Key, None]] = {}  # source: its keys
        self._stems: dict[str, str | None] = {}
        self._places: dict[str, int] = {}  # source: its place in the reading order
        self._tasks: dict[str, int] = {}  # task: its place in the reading order
        self._answers: dict[tuple[str, str], Key] = {}  # (digest, task): the first answer
        self._last: tuple[int, ...] = ()  # the highest place so far, see `_note`
        self.is_torn = False  # the last line is incomplete, and left out
        self._tidy = True  # the file has each record once, in reading order
        self.counts = Counts()
        self._load()

    @classmethod
    def open(cls, path: Path | None) -> ResultsLog:
        """Opens the log in a file, creating it if necessary; in a temporary file for None. Drops a last line that a
        crash left incomplete.

        Raises OutputError for a file that holds anything but records.
        """
        if path is None:
            passing = tempfile.NamedTemporaryFile(prefix="granite4v-", suffix=".jsonl", buffering=0)  # noqa: SIM115
            return cls(cast(BinaryIO, passing), Path(passing.name), lasting=False)
        file = open_own(path)
        try:
            return cls(file, path, lasting=True)
        except BaseException:
            file.close()
            raise

    @classmethod
    def open_to_read(cls, folder: Path) -> ResultsLog:
        """Opens the log of a results folder without changing anything: a run may be writing to it at the same time.

        Raises OutputError for a folder without one, and for a file that holds anything but records.
        """
        path = folder / RESULTS
        if not path.is_file():
            raise OutputError(f"there is no '{path}'; expected the folder that 'granite4v extract' was given by --out.")
        with disk_errors(path):
            file = path.open("rb", buffering=0)
        try:
            return cls(cast(BinaryIO, file), path, lasting=False)
        except BaseException:
            file.close()
            raise

    def append(self, record: Record) -> None:
        """Writes a record, in place of an older one with the same key. Returns once it is on disk.

        Raises ValueError for a number that JSON does not have, OutputError for a file that cannot be written; the log
        is then unchanged.
        """
        line = encode(record)
        self.check_there()
        rest = memoryview(line)
        try:
            self._file.seek(self._end)
            while rest:  # a disk that fills up accepts a part, then fails
                rest = rest[self._file.write(rest) :]
            if self._lasting:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # if this fails too, the next run drops the incomplete line
                self._file.truncate(self._end)
            raise output_error(error, self._path, self._kept()) from None
        except BaseException:
            if not rest:  # a signal arrived after the last byte: the record is in the file, so it counts
                self._note(record, len(line))
            raise
        self._note(record, len(line))

    def drop(self, key: Key) -> None:
        """Removes a record; its line is removed from the file when the log is closed."""
        self.counts.add(self._entries.pop(key), -1)
        del self._documents[key[0]][key]
        self._tidy = False

    def check_there(self) -> None:
        """Raises OutputError if the file was removed or replaced while the run was writing to it."""
        if not self._lasting:
            return
        with disk_errors(self._path):
            mine = os.fstat(self._file.fileno())
            try:
                there = os.stat(self._path)
            except (FileNotFoundError, NotADirectoryError):
                there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise OutputError(
                f"'{self._path}' was removed or replaced while the run was writing to it; "
                f"put its directory back where it was and resume with --resume, or start again."
            )

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def entry(self, key: Key) -> Entry:
        """Returns the entry of a record, which must exist."""
        return self._entries[key]

    def read(self, key: Key) -> Record:
        """Returns the record with this key, which must exist."""
        return self._read(self._entries[key])

    def keys_of(self, source: str) -> list[Key]:
        """Returns the keys of a document's records, in reading order."""
        return sorted(self._documents.get(source, ()), key=self._place_in_document)

    def tasks(self) -> list[str]:
        """Returns every task that was ever recorded."""
        return list(self._tasks)

    def sources(self) -> dict[str, str | None]:
        """Returns every document that was ever recorded, in order, with the `stem` of its records, if they have one."""
        return dict(self._stems)

    def answer_to(self, digest: str, task: str) -> Record | None:
        """Returns the first answer to a task about a page with these pixels; None if there is none."""
        key = self._answer_key(digest, task)
        return None if key is None else self.read(key)

    def of_document(self, source: str) -> Iterator[Record]:
        """Yields the records of a document in reading order, one at a time."""
        return (self._read(entry) for key in self.keys_of(source) if (entry := self._entries.get(key)) is not None)

    def __iter__(self) -> Iterator[Record]:
        return (record for source in list(self._documents) for record in self.of_document(source))

    def arrange(self, sources: Iterable[str], tasks: Iterable[str]) -> None:
        """Changes the reading order to these orders of documents and tasks; others keep their places.

        Needed since a run that ended early may have recorded an answer before others that precede it.
        """
        documents, by_task = _arranged(self._documents, sources), _arranged(self._tasks, tasks)
        if documents == list(self._documents) and by_task == list(self._tasks):
            return
        self._documents = {source: self._documents[source] for source in documents}
        self._stems = {source: self._stems[source] for source in documents}
        self._places = {source: place for place, source in enumerate(documents)}
        self._tasks = {task: place for place, task in enumerate(by_task)}
        self._tidy = False

    def tidy(self) -> None:
        """Rewrites the file with each record once and in reading order, and replaces it in one step.

        Raises OutputError; the file is then unchanged.
        """
        if self._tidy or not self._lasting:
            return
        self.check_there()
        entries: dict[Key, Entry] = {}
        end = 0
        with disk_errors(self._path, self._kept()), atomic_binary_file(self._path) as file:
            for source in self._documents:
                for key in self.keys_of(source):
                    old = self._entries[key]
                    file.write(self._bytes(old))
                    entries[key] = replace(old, start=end)
                    end += old.length
            if os.fstat(file.fileno()).st_size != end:  # an unbuffered write may write only a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._file.close()
        self._file, self._entries, self._end, self._tidy = file, entries, end, True

    def close(self) -> None:
        """Tidies and closes the file. A second call does nothing."""
        if not self._file.closed:
            with contextlib.suppress(OutputError):  # the next run can still tidy the file
                self.tidy()
            self._file.close()

    def __enter__(self) -> ResultsLog:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _note(self, record: Record, length: int) -> None:
        key, entry = record.key, Entry.of(record, self._end, length)
        self._end += length
        if key in self._entries:
            self.counts.add(self._entries[key], -1)
            self._tidy = False
        self._entries[key] = entry
        self.counts.add(entry)
        self._documents.setdefault(record.source, {})[key] = None
        self._stems[record.source] = self._stems.get(record.source) or record.stem
        self._places.setdefault(record.source, len(self._places))
        self._tasks.setdefault(record.task, len(self._tasks))
        # copies are made from the first answer about these pixels, whatever is recorded later
        if entry.digest is not None and not entry.failed and self._answer_key(entry.digest, record.task) is None:
            self._answers[entry.digest, record.task] = key
        # The file is tidy while every line comes after the one before it in reading order: (document, whether it is
        # about the document as a whole, page, task). Page 2 recorded after page 3 makes it untidy, and so does a
        # record that replaces another, whose line is still in the file.
        place = (self._places[record.source], *self._place_in_document(key))
        self._tidy &= place > self._last
        self._last = max(place, self._last)

    def _answer_key(self, digest: str, task: str) -> Key | None:
        key = self._answers.get((digest, task))
        entry = None if key is None else self._entries.get(key)
        replaced = entry is None or entry.digest != digest or entry.failed
        return None if replaced else key

    def _place_in_document(self, key: Key) -> tuple[bool, int, int]:
        _, page, task = key
        return page is None, page or 0, self._tasks[task]

    def _read(self, entry: Entry) -> Record:
        try:
            return decode(self._bytes(entry))
        except NOT_OURS as error:
            raise OutputError(self._damaged(f"the record at byte {entry.start}", error)) from None

    def _bytes(self, entry: Entry) -> bytes:
        with disk_errors(self._path):
            self._file.seek(entry.start)
            found = b""
            while len(found) < entry.length and (piece := self._file.read(entry.length - len(found))):
                found += piece
        if len(found) < entry.length:
            raise OutputError(f"'{self._path}' was shortened by something else; start again with another --out.")
        return found

    def _load(self) -> None:
        number = 0
        with disk_errors(self._path), os.fdopen(os.dup(self._file.fileno()), "rb") as reader:
            size = os.fstat(reader.fileno()).st_size
            reader.seek(0)
            # up to `size`: a reader ignores what a run appends in the meantime
            while reader.tell() < size and (line := reader.readline(MAX_LINE_BYTES)):
                number += 1
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("it does not end")
                    record = decode(line)
                except NOT_OURS as error:
                    # after a crash or a power cut the last line may be incomplete, or have its length but only zeros
                    last = reader.tell() >= size
                    ours = bool(self._entries) or _BEGINNING.startswith(line[: len(_BEGINNING)].rstrip(b"\0"))
                    torn = not line.endswith(b"\n") or bool(self._entries)
                    if last and ours and torn:
                        self.is_torn = True
                        break
                    raise OutputError(self._damaged(f"line {number}", error)) from None
                self._note(record, len(line))
            if size > self._end and self._file.writable():
                self._file.truncate(self._end)
                os.fsync(self._file.fileno())

    def _kept(self) -> str:
        n = self.counts.n_records
        return (
            f"{n} finished record{'s are' if n != 1 else ' is'} kept; continue with --resume." if self._lasting else ""
        )

    def _damaged(self, where: str, why: Exception) -> str:
        reason = f"not JSON ({why.msg})" if isinstance(why, json.JSONDecodeError) else f"{type(why).__name__}: {why}"
        return (
            f"{where} of '{self._path}' is not a record of ours ({reason:.120}); the file was changed by something "
            "else. Remove that line if the others are to be kept, or start again with another --out."
        )


def _arranged(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Returns `names` with those in `order` sorted that way among the places that they occupy; others keep theirs.

    For instance, a x c b in the order b c a becomes b x c a.
    """
    found = list(names)
    known = set(found)
    wanted = [name for name in order if name in known]
    among, rest = set(wanted), iter(wanted)
    return [next(rest) if name in among else name for name in found]
