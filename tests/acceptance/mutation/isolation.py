"""Runs a function in a forked process under limits, with its output in files.

The parent has imported the product and has no threads, so a fork costs milliseconds where a new interpreter costs half
a second. Linux and macOS.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .case import Result

MAX_FILE_BYTES = 1 << 30
MAX_OUTPUT_BYTES = 1 << 20  # how much of a command's output is read back
WALL_PER_CPU = 3  # a busy machine must not look like a hang
ERRORS = "granite4v-error-*.txt"  # where the command saves the traceback of an unexpected error
GRACE_S = 5.0  # for child processes to notice that the command is gone


@dataclass(frozen=True)
class Limits:
    seconds: float = 20.0  # CPU seconds; the wall-clock limit is WALL_PER_CPU times that
    memory_bytes: int = 6 << 30  # of address space


def isolated(
    function: Callable[[], int | None], folder: Path, name: str, limits: Limits, command: list[str] | None = None
) -> Result:
    """Runs `function` in `folder` the way a console script would; `name` is the stem of its output files."""
    stdout, stderr, stack = (folder.parent / f"{name}.{what}" for what in ("out", "err", "stack"))
    temporary = folder.parent / f"{name}.tmp"
    temporary.mkdir(exist_ok=True)
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(function, folder, temporary, stdout, stderr, stack, limits)
    status, timed_out = _wait(pid, began + limits.seconds * WALL_PER_CPU)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    timed_out |= ended_by == signal.SIGXCPU
    return Result(
        command=command or [name],
        status=os.WEXITSTATUS(status) if os.WIFEXITED(status) and not timed_out else None,
        signal=None if timed_out else ended_by,
        timed_out=timed_out,
        seconds=time.monotonic() - began,
        stdout=_text(stdout),
        stderr=_text(stderr) + "".join(map(_text, sorted(temporary.glob(ERRORS)))),
        stack=_text(stack),
        left_running=_end_group(pid, killed=timed_out or ended_by is not None),
        left_behind=_entries(temporary),
    )


def _child(
    function: Callable[[], int | None],
    folder: Path,
    temporary: Path,
    stdout: Path,
    stderr: Path,
    stack: Path,
    limits: Limits,
) -> None:
    """Sets up the child, runs the function and exits. Never returns."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        _redirect(stdout, stderr)
        stacks = stack.open("w")
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks)
        faulthandler.register(signal.SIGXCPU, stacks, chain=True)
        _limit(limits)
        status = _run(function)
        for step in (threading._shutdown, atexit._run_exitfuncs, _flush):  # what the interpreter does when it ends
            step()
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
            _flush()
        status = 1
    finally:
        os._exit(status & 0xFF)


def _run(function: Callable[[], int | None]) -> int:
    """Returns the exit status that the interpreter would give for what `function` returns or raises."""
    try:
        return function() or 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1


def _redirect(stdout: Path, stderr: Path) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    out, err = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for path in (stdout, stderr))
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), "utf-8", "backslashreplace", line_buffering=True
    )
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr


def _limit(limits: Limits) -> None:
    seconds = max(1, round(limits.seconds))
    for what, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 2),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES, MAX_FILE_BYTES),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS does not support all of them
            resource.setrlimit(what, (soft, hard))


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _wait(pid: int, deadline: float) -> tuple[int, bool]:
    """Returns the status of `os.waitpid`, and whether the process was killed at the deadline."""
    pause_s = 0.0005
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status, False
        if time.monotonic() > deadline:
            break
        time.sleep(pause_s)
        pause_s = min(0.02, pause_s * 1.5)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)  # has faulthandler write the stack
    time.sleep(0.3)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1], True


def _end_group(pid: int, killed: bool) -> bool:
    """Kills what is left of the process group. Returns whether a command that ended by itself left processes
    running."""
    deadline = time.monotonic() + (0 if killed else GRACE_S)
    while _is_there(pid):
        if time.monotonic() >= deadline:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            return not killed
        time.sleep(0.01)
    return False


def _is_there(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.match(ERRORS))


def _text(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")
    return ""
