"""Allowed argument values as Literal types, so that type checkers and the command line catch misspellings.

Each type repeats a table that is defined elsewhere; a test compares the two. Tasks have no type: only their table lists
them.
"""

from __future__ import annotations

import operator
from typing import Any, Literal, TypeAlias

from granite4v.errors import ArgumentError

Device: TypeAlias = Literal["auto", "cpu", "cuda", "metal"]
# How the F32, F16 and BF16 matrices of a vision file are multiplied: 'file' as stored, 'BF16' rounded to bfloat16,
# 'int8' in the 8-bit type that is fastest on this machine, or in the named quantization type.
VisionCompute: TypeAlias = Literal["file", "BF16", "int8", "Q8_0", "Q6_K"]
# The type of the KV cache; q8_0 takes about half the memory of f16, and half the disk space in the page store.
CacheType: TypeAlias = Literal["f16", "q8_0"]
Format: TypeAlias = Literal["csv", "html", "json", "otsl", "md", "parquet", "xlsx", "docling"]

MAX_THREADS = 512  # ggml's GGML_MAX_N_THREADS; ggml aborts the process on more


def whole_number(name: str, value: Any, least: int) -> int:
    """Returns a Python or NumPy integer as an int. Raises TypeError for anything else (True and 2.0 too),
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
