"""Reads metadata values with checks of type and bounds, and uniform error messages.

A GGUF file is untrusted: a key may be missing, or hold text instead of a number, a zero that is used as a divisor, or a
count that would take all memory. The caller states what it accepts and can rely on the result.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from granite4v.errors import ModelFileError

AGAIN = "convert it again with 'granite4v convert', or download it again"
_REQUIRED: Any = object()
_SHOWN = 60  # characters of a wrong value that a message quotes


class GgufMetadata(Mapping[str, Any]):
    """A file's metadata as a mapping, with accessors that check what they return.

    Each accessor raises ModelFileError for a value of another type or outside the bounds, and for a missing key
    unless a default is given. The default itself is not checked.
    """

    def __init__(self, path: str | Path, values: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def integer(self, key: str, least: int, most: int, default: Any = _REQUIRED) -> Any:
        """Returns an integer from `least` to `most`."""
        expected = f"an integer from {least:,} to {most:,}"
        value = self._get(key, default, expected)
        if value is default or _is_integer(value, least, most):
            return value
        raise self._wrong(key, value, expected)

    def number(self, key: str, least: float, most: float, default: Any = _REQUIRED) -> Any:
        """Returns a finite number from `least` to `most`. A value stored as text, which keeps all its digits, is
        accepted, too."""
        expected = f"a number from {least:g} to {most:g}"
        value = self._get(key, default, expected)
        if value is default:
            return value
        number = _as_number(value)
        if number is None or not least <= number <= most:
            raise self._wrong(key, value, expected)
        return number

    def text(self, key: str, default: Any = _REQUIRED, known: Collection[str] = ()) -> Any:
        """Returns a string; if `known` is not empty, it must be one of these."""
        expected = f"one of {', '.join(map(repr, known))}" if known else "text"
        value = self._get(key, default, expected)
        if value is default or (isinstance(value, str) and (not known or value in known)):
            return value
        raise self._wrong(key, value, expected)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns a boolean."""
        value = self._get(key, default, "true or false")
        if value is default or isinstance(value, bool):
            return value
        raise self._wrong(key, value, "true or false")

    def integers(self, key: str, least: int, most: int, default: Any = _REQUIRED, *, max_length: int = 1 << 24) -> Any:
        """Returns a list of 1 to `max_length` integers from `least` to `most`."""
        expected = f"a list of 1 to {max_length:,} integers from {least:,} to {most:,}"
        value = self._get(key, default, expected)
        if value is default:
            return value
        if not isinstance(value, list) or not 0 < len(value) <= max_length:
            raise self._wrong(key, value, expected)
        for item in value:
            if not _is_integer(item, least, most):
                raise self._wrong(key, value, expected, item)
        return value

    def numbers(self, key: str, length: int, least: float, most: float) -> list[float]:
        """Returns a list of exactly `length` finite numbers from `least` to `most`."""
        expected = f"a list of {length} numbers from {least:g} to {most:g}"
        value = self._get(key, _REQUIRED, expected)
        if not isinstance(value, list) or len(value) != length:
            raise self._wrong(key, value, expected)
        numbers = [_as_number(item) for item in value]
        for item, number in zip(value, numbers, strict=True):
            if number is None or not least <= number <= most:
                raise self._wrong(key, value, expected, item)
        return [float(number) for number in numbers if number is not None]

    def texts(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns a list of strings."""
        value = self._get(key, default, "a list of texts")
        if value is default or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            return value
        raise self._wrong(key, value, "a list of texts")

    def n_texts(self, key: str) -> int:
        """Returns the length of a list of strings; 0 without the key."""
        return len(self.texts(key, []))

    def _get(self, key: str, default: Any, expected: str) -> Any:
        if key in self:
            return self[key]
        if default is _REQUIRED:
            raise ModelFileError(f"'{self.path}' has no key '{key}'; {AGAIN} (expected {expected}).")
        return default

    def _wrong(self, key: str, value: Any, expected: str, item: Any = None) -> ModelFileError:
        if isinstance(value, list):
            kind = type(value[0]).__name__ if value else "nothing"
            found = f"holds a list of {len(value):,} ({kind})" + (
                f" with {item!r:.{_SHOWN}}" if item is not None else ""
            )
        else:
            found = f"is {value!r:.{_SHOWN}}"
        return ModelFileError(f"'{self.path}': '{key}' {found}, expected {expected}; {AGAIN}.")


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
