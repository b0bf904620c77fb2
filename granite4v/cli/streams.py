"""The standard streams of a command: no result is lost silently, and no text can control the terminal.

Results go to stdout. If they cannot be written (disk full, pipe closed), `ResultsLost` or `PipeClosed` is raised. On a
terminal, control characters and characters that its encoding lacks are written as escapes. Otherwise stdout is UTF-8,
unless PYTHONIOENCODING names another encoding. Messages go to stderr: they are always escaped, and failing to write one
never fails the command.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from granite4v.cli.terminal import clean
from granite4v.errors import OutputError


class ResultsLost(OutputError):
    """Standard output cannot be written."""


class PipeClosed(Exception):
    """The reader of standard output has closed it, as `head` does."""


class _Stream(io.TextIOBase):
    """A text stream that wraps another. It has no `buffer`, so that nothing can be written around it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self.before_write: Callable[[], None] | None = None  # called before anything is written to a terminal

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
    """Standard output, for the thread that created it: what libraries print in their own threads goes to stderr, as
    Ray's messages about workers do.

    After a write has failed, every further write raises the same ResultsLost or PipeClosed, because code that probes
    the stream, such as click, may swallow the first one.
    """

    def __init__(self, stream: TextIO, *, escapes: bool = True) -> None:
        super().__init__(stream)
        self._escapes = escapes and self._is_terminal
        self.failure: Exception | None = None
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread:
            return sys.stderr.write(text)
        self._begin()
        with self._failing():
            self._stream.write(clean(text) if self._escapes else text)
        return len(text)

    def unescaped(self) -> Results:
        """The same stream without escaping, for a writer that sends control sequences and cleans all other text."""
        return Results(self._stream, escapes=False)

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
                    f"results cannot be written to standard output: {error.strerror or error}. Some are lost; free "
                    "up disk space or redirect the output elsewhere, then run the command again."
                )
            _discard(self._stream)
        raise self.failure


def _discard(stream: TextIO) -> None:
    """Redirects the stream to /dev/null; otherwise flushing its buffer at interpreter exit would fail again."""
    with contextlib.suppress(OSError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


class Messages(_Stream):
    """Standard error. Carriage returns are not escaped, since download progress is drawn with them."""

    def __init__(self, stream: TextIO, *, escapes: bool = True) -> None:
        super().__init__(stream)
        self._escapes = escapes

    def write(self, text: str) -> int:
        self._begin()
        with contextlib.suppress(OSError):
            self._stream.write(clean(text, keep="\n\t\r") if self._escapes else text)
        return len(text)

    def unescaped(self) -> Messages:
        """The same stream without escaping, for a writer that sends control sequences and cleans all other text."""
        return Messages(self._stream, escapes=False)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def prepare() -> Results:
    """Replaces the process's streams with `Results` and `Messages`. Raises ResultsLost if stdout is closed."""
    _open_descriptors()
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  # for the process's life
    if sys.stderr is None:  # print(file=None) would print to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = Messages(sys.stderr)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise ResultsLost(
            "standard output is closed, so results cannot be written; redirect it to a file, or to /dev/null."
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        named = sys.stdout.isatty() or os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
        sys.stdout.reconfigure(encoding=None if named else "utf-8", errors="backslashreplace")
    results = sys.stdout = Results(sys.stdout)
    return results


def to_json(data: Any, indent: int | None = None) -> str:
    """Formats JSON for stdout. NaN and infinities become null. If stdout is not UTF-8, the JSON is ASCII, since the
    stream's escapes for characters that its encoding lacks are not valid JSON."""
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
    """Opens /dev/null as file descriptor 0, 1 or 2 if it is closed. Otherwise the next opened file would get that
    number, and the output of C libraries would go into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
