"""Parses the user's choice of pages of a document, and of a part of each page.

Knows nothing about files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from granite4v.errors import ArgumentError, DocumentError

_RANGE = re.compile(r"([0-9]+)(?:\s*(-)\s*([0-9]+)?)?", re.ASCII)
_LENGTH = re.compile(r"([0-9]*\.?[0-9]+|[0-9]+\.)\s*(%?)", re.ASCII)
_TOLERANCE = 1e-6  # of a page's side: 33.3% and 66.7% must add up to 100% in spite of floating-point rounding


class SelectionError(ArgumentError):
    """Invalid pages, an invalid crop or password: wrong usage, while a DocumentError is about a file."""


@dataclass(frozen=True)
class PageRanges:
    """Page numbers from 1 as (first, last) pairs, both inclusive, ascending, with gaps between pairs; last None: to the
    end."""

    ranges: tuple[tuple[int, int | None], ...]

    def of(self, n_pages: int) -> Iterator[tuple[int, int | None]]:
        """Yields (first, last) pairs for a document: a pair for each page that it has, and one for each missing range.

        Only pairs with a first greater than `n_pages` are missing pages. For instance, '1-3,7-9' of a document with 2
        pages gives (1, 1), (2, 2), (3, 3), (7, 9).
        """
        for first, last in self.ranges:
            for number in range(first, min(last or n_pages, n_pages) + 1):
                yield number, number
            if last is None:
                if first > n_pages:
                    yield first, None
            elif last > n_pages:
                yield max(first, n_pages + 1), last

    def count(self, n_pages: int) -> int:
        """Returns how many pairs `of` yields."""
        return sum(
            max(0, min(last or n_pages, n_pages) - first + 1) + (first > n_pages if last is None else last > n_pages)
            for first, last in self.ranges
        )


def parse_pages(text: str) -> PageRanges:
    """Parses pages such as '1-3,7,10-' to ascending ranges with each page once. Raises SelectionError."""
    found = [_parse_range(part.strip(), text) for part in text.split(",")]
    merged: list[tuple[int, int | None]] = []
    for first, last in sorted(found, key=lambda pair: pair[0]):
        if not merged:
            merged.append((first, last))
            continue
        before, end = merged[-1]
        if end is not None and first > end + 1:
            merged.append((first, last))
        else:
            merged[-1] = (before, None if end is None or last is None else max(end, last))
    return PageRanges(tuple(merged))


def _parse_range(part: str, text: str) -> tuple[int, int | None]:
    example = "write numbers and ranges such as '1-3,7,10-'"
    if not part:
        raise SelectionError(f"the pages '{text}' have an empty entry before, after or between commas; {example}.")
    match = _RANGE.fullmatch(part)
    if match is None or len(part) > 20:
        raise SelectionError(f"the pages '{text:.80}' hold '{part:.40}'; {example}.")
    first = int(match[1])
    last = first if match[2] is None else int(match[3]) if match[3] else None
    if first == 0 or last == 0:
        raise SelectionError(f"the pages '{text}' hold '{part}', but pages are counted from 1.")
    if last is not None and last < first:
        raise SelectionError(f"the pages '{text}' hold '{part}', which is in descending order; write '{last}-{first}'.")
    return first, last


@dataclass(frozen=True)
class Crop:
    """A rectangle of a page: x, y, width, height, from the top left corner of the page as a person sees it.

    A plain number is in the page's own unit: pixels of an image, points (1/72 inch) of a PDF page. `relative` marks
    numbers that are percentages of the page's width (x, width) or height (y, height).
    """

    values: tuple[float, float, float, float]
    relative: tuple[bool, bool, bool, bool] = (False, False, False, False)

    def __str__(self) -> str:
        return ",".join(
            f"{value:g}{'%' if relative else ''}" for value, relative in zip(self.values, self.relative, strict=True)
        )

    def box(self, size: tuple[float, float], name: str, unit: str) -> tuple[float, float, float, float]:
        """Returns (left, top, right, bottom) in `unit` on a page of `size` (width, height).

        Raises DocumentError, which calls the page `name`, if the rectangle extends beyond it.
        """
        x, y, width, height = (
            value * size[i % 2] / 100 if relative else value
            for i, (value, relative) in enumerate(zip(self.values, self.relative, strict=True))
        )
        right, bottom = x + width, y + height
        if right > size[0] * (1 + _TOLERANCE) or bottom > size[1] * (1 + _TOLERANCE):
            raise DocumentError(
                f"the crop {self} extends to {right:g} x {bottom:g}, but {name} has {size[0]:g} x {size[1]:g} {unit}; "
                "give x,y,width,height inside it, or in percent."
            )
        return x, y, min(right, size[0]), min(bottom, size[1])


def parse_crop(value: str | Sequence[float | str] | Crop) -> Crop:
    """Parses a rectangle: 'x,y,width,height' or four numbers, each of which may be text that ends in '%'.

    Raises SelectionError.
    """
    if isinstance(value, Crop):
        return value
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, Iterable) else [value]
    parts = [str(part).strip() for part in given]
    text = ",".join(parts)
    example = "write x,y,width,height, for instance '100,50,400,300' or '10%,0,50%,25%'"
    matches = [_LENGTH.fullmatch(part) for part in parts]
    if len(parts) != 4 or not all(matches):
        raise SelectionError(f"the crop '{text:.80}' is not four numbers of 0 or more; {example}.")
    values = [float(match[1]) for match in matches if match]
    relative = [bool(match[2]) for match in matches if match]
    if not all(map(math.isfinite, values)) or not values[2] or not values[3]:
        raise SelectionError(f"the crop '{text:.80}' has no width or no height; {example}.")
    x, y, width, height = values
    return Crop((x, y, width, height), (relative[0], relative[1], relative[2], relative[3]))
