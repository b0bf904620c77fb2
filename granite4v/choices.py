"""The words that arguments choose from, as types: a type checker and the command line find a misspelled one.

The tables these words stand in have more to say of each; tests hold the two together.
"""

from __future__ import annotations

import operator
from typing import Any, Literal, TypeAlias

Device: TypeAlias = Literal["auto", "cpu", "cuda", "metal"]
Format: TypeAlias = Literal["csv", "html", "json", "otsl", "md", "docling"]

MAX_THREADS = 512  # ggml's GGML_MAX_N_THREADS; more end the process


def whole_number(name: str, value: Any, least: int) -> int:
    """The integer that was given, of Python's kind or NumPy's. Raises TypeError for what is none (True and 2.0 are
    none), ValueError for one below `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} is {value!r:.60}; expected an integer of {least} or more.")
    if number < least:
        raise ValueError(f"{name} is {number}; expected {least} or more.")
    return number
