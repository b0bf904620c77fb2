"""llama.cpp's library: loaded once, its messages kept, its long calls interruptible.

llama-cpp-python declares every function and by-value struct of llama.h in `llama_cpp.llama_cpp`; those are used
as they are. Its high-level `Llama` class is not.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

from granite4v.errors import DeviceError
from granite4v.ggml.library import openmp_for_this_load

T = TypeVar("T")
Cancel = Callable[[], bool]

_ERROR, _CONT = 4, 5  # enum ggml_log_level
_NEEDED = ("llama_model_n_embd_inp", "llama_set_adapters_lora", "llama_model_load_from_file", "llama_memory_seq_rm")
_POLL_S = 0.05  # how soon a cancelled request is noticed


@functools.cache
def llama() -> Any:
    """llama-cpp-python's declarations, with the backend started.

    Raises DeviceError when llama-cpp-python is missing or older than what we call.
    """
    try:
        with openmp_for_this_load():
            from llama_cpp import llama_cpp
    except ImportError as error:
        raise DeviceError(
            f"llama-cpp-python cannot be loaded ({error}); install it with 'pip install llama-cpp-python'."
        ) from None
    missing = [name for name in _NEEDED if not hasattr(llama_cpp, name)]
    if missing:
        import importlib.metadata

        raise DeviceError(
            f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')} has no '{missing[0]}'; granite4v is "
            "tested with 0.3.36. Install the version that granite4v asks for."
        )
    llama_cpp.llama_log_set(_log_callback(llama_cpp), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


def capture_log() -> None:
    """Empties the log and directs llama.cpp's messages to it, before a call whose failure should be explained.

    Repeated before each call, because other users of llama-cpp-python in the process set the log callback, too.
    """
    log().clear()
    llama().llama_log_set(_log_callback(llama()), None)


class Log:
    """The last things llama.cpp said, so that an error can quote its reason."""

    def __init__(self) -> None:
        self._lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=200)
        self._logger = logging.getLogger("granite4v.llama")
        self._level = _ERROR

    def add(self, level: int, text: str) -> None:
        self._level = self._level if level == _CONT else level
        text = text.strip()
        if text and text != ".":
            self._lines.append((self._level, text))
            # llama.cpp calls much a warning or an error that its caller handles: all of it is detail here
            self._logger.debug("%s", text)

    def clear(self) -> None:
        self._lines.clear()

    def reason(self) -> str:
        """Why the last call failed, as llama.cpp put it: its first error, without the function's name."""
        errors = [text for level, text in self._lines if level == _ERROR]
        if not errors:
            return "llama.cpp gave no reason"
        text = errors[0].splitlines()[0]
        head, separator, tail = text.partition(": ")
        return tail if separator and " " not in head else text


@functools.cache
def log() -> Log:
    return Log()


@functools.cache
def _log_callback(llama_cpp: Any) -> Any:
    """The C callback; the cache keeps it alive as long as the process, since llama.cpp keeps the pointer."""
    target = log()

    def receive(level: int, text: bytes, user_data: Any) -> None:
        target.add(level, text.decode("utf-8", "replace"))

    return llama_cpp.llama_log_callback(receive)


class Worker:
    """One thread for all calls that take long, so that Ctrl-C and cancellation can end them.

    Python runs signal handlers between bytecodes of the main thread only; a call that stays in C for twenty
    seconds would keep them waiting. llama.cpp asks `abort_callback(abort_data)` between graph nodes whether to
    stop. The callback is C's own strlen on a one-byte string: no Python, so no lock is taken during a graph.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._flag = ctypes.create_string_buffer(2)  # llama.cpp reads it until the context is freed
        strlen = ctypes.CDLL("msvcrt" if _is_windows() else None).strlen
        self.abort_address = int(ctypes.cast(strlen, ctypes.c_void_p).value or 0)
        self.abort_data = ctypes.addressof(self._flag)

    def run(self, call: Callable[[], T], cancel: Cancel | None = None) -> T:
        """What `call` returns; while it runs, `cancel` is asked whether to abort it.

        An exception in the waiting thread (Ctrl-C) aborts the call, waits for it and goes on upwards. It may come
        at any moment, even before the call's future has a name here.
        """
        self._flag[0] = b"\0"
        try:
            future = self._pool.submit(call)
            while not wait([future], timeout=_POLL_S).done:
                if cancel is not None and cancel():
                    self._flag[0] = b"\1"
        except BaseException:
            self._drain()
            raise
        return future.result()

    def _drain(self) -> None:
        """Aborts what runs and waits until the thread is idle: calls are done in order, so an empty one is last."""
        self._flag[0] = b"\1"
        self._pool.submit(int).result()

    def close(self) -> None:
        """Ends what may still run, and the thread. To be called before what it works on is freed."""
        self._flag[0] = b"\1"
        self._pool.shutdown(cancel_futures=True)


def _is_windows() -> bool:
    import sys

    return sys.platform == "win32"
