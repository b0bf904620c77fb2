"""Ends a command: flushes the streams, and turns an exception into one message and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
import warnings
from typing import TextIO

from granite4v.cli import streams
from granite4v.cli.signals import Interrupted
from granite4v.cli.terminal import clean
from granite4v.cli.verbosity import is_quiet
from granite4v.errors import Granite4vError, ImageWarning

EXIT_FAILURE = 1
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
# 128 + the number of a signal, as shells report it
EXIT_INTERRUPTED = 128 + 2
EXIT_PIPE_CLOSED = 128 + 13

# Every status, for the documentation.
EXIT_STATUSES = {
    0: "Success.",
    EXIT_FAILURE: "Failure, explained by one message on standard error; for `extract`, also a page that failed, an "
    "answer that is invalid or was cut off, or a file that could not be written.",
    2: "Wrong usage.",
    EXIT_BUG: "A bug in granite4v; the message names a file with the traceback.",
    128 + 1: "Ended by SIGHUP, after cleaning up.",
    EXIT_INTERRUPTED: "Interrupted by Ctrl-C (SIGINT), after cleaning up.",
    EXIT_PIPE_CLOSED: "Standard output was closed by its reader (SIGPIPE), as `head` does.",
    128 + 15: "Ended by SIGTERM, after cleaning up.",
}


def run() -> int:
    """Runs the command line. Returns the exit status after all output is written and any failure is reported."""
    try:
        results = streams.prepare()
        warnings.showwarning = _show_warning
        status = _command_line()
        if results.failure is None or status == 0:  # otherwise the failure has been reported already
            results.flush()
        return status
    except BaseException as error:
        return conclude(error)
    finally:
        sys.stdout = sys.__stdout__  # the interpreter flushes it at exit; failures are reported by now


def _command_line() -> int:
    from granite4v.cli.main import app

    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_FAILURE if end.code else 0
    return 0


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning as one line, without the location in the code that Python would add. Warnings about images
    are also printed with --quiet, since they affect the result."""
    if issubclass(category, ImageWarning) or not is_quiet():
        print(f"warning: {clean(str(message), keep='')}", file=sys.stderr, flush=True)


def conclude(error: BaseException) -> int:
    """Prints one message on stderr about why a command ended. Returns the exit status."""
    status, message = explain(error) or (EXIT_BUG, _bug(error))
    if message:
        print(f"granite4v: {clean(message)}", file=sys.stderr, flush=True)
    return status


def explain(error: BaseException) -> tuple[int, str] | None:
    """Returns the exit status and message of an error that a user, a file or the machine can cause; None for a bug."""
    if isinstance(error, Interrupted) and error.number != signal.SIGINT:
        return 128 + error.number, f"ended by {signal.Signals(error.number).name}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, streams.PipeClosed):
        return EXIT_PIPE_CLOSED, ""
    if isinstance(error, Granite4vError):
        return EXIT_FAILURE, str(error)
    if isinstance(error, MemoryError):
        return EXIT_FAILURE, (
            "out of memory. Use a smaller image or page, a smaller --ctx-size, a model with smaller weight types, or a "
            "machine with more memory."
        )
    if isinstance(error, RecursionError):
        return EXIT_FAILURE, f"the input is nested too deeply ({_place(error)}); simplify the file, schema or template."
    if isinstance(error, OSError) and error.strerror:
        name = f": '{os.fsdecode(error.filename)}'" if isinstance(error.filename, str | bytes) else ""
        return EXIT_FAILURE, f"the operating system reported '{error.strerror}'{name}."
    return None


def _bug(error: BaseException) -> str:
    return (
        f"internal error: {type(error).__name__}: {error} ({_place(error)}). This is a bug in granite4v; please report "
        f"it with {_keep_traceback(error)}."
    )


def _place(error: BaseException) -> str:
    """Describes the innermost frame of this package in the traceback."""
    frames = [(frame.f_globals.get("__name__", "?"), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if frame[0].partition(".")[0] == "granite4v"] or frames
    return f"{ours[-1][0]}, line {ours[-1][1]}" if ours else "place unknown"


def _keep_traceback(error: BaseException) -> str:
    """Writes the traceback to a temporary file, which is kept. Returns a phrase with its path, or the traceback itself
    if the file cannot be written."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="granite4v-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
    except OSError:
        return f"this:\n{text}"
    return f"'{file.name}', which contains the traceback"
