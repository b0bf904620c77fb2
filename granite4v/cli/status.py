"""What is going on, on stderr: one line that renews itself on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

NAMES = {
    "check": "checking the model's files",
    "load": "loading weights",
    "encode": "reading pictures",
    "prefill": "reading the prompt",
}
_INTERVAL_S = 0.1


class Status:
    """A `Model.progress` callback; `clear` before anything else is printed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._shown = ""
        self._stage = ""
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        name = NAMES.get(what, what)
        if not self._terminal:
            if what != self._stage:
                print(f"{name} ...", file=self._stream, flush=True)
        elif what != self._stage or done == total or time.monotonic() - self._last > _INTERVAL_S:
            self.clear()
            self._shown = f"{name} {done}/{total}" if total > 1 else f"{name} ..."
            self._last = time.monotonic()
            print(self._shown, end="", file=self._stream, flush=True)
        self._stage = what

    def clear(self) -> None:
        if self._shown:
            print("\r" + " " * len(self._shown) + "\r", end="", file=self._stream, flush=True)
            self._shown = ""
