"""A flag in C memory that llama.cpp and ggml read between graph nodes, so that a long computation can be aborted."""

from __future__ import annotations

import ctypes
import sys


class AbortFlag:
    """The flag that `abort_callback(abort_data)` of a context or a backend reads.

    The callback is C's own strlen on a string of at most one byte, so a raised flag reads as true. No Python runs
    during a graph, so compute threads never wait for the interpreter's lock.
    """

    def __init__(self) -> None:
        self._flag = ctypes.create_string_buffer(2)  # the owner keeps it alive until nothing computes any more
        strlen = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).strlen
        self.callback_address = int(ctypes.cast(strlen, ctypes.c_void_p).value or 0)
        self.data_address = ctypes.addressof(self._flag)

    def raise_(self) -> None:
        """Aborts the running computation, and any that begins before `clear`."""
        self._flag[0] = b"\1"

    def clear(self) -> None:
        self._flag[0] = b"\0"

    @property
    def is_raised(self) -> bool:
        return self._flag[0] != b"\0"
