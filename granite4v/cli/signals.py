"""Signals that end a command: SIGTERM and SIGHUP unwind it as Ctrl-C does, so that it cleans up."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Turns the first signal into `Interrupted`. The second leaves the clean-up alone, the third ends the process
    at once: a clean-up may hang, and a library may have swallowed the exception."""

    def __init__(self) -> None:
        self._n_received = 0
        self._is_over = False

    def catch(self) -> None:
        """Takes over the signals, those excepted that are ignored: by nohup, or by a shell for its background jobs."""
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def is_over(self) -> None:
        """From now on a signal ends the process without unwinding: there is nothing left to clean up."""
        self._is_over = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._n_received += 1
        if self._is_over or self._n_received > 2:
            os._exit(128 + number)
        if self._n_received == 1:
            raise Interrupted(number)
        with contextlib.suppress(OSError):  # not print: a handler may run in the middle of one
            os.write(2, b"granite4v: cleaning up; once more ends it at once\n")
