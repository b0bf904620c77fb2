"""Loads llama.cpp's library once, and captures its log messages.

llama-cpp-python declares every function and by-value struct of llama.h in `llama_cpp.llama_cpp`; those are used as they
are. Its high-level `Llama` class is not used.
"""

from __future__ import annotations

import collections
import functools
import importlib.metadata
import logging
from typing import Any

from granite4v.errors import DeviceError
from granite4v.ggml.library import openmp_for_this_load

_ERROR, _CONT = 4, 5  # enum ggml_log_level
_NEEDED = ("llama_model_n_embd_inp", "llama_set_adapters_lora", "llama_model_load_from_file", "llama_memory_seq_rm")


@functools.cache
def llama() -> Any:
    """Returns llama-cpp-python's declarations, with the backend started.

    Raises DeviceError when llama-cpp-python is missing or lacks a function that we call.
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
        raise DeviceError(
            f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')} has no '{missing[0]}'; granite4v is "
            "tested with 0.3.36. Install the version that granite4v asks for."
        )
    llama_cpp.llama_log_set(_log_callback(llama_cpp), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


def capture_log() -> None:
    """Empties the log and directs llama.cpp's messages to it, before a call whose failure should be explained.

    Repeated before each call, because other users of llama-cpp-python in the process may set the log callback, too.
    """
    log().clear()
    llama().llama_log_set(_log_callback(llama()), None)


class Log:
    """The latest messages of llama.cpp, so that an error can quote its reason."""

    def __init__(self) -> None:
        self._lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=200)
        self._logger = logging.getLogger("granite4v.llama")
        self._level = _ERROR

    def add(self, level: int, text: str) -> None:
        self._level = self._level if level == _CONT else level
        text = text.strip()
        if text and text != ".":
            self._lines.append((self._level, text))
            # debug level for all: many of llama.cpp's warnings and errors are handled by us
            self._logger.debug("%s", text)

    def clear(self) -> None:
        self._lines.clear()

    def reason(self) -> str:
        """Why the last call failed, in llama.cpp's words: the first error, without the function's name."""
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
    """The C callback. llama.cpp keeps the pointer for as long as the process lives, so the cache keeps the object
    alive."""
    target = log()

    def receive(level: int, text: bytes, user_data: Any) -> None:
        target.add(level, text.decode("utf-8", "replace"))

    return llama_cpp.llama_log_callback(receive)
