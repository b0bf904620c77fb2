"""`results.jsonl`: a record a line, each on the disk before the next is begun, and found again after a crash.

Keeps where records are, never the records themselves: memory does not grow with what is in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from granite4v.errors import AnswerError, OutputError
from granite4v.runtime.extraction.durable import disk_errors, output_error, sync_folder
from granite4v.runtime.extraction.record import Key, Record, decode, encode


@dataclass
class Tally:
    """How the records fared."""

    n_records: int = 0
    n_failed: int = 0
    n_invalid: int = 0
    n_salvaged: int = 0
    n_copied: int = 0

    def count(self, record: Record) -> None:
        self.n_records += 1
        self.n_failed += record.error is not None
        self.n_invalid += record.error is None and not record.valid
        self.n_salvaged += record.salvaged
        self.n_copied += record.copy_of is not None


@dataclass
class _Index:
    digests: dict[Key, str | None] = field(default_factory=dict)
    answers: dict[tuple[str, str], int] = field(default_factory=dict)  # (digest, task): where the first answer is
    documents: dict[str, tuple[int, int]] = field(default_factory=dict)  # source: where its records begin and end

    def add(self, record: Record, start: int, end: int) -> None:
        self.digests[record.key] = record.digest
        if record.digest is not None and record.error is None:
            self.answers.setdefault((record.digest, record.task), start)
        first, _ = self.documents.get(record.source, (start, end))
        self.documents[record.source] = (first, end)


class Journal:
    """The records of one run, in the order they were made. One writer at a time: see `folder`."""

    def __init__(self, file: BinaryIO, path: Path, *, lasting: bool) -> None:
        """`lasting`: False for a file that goes with the process. Raises OutputError for a file that is damaged."""
        self._file, self._path, self._lasting = file, path, lasting
        self._end = 0
        self._index = _Index()
        self.tally = Tally()
        self._load()

    @classmethod
    def open(cls, path: Path | None) -> Journal:
        """The journal in a file, made if there is none. A last line that a crash left unfinished is dropped."""
        if path is None:
            passing = tempfile.NamedTemporaryFile(prefix="granite4v-", suffix=".jsonl", buffering=0)  # noqa: SIM115
            return cls(cast(BinaryIO, passing), Path(passing.name), lasting=False)
        with disk_errors(path):
            fresh = not path.exists()
            file = path.open("w+b" if fresh else "r+b", buffering=0)
            if fresh:
                sync_folder(path.parent)
        try:
            return cls(cast(BinaryIO, file), path, lasting=True)
        except BaseException:
            file.close()
            raise

    def append(self, record: Record) -> None:
        """Returns when the record is on the disk. Raises OutputError, and then holds what it held before."""
        line = encode(record)
        try:
            self._file.seek(self._end)
            rest = memoryview(line)
            while rest:  # a disk that fills up takes a part, then refuses
                rest = rest[self._file.write(rest) :]
            if self._lasting:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # if this fails too, the torn line is dropped by the next run
                self._file.truncate(self._end)
            kept = f"{self.tally.n_records} finished records are kept; go on with --resume." if self._lasting else ""
            raise output_error(error, self._path, kept) from None
        self._note(record, self._end, self._end + len(line))

    def __contains__(self, key: Key) -> bool:
        return key in self._index.digests

    def digest(self, key: Key) -> str | None:
        """Of the page that this record was made from."""
        return self._index.digests[key]

    def answer_to(self, digest: str, task: str) -> Record | None:
        """The first record about a page with these pixels."""
        start = self._index.answers.get((digest, task))
        return None if start is None else next(self._read(start, self._end))

    def of_document(self, source: str) -> Iterator[Record]:
        """Its records in order, one at a time."""
        start, end = self._index.documents.get(source, (0, 0))
        return (record for record in self._read(start, end) if record.source == source)

    def __iter__(self) -> Iterator[Record]:
        return self._read(0, self._end)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _note(self, record: Record, start: int, end: int) -> None:
        self._index.add(record, start, end)
        self.tally.count(record)
        self._end = end

    def _read(self, start: int, end: int) -> Iterator[Record]:
        with self._path.open("rb") as file:
            while start < end:
                file.seek(start)  # the caller may write, or read elsewhere, between two records
                line = file.readline()
                start += len(line)
                yield decode(line)

    def _load(self) -> None:
        with self._path.open("rb") as reader:
            for number, line in enumerate(reader, 1):
                if not line.endswith(b"\n"):
                    break  # torn: the process ended, or the power, while it was written
                try:
                    record = decode(line)
                except (ValueError, KeyError, TypeError, AnswerError) as error:
                    if reader.read(1):
                        raise OutputError(self._damaged(number, error)) from None
                    break  # the last line: a power cut can leave its length and not its bytes
                if record.key in self:
                    raise OutputError(self._damaged(number, "a record that is there already"))
                self._note(record, self._end, self._end + len(line))
        with disk_errors(self._path):
            if self._path.stat().st_size > self._end:
                self._file.truncate(self._end)
                os.fsync(self._file.fileno())

    def _damaged(self, number: int, why: Any) -> str:
        why = f"no JSON ({why.msg})" if isinstance(why, json.JSONDecodeError) else f"{type(why).__name__}: {why}"
        return (
            f"line {number} of '{self._path}' is not a record of ours ({why:.120}); the file was changed by something "
            "else. Start again with another --out."
        )
