"""Handles signals that end a command. SIGTERM and SIGHUP raise an exception like Ctrl-C, so that it cleans up."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread when a signal asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Raises `Interrupted` for the first signal. The second one only prints a message, so that the clean-up can finish.
    The third ends the process at once, since the clean-up may hang, or a library may have swallowed the exception."""

    def __init__(self) -> None:
        self._n_received = 0
        self._is_over = False

    def catch(self) -> None:
        """Installs the handlers, except for signals that are ignored, as under nohup and in background jobs of
        shells."""
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def is_over(self) -> None:
        """Makes every further signal end the process at once, since there is nothing left to clean up."""
        self._is_over = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._n_received += 1
        if self._is_over or self._n_received > 2:
            os._exit(128 + number)
        if self._n_received == 1:
            raise Interrupted(number)
        with contextlib.suppress(OSError):  # not print, which the handler may have interrupted
            os.write(2, b"granite4v: cleaning up; interrupt once more to end at once\n")
