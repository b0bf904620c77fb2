"""Runs a program on its own terminal, whose screen can be read."""

from __future__ import annotations

import os
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import pexpect
import pyte

PROMPT = "> "
PATIENCE_S = 120.0  # generous for a busy machine; nothing here measures time


class _Screen(pyte.HistoryScreen):  # type: ignore[misc]  # pyte has no types
    """Answers the queries that programs send to a terminal, for example for the cursor position."""

    def __init__(self, columns: int, rows: int, reply: Callable[[str], None]) -> None:
        super().__init__(columns, rows, history=5000, ratio=1)
        self._reply = reply

    def write_process_input(self, data: str) -> None:
        self._reply(data)


class Terminal:
    """A program on a terminal, as a context manager; a program that is still running at the end is killed."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 80,
        rows: int = 30,
        environment: Mapping[str, str] | None = None,
        folder: str | None = None,
    ) -> None:
        kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        self._child = pexpect.spawn(
            command[0],
            list(command[1:]),
            dimensions=(rows, columns),
            env={**kept, "TERM": "xterm-256color", "LANG": "C.UTF-8", **(environment or {})},
            cwd=folder,
        )
        self._child.delaybeforesend = None
        self._screen = _Screen(columns, rows, lambda data: self._child.send(data))
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""  # all the program's output

    # --- what is shown ---

    @property
    def lines(self) -> list[str]:
        """All lines, including those that have scrolled off the screen."""
        gone = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return [line.rstrip() for line in (*gone, *self._screen.display)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()

    @property
    def is_at_prompt(self) -> bool:
        """Whether the cursor is after an empty prompt and keys are read one by one."""
        if self._child.closed or termios.tcgetattr(self._child.child_fd)[3] & termios.ICANON:
            return False
        cursor = self._screen.cursor
        return cursor.x == len(PROMPT) and self._screen.display[cursor.y].rstrip() == PROMPT.rstrip()

    # --- what is typed ---

    def send(self, keys: str) -> None:
        self._child.send(keys)

    def ask(self, line: str) -> str:
        """Types a line, waits for the next prompt, and returns what was shown in between."""
        self.wait(lambda: self.is_at_prompt)
        self.send(line)
        self.wait(lambda: self._screen.cursor.x > len(PROMPT))
        return self.enter()

    def enter(self) -> str:
        """Submits the typed line, waits for the next prompt, and returns what was shown in between."""
        n_before = len(self.lines_to_cursor())
        self.send("\r")
        self.wait(lambda: self.is_at_prompt and len(self.lines_to_cursor()) > n_before)
        return "\n".join(self.lines_to_cursor()[n_before:-1])

    def lines_to_cursor(self) -> list[str]:
        return self.lines[: len(self._screen.history.top) + self._screen.cursor.y + 1]

    def resize(self, columns: int, rows: int) -> None:
        self._screen.resize(rows, columns)
        self._child.setwinsize(rows, columns)

    def interrupt(self) -> None:
        """Sends Ctrl-C while a program works: the terminal turns it into a signal."""
        self._child.sendintr()

    def signal(self, number: int) -> None:
        self._child.kill(number)

    # --- waiting ---

    def wait(self, until: Callable[[], Any]) -> None:
        """Reads the program's output until a condition holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < deadline, f"not in {PATIENCE_S:.0f} s; the screen:\n{self.text}"
            try:
                data = self._child.read_nonblocking(65536, timeout=0.1)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert until(), f"the program ended; the screen:\n{self.text}"
                return
            self.raw += data
            self._stream.feed(data)

    def wait_for(self, text: str) -> None:
        self.wait(lambda: text in self.text)

    def end(self) -> int:
        """Waits until the program ends; returns its exit status, negative for a signal."""
        over = False

        def ended() -> bool:
            nonlocal over
            over = over or not self._child.isalive()
            return over

        self.wait(ended)
        return int(self._child.exitstatus if self._child.exitstatus is not None else -self._child.signalstatus)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._child.close(force=True)
