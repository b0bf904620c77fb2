"""Replots a chart's data: bars or lines, as plain geometry that a template writes as SVG."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

from granite4v.runtime.formats import Table

WIDTH, HEIGHT = 640, 380  # of the drawing, in its own units
_LEFT, _RIGHT, _TOP = 64, 12, 16
_LETTER = 4.5  # height that each letter of a slanted label takes
MAX_BARS = 60  # more values are drawn as lines
MAX_LABELS = 16
_NUMBER = re.compile(r"[+-]?(\d[\d.,' ]*|[.,]\d+)([eE][+-]?\d+)?")
_UNITS = {"k": 1e3, "thousand": 1e3, "m": 1e6, "mn": 1e6, "million": 1e6, "b": 1e9, "bn": 1e9, "billion": 1e9}


@dataclass(frozen=True)
class Bar:
    """A filled rectangle, with (`x`, `y`) its upper left corner, and its tooltip (`title`)."""

    x: float
    y: float
    width: float
    height: float
    series: int
    title: str


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """The geometry of a chart. `lines`: (series, SVG `points`) of each unbroken piece; `zero_y`: where the axis is."""

    series: tuple[str, ...]
    bars: tuple[Bar, ...]
    lines: tuple[tuple[int, str], ...]
    ticks: tuple[Label, ...]
    labels: tuple[Label, ...]
    zero_y: float
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    width: int = WIDTH
    height: int = HEIGHT


def redraw(table: Table) -> Chart | None:
    """Returns the chart of a table whose first row names series and whose first column names points; None without
    numbers."""
    header, *rows = table.texts()
    if not rows or table.n_cols < 2:
        return None
    values = [[number(text) for text in row[1:]] for row in rows]
    named = [k for k in range(table.n_cols - 1) if any(row[k] is not None for row in values)]
    if not named:
        return None
    known = [value for row in values for k in named if (value := row[k]) is not None]
    ticks = _ticks(min(0.0, *known), max(0.0, *known))
    low, high = ticks[0], ticks[-1]
    names = [_short(row[0]) for row in rows]
    bottom_y = HEIGHT - 26 - _LETTER * max(map(len, names))

    def y(value: float) -> float:
        return _rounded(_TOP + (bottom_y - _TOP) * (high - value) / (high - low))

    slot = (WIDTH - _LEFT - _RIGHT) / len(rows)
    as_lines = len(rows) * len(named) > MAX_BARS or (len(rows) >= 6 and _ascends([row[0] for row in rows]))
    bars: list[Bar] = []
    lines: list[tuple[int, str]] = []
    for at, k in enumerate(named):
        column = [row[k] for row in values]
        if as_lines:
            centres = [_rounded(_LEFT + slot * (i + 0.5)) for i in range(len(rows))]
            lines += [(at, piece) for piece in _pieces(centres, [None if v is None else y(v) for v in column])]
            continue
        width = slot * 0.8 / len(named)
        for i, value in enumerate(column):
            if value is not None:
                top, bottom = sorted((y(value), y(0)))
                x = _LEFT + slot * (i + 0.1) + width * at
                title = f"{rows[i][0]}, {header[k + 1]}: {rows[i][k + 1]}"
                bars.append(Bar(_rounded(x), top, _rounded(width), max(0.5, _rounded(bottom - top)), at, title))
    every = math.ceil(len(rows) / MAX_LABELS)
    return Chart(
        series=tuple(header[k + 1] for k in named),
        bars=tuple(bars),
        lines=tuple(lines),
        ticks=tuple(Label(_LEFT - 6, y(value), f"{value:,.10g}") for value in ticks),
        labels=tuple(
            Label(_rounded(_LEFT + slot * (i + 0.5)), _rounded(bottom_y + 14), name)
            for i, name in enumerate(names)
            if i % every == 0
        ),
        zero_y=y(0),
    )


def number(text: str) -> float | None:
    """Returns the number in a cell, without currency or percent sign; a unit such as 'million' scales it. None if there
    is no number."""
    plain = text.strip().replace("\u2212", "-").replace("\u00a0", " ").replace("\u202f", " ")
    negative = plain.startswith("(") and plain.endswith(")")
    match = _NUMBER.search(plain)
    if match is None:
        return None
    before, after = plain[: match.start()], plain[match.end() :].strip(" )%").lower()
    if any(letter.isalnum() for letter in before) or (after and after not in _UNITS and any(map(str.isdigit, after))):
        return None
    value = _plain(match[0]) * _UNITS.get(after, 1.0)
    if before.rstrip(" $€£¥(").endswith("-") and not match[0].startswith("-"):
        value = -value  # '-$5'
    return None if not math.isfinite(value) else -value if negative else value


def _plain(digits: str) -> float:
    """Converts digits with separators to a number.

    The kind of separator that comes last is the decimal one, unless it occurs more than once, or is a single comma
    between up to three digits and exactly three: '1.234,5' is 1234.5, '1,5' is 1.5, '1,234' is 1234, '1.234.567' is
    1234567.
    """
    digits = digits.replace("'", "").replace(" ", "")
    if digits.rfind(",") > digits.rfind("."):
        thousands = digits.count(",") > 1 or re.fullmatch(r"[+-]?\d{1,3},\d{3}([eE].*)?", digits)
        digits = digits.replace(".", "").replace(",", "" if thousands else ".")
    else:
        digits = digits.replace(",", "")
    return float(digits.replace(".", "") if digits.count(".") > 1 else digits)


def _ticks(low: float, high: float) -> list[float]:
    """Returns evenly spaced round numbers that cover `low` to `high`."""
    if low == high:
        high = low + 1.0
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _ascends(labels: list[str]) -> bool:
    """Whether the labels are increasing numbers, such as years."""
    numbers = [number(label) for label in labels]
    known = [value for value in numbers if value is not None]
    return len(known) == len(labels) and all(a < b for a, b in itertools.pairwise(known))


def _pieces(xs: list[float], ys: list[float | None]) -> list[str]:
    """Returns the pieces of a line as SVG `points`; a missing value breaks the line."""
    pieces: list[list[str]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{x:g},{y:g}")
    return [" ".join(piece) for piece in pieces if piece]


def _short(text: str) -> str:
    return text if len(text) <= 14 else f"{text[:13]}…"


def _rounded(value: float) -> float:
    return round(value, 1)
