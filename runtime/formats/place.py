"""Where the cells and fields of an answer stand in its text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

# of a cell: table, row and column of its top left slot, from 0; of a field: its JSON pointer (RFC 6901), '' for a value
# that is whole
Key: TypeAlias = tuple[int, int, int] | str


@dataclass(frozen=True)
class Place:
    """`text[start:end]` of an answer is what a cell or a field was read from, and the first character of what ends it:
    '<table><tr><td>1</td>' has the cell (0, 0, 0) in '1<'. So an empty cell has a place, too, and a number's end counts
    as a part of it. What a string's quotes enclose stands with its quotes. The `end` may lie behind the text."""

    key: Key
    start: int
    end: int


def pointer(path: Iterable[str | int]) -> str:
    """The JSON pointer of a path of names and indices."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def whole(text: str) -> list[Place]:
    """The place of a value that is all of the answer."""
    return [Place("", 0, len(text))]
