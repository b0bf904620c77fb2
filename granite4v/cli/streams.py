"""The process's standard streams, prepared for a command line: nothing written is lost without a word.

Results go to stdout. Where that cannot be written (full, gone), `ResultsLost` or `PipeClosed` is raised. On a
terminal, what could act on it is escaped, and what its encoding lacks is written as an escape. Elsewhere it is
UTF-8, as files are, unless PYTHONIOENCODING asks for another encoding. stderr is for people: always escaped,
and work never fails because a message could not be written.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from granite4v.cli.terminal import clean
from granite4v.errors import OutputError


class ResultsLost(OutputError):
    """stdout cannot be written."""


class PipeClosed(Exception):
    """Whoever read stdout has stopped reading, as `head` does."""


class _Stream(io.TextIOBase):
    """A text stream in front of another. Has no `buffer`, so that nobody writes past it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self.before_write: Callable[[], None] | None = None  # before anything is written to a terminal

    def _begin(self) -> None:
        if self._is_terminal and self.before_write is not None:
            self.before_write()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has an attribute
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._is_terminal

    def writable(self) -> bool:
        return True


class Results(_Stream):
    """stdout. Writing raises ResultsLost or PipeClosed, and goes on doing so once it has failed: whoever probes a
    stream (click does) may swallow the first error."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        self._begin()
        with self._failing():
            self._stream.write(clean(text) if self._is_terminal else text)
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        if self.failure is None:
            try:
                yield
                return
            except BrokenPipeError:
                self.failure = PipeClosed()
            except OSError as error:
                self.failure = ResultsLost(
                    f"results cannot be written to standard output: {error.strerror or error}. Some are lost; make "
                    "room, or send them elsewhere, and run this again."
                )
            _discard(self._stream)
        raise self.failure


def _discard(stream: TextIO) -> None:
    """Sends what is still buffered nowhere; it would fail once more when the interpreter ends."""
    with contextlib.suppress(OSError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


class Messages(_Stream):
    """stderr. Carriage returns pass: libraries that download or build draw their progress with them."""

    def __init__(self, stream: TextIO, *, escapes: bool = True) -> None:
        super().__init__(stream)
        self._escapes = escapes

    def write(self, text: str) -> int:
        self._begin()
        with contextlib.suppress(OSError):
            self._stream.write(clean(text, keep="\n\t\r") if self._escapes else text)
        return len(text)

    def unescaped(self) -> Messages:
        """The same stream for a writer who sends control sequences, and who cleans what came from elsewhere."""
        return Messages(self._stream, escapes=False)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def prepare() -> Results:
    """Puts `Results` and `Messages` in place of the process's streams; raises ResultsLost when stdout is closed."""
    _open_descriptors()
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  # for the process's life
    if sys.stderr is None:  # print(file=None) would print to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = Messages(sys.stderr)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise ResultsLost(
            "standard output is closed, so results have nowhere to go; redirect it to a file, or to /dev/null."
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        named = sys.stdout.isatty() or os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
        sys.stdout.reconfigure(encoding=None if named else "utf-8", errors="backslashreplace")
    results = sys.stdout = Results(sys.stdout)
    return results


def to_json(data: Any, indent: int | None = None) -> str:
    """JSON for stdout. NaN and infinities, which JSON lacks, are null. In ASCII where stdout is not UTF-8: what its
    encoding lacks would be written in escapes that JSON does not have."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    return json.dumps(_finite(data), ensure_ascii=not is_utf8, allow_nan=False, indent=indent)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def _open_descriptors() -> None:
    """Opens /dev/null where 0, 1 or 2 is closed: the next file to be opened would get that number, and what C
    libraries print would go into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
