"""The allowed values of arguments, as types, so that type checkers and the command line catch misspellings.

Each is defined by a table elsewhere; a test compares the two. Tasks have no type: they are listed only in their table.
"""

from __future__ import annotations

import operator
from typing import Any, Literal, TypeAlias

from granite4v.errors import ArgumentError

Device: TypeAlias = Literal["auto", "cpu", "cuda", "metal"]
# How matrices of a vision file in F32, F16 or BF16 are multiplied: as they are, rounded to bfloat16, as 8-bit integers
# in the type that is the fastest here, or in one of these types.
VisionCompute: TypeAlias = Literal["file", "BF16", "int8", "Q8_0", "Q6_K"]
# How numbers in the KV cache are stored; q8_0 takes about half of the memory, and of the disk in the page store.
CacheType: TypeAlias = Literal["f16", "q8_0"]
Format: TypeAlias = Literal["csv", "html", "json", "otsl", "md", "parquet", "xlsx", "docling"]

MAX_THREADS = 512  # ggml's GGML_MAX_N_THREADS; more end the process


def whole_number(name: str, value: Any, least: int) -> int:
    """The value as an int, from Python's or NumPy's integers. Raises TypeError for anything else (True and 2.0 too),
    ArgumentError for an integer below `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} is {value!r:.60}; expected an integer of {least} or more.")
    if number < least:
        raise ArgumentError(f"{name} is {number}; expected {least} or more.")
    return number
