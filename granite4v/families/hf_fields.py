"""Typed, bounds-checked reads of Hugging Face JSON: config.json with its sections, and the files next to it.

Only this module rejects wrong types and absurd numbers, so other code need not check for them. Every message names the
file and the field, what was found and what was expected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from granite4v.errors import CheckpointError

Json = Mapping[str, Any]  # an object of a Hugging Face file

# Far above any published model, and small enough that no product of them overflows or exhausts storage later.
MAX_LAYERS = 512
MAX_HEADS = 4096
MAX_WIDTH = 1 << 18
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = (1 << 31) - 1
MAX_PIXELS = 1 << 14
MAX_PINPOINTS = 1024
MAX_FACTOR = 1e12

_REQUIRED: Any = object()


class Fields:
    """One JSON object of a file. A field that is null counts as absent, as in transformers."""

    def __init__(self, values: Json, file: str = "config.json", path: str = "") -> None:
        """`path`: the object's location in the file, for instance 'text_config'; empty for the top level."""
        self.values, self.file, self.path = values, file, path

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The unchecked value, of any type."""
        value = self.values.get(key)
        return default if value is None else value

    def error(self, key: str, expected: str) -> CheckpointError:
        """Makes the error for a field that is missing or whose value is not the expected one."""
        name = f"{self.path}.{key}" if self.path else key
        if key not in self.values:
            return CheckpointError(f"'{self.file}' has no '{name}'; expected {expected}.")
        return CheckpointError(f"'{self.file}': '{name}' is {shown(self.values[key])}; expected {expected}.")

    def section(self, key: str, default: Mapping[str, Any] = _REQUIRED) -> Fields:
        """The JSON object in a field of this one."""
        value = self.get(key, default)
        if not isinstance(value, Mapping):
            raise self.error(key, "a section (a JSON object)")
        return Fields(value, self.file, f"{self.path}.{key}" if self.path else key)

    def integer(self, key: str, low: int, high: int, default: int = _REQUIRED) -> int:
        value = self.get(key, default)
        if not is_integer(value) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return int(value)

    def number(self, key: str, low: float, high: float, default: float = _REQUIRED, *, positive: bool = False) -> float:
        """A finite number within the bounds, and above 0 if `positive`."""
        value = self.get(key, default)
        if not is_number(value) or not low <= value <= high or (positive and value <= 0):
            raise self.error(
                key, f"a positive number up to {high:g}" if positive else f"a number from {low:g} to {high:g}"
            )
        return float(value)

    def text(self, key: str, default: str = _REQUIRED, choices: Collection[str] = ()) -> str:
        value = self.get(key, default)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.error(key, " or ".join(map(repr, choices)) if choices else "a string")
        return value

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def integers(
        self, key: str, low: int, high: int, default: Iterable[int] = _REQUIRED, *, most: int = MAX_LAYERS
    ) -> list[int]:
        """A list of at most `most` integers within the bounds."""
        expected = f"an integer from {low} to {high}"
        items = self._items(key, default, most, expected)
        for i, item in enumerate(items):
            if not (is_integer(item) and low <= item <= high):
                raise self._item_error(key, i, item, expected)
        return items

    def pairs(self, key: str, low: int, high: int, default: Any = _REQUIRED, *, most: int) -> list[tuple[int, int]]:
        """A list of at most `most` pairs of integers within the bounds."""
        expected = f"a pair of integers from {low} to {high}"
        items = self._items(key, default, most, expected)
        for i, item in enumerate(items):
            if not (isinstance(item, (list, tuple)) and len(item) == 2) or not all(
                is_integer(side) and low <= side <= high for side in item
            ):
                raise self._item_error(key, i, item, expected)
        return [(int(first), int(second)) for first, second in items]

    def _items(self, key: str, default: Any, most: int, expected: str) -> list[Any]:
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)) or len(value) > most:
            raise self.error(key, f"a list of at most {most} items, each {expected}")
        return list(value)

    def _item_error(self, key: str, i: int, item: Any, expected: str) -> CheckpointError:
        return Fields({f"{key}[{i}]": item}, self.file, self.path).error(f"{key}[{i}]", expected)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number. Integers of any size count, so compare a value before converting it to
    float."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def shown(value: Any) -> str:
    """Formats a value for a message, as JSON or Python writes it, cut to a readable length."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."
