"""What is going on, on stderr: one line that renews itself on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_NAMES = {
    "check": "checking the model's files",
    "load": "loading weights",
    "encode": "reading images",
    "prefill": "reading the prompt",
}
_TERMINAL_S, _ELSEWHERE_S = 0.1, 10.0  # between two lines of one stage


def stage_line(what: str, done: int, total: int) -> str:
    """What a `Model.progress` callback is told, for people: 'reading images 40%', or '...' at the beginning."""
    share = f"{done * 100 // total}%" if done and total > 1 else "..."
    return f"{_NAMES.get(what, what)} {share}"


class Status:
    """A `Model.progress` callback; `clear` before anything else is printed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval_s = _TERMINAL_S if self._terminal else _ELSEWHERE_S
        self._shown = ""
        self._stage = ""
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what == self._stage and now - self._last < self._interval_s:
            return
        line = stage_line(what, done, total)
        if self._terminal:
            self.clear()
            self._shown = line
            print(line, end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)
        self._stage, self._last = what, now

    def clear(self) -> None:
        if self._shown:
            print("\r" + " " * len(self._shown) + "\r", end="", file=self._stream, flush=True)
            self._shown = ""
