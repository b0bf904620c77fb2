"""Runs a module's `main` in a child process, so that native code may abort or hang without ending this process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ANNOUNCE_AFTER_S = 1.0
STOP_EVERY_S = 0.1
# Not `python -m`, which would also search the current folder for modules: the child gets this process's `sys.path`.
_START = (
    "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); "
    "import importlib; importlib.import_module(sys.argv[1]).main(*sys.argv[2:])"
)


_FAULT = re.compile(r"assert|abort|fatal|terminate|what\(\)|panicked|failed|error", re.IGNORECASE)
_MEMORY = re.compile(r"bad_alloc|MemoryError|memory alloc|allocate memory|out of memory|mmap: 12", re.IGNORECASE)


@dataclass(frozen=True)
class Ended:
    """How a child process ended. `status` is negative for a signal, None after a timeout."""

    status: int | None
    stdout: str
    stderr: str

    @property
    def how(self) -> str:
        """The ending in words: 'by SIGABRT', 'with status 3', 'after a timeout'."""
        if self.status is None:
            return "after a timeout"
        if self.status < 0:
            with contextlib.suppress(ValueError):
                return f"by {signal.Signals(-self.status).name}"
            return f"by signal {-self.status}"
        return f"with status {self.status}"

    @property
    def reason(self) -> str:
        """The first stderr line that names a fault, else the last line; empty if there is none."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        line = next(filter(_FAULT.search, lines), lines[-1] if lines else "")
        return re.sub(r"^\S*/(\S+:\d+: )", r"\1", line)  # drops the directory of the library's source file

    @property
    def lacked_memory(self) -> bool:
        return bool(_MEMORY.search(self.stderr))


def run_main(
    module: str,
    arguments: Sequence[str],
    timeout_s: float,
    announce: Callable[[], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Ended:
    """Calls `module.main(*arguments)` in a child process, which is killed after `timeout_s`.

    `announce` is called if that takes longer than a second. `stop` is polled ten times a second; the child is killed
    at once when it returns true. A child with `stop` runs in its own session, so Ctrl-C in the terminal does not reach
    it. Raises OSError if no Python can be started.
    """
    if not sys.executable or getattr(sys, "frozen", False):  # frozen: sys.executable is the application, not Python
        raise OSError("no Python interpreter is known that could run a child process")
    command = [sys.executable, "-c", _START, "\n".join(sys.path), module, *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        errors="replace",
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else ggml starts a debugger, whose output buries the reason
        start_new_session=stop is not None,
    ) as child:
        try:
            output = _wait(child, min(ANNOUNCE_AFTER_S, timeout_s), stop)
            if output is None and announce is not None:
                announce()
            if output is None:
                output = _wait(child, timeout_s - ANNOUNCE_AFTER_S, stop)
            if output is None:
                child.kill()
                return Ended(None, *child.communicate())
        except BaseException:
            child.kill()
            raise
    return Ended(child.returncode, *output)


def _wait(child: subprocess.Popen[str], timeout_s: float, stop: Callable[[], bool] | None) -> tuple[str, str] | None:
    """Returns the child's stdout and stderr when it ends; None after `timeout_s`, or when `stop` returns true."""
    end = time.monotonic() + timeout_s
    while (left_s := end - time.monotonic()) > 0 and not (stop is not None and stop()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.communicate(timeout=left_s if stop is None else min(left_s, STOP_EVERY_S))
    return None
