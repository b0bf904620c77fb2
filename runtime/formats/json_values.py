"""Limits on the JSON values of an answer, so that other programs can read them and recursion over them is safe."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_NESTING = 64  # levels of objects and lists; validators, templates and encoders recurse into each
MAX_DIGITS = 1000  # of an integer; Python converts up to 4,300, other parsers far fewer
_SURROGATE = re.compile("[\ud800-\udfff]")


def to_float(text: str) -> float:
    """Converts a JSON number with a fraction or an exponent; raises ValueError for one that would become infinite."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"it contains the number {text:.40}, which is larger than a double can be")
    return value


def to_int(text: str) -> int:
    """Converts a JSON integer; raises ValueError for more than MAX_DIGITS digits."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it contains an integer of {len(text):,} digits, more than {MAX_DIGITS:,}")
    return int(text)


def is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists are nested deeper than `levels`."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [item for item in layer if isinstance(item, dict | list)]
        if not layer:
            return False
        layer = [below for item in layer for below in (item.values() if isinstance(item, dict) else item)]
    return True


def replace_surrogates(value: Any) -> Any:
    """The value with U+FFFD in place of each lone surrogate, which cannot be encoded as UTF-8."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_surrogates(item) for key, item in value.items()}
    return value
