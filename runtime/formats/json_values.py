"""What values JSON of an answer may have: such as every other program can read, and as this one can go through."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_NESTING = 64  # objects and lists inside each other; validators, templates and encoders go into each by recursion
MAX_DIGITS = 1000  # of an integer; Python converts 4,300, other readers far fewer
_SURROGATE = re.compile("[\ud800-\udfff]")


def to_float(text: str) -> float:
    """The number of a JSON text with a fraction or an exponent; ValueError for one that would become infinite."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"it holds the number {text:.40}, which is larger than a double can be")
    return value


def to_int(text: str) -> int:
    """The number of a JSON text of digits; ValueError for more than MAX_DIGITS."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it holds an integer of {len(text):,} digits, more than {MAX_DIGITS:,}")
    return int(text)


def is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists are nested deeper than so many levels."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [item for item in layer if isinstance(item, dict | list)]
        if not layer:
            return False
        layer = [below for item in layer for below in (item.values() if isinstance(item, dict) else item)]
    return True


def whole_characters(value: Any) -> Any:
    """The value with U+FFFD for each half of a UTF-16 pair that stands alone: no file and no terminal takes those."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {whole_characters(key): whole_characters(item) for key, item in value.items()}
    return value
