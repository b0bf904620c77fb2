"""The places of the cells and fields of an answer in its text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

# for a cell: table, row and column of its top left slot, from 0; for a field: its JSON pointer (RFC 6901), '' for the
# whole value
Key: TypeAlias = tuple[int, int, int] | str


@dataclass(frozen=True)
class Place:
    """The part of an answer that a cell or a field was read from: `text[start:end]`, including the first character of
    its terminator. In '<table><tr><td>1</td>', the cell (0, 0, 0) is '1<'. So even an empty cell has a place, and the
    end of a number counts as part of it. A quoted string includes its quotes. `end` may lie beyond the text."""

    key: Key
    start: int
    end: int


def pointer(path: Iterable[str | int]) -> str:
    """The JSON pointer of a path of names and indices."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def whole(text: str) -> list[Place]:
    """The place of a value that is the whole answer."""
    return [Place("", 0, len(text))]
