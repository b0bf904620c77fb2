"""Synthetic documents: the image of a table, chart or form, and its exact contents.

`draw_document` generates contents and image from one seed; `draw` draws given contents. A `level` from 0 to 1 ranges
from one short row on clean paper to all layouts, noise and sizes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image

from scripts.nano.contents import random_chart, random_form, random_table
from scripts.nano.drawing import RGB, Glyphs, Ink, Sheet, fonts, held_out_font, page, photographed
from scripts.nano.layouts import lay_chart, lay_form, lay_table
from scripts.nano.truth import Chart, Form, Table

__all__ = ["HELD_OUT_SEEDS", "KINDS", "Document", "Glyphs", "draw", "draw_document", "fonts", "held_out_font"]

Truth = Table | Chart | Form
HELD_OUT_SEEDS = 1_000_000_000  # seeds from here on are never trained on
KINDS = ("table", "chart", "form")
_SHARES = (45, 27, 28)
_TRIES = 30
_RANDOM: dict[str, Callable[[Random, float], Truth]] = {
    "table": random_table,
    "chart": random_chart,
    "form": random_form,
}


@dataclass(frozen=True)
class Document:
    """An image and its contents; `kind` is one of `KINDS`."""

    kind: str
    picture: Image.Image
    truth: Truth
    glyphs: Glyphs
    font: str
    seed: int


def draw_document(seed: int, kind: str | None = None, level: float = 1.0, font: str | None = None) -> Document:
    """Draws the document of a seed; the same arguments give the same image with the same library versions."""
    rng = Random(f"{seed} {kind} {level} {font}")
    kind = kind or rng.choices(KINDS, _SHARES)[0]
    for _ in range(_TRIES):
        document = _drawn(rng, _RANDOM[kind](rng, level), seed, level, font)
        if document:
            return document
    raise AssertionError(f"no document of kind '{kind}' fits a page at seed {seed}")


def draw(truth: Truth, seed: int = 0, level: float = 1.0, font: str | None = None) -> Document:
    """Draws given contents in a style that the seed chooses. Raises ValueError when they do not fit a readable page."""
    rng = Random(f"{seed} {level} {font}")
    for _ in range(_TRIES):
        document = _drawn(rng, truth, seed, level, font)
        if document:
            return document
    raise ValueError(f"this {type(truth).__name__} is too large for a page of readable text")


def _drawn(rng: Random, truth: Truth, seed: int, level: float, font: str | None) -> Document | None:
    """Makes one attempt. Returns None when texts would overlap or be too small."""
    font = font or rng.choice(sorted(fonts()))
    ink, look, margin = _ink(rng, level), rng.getrandbits(32), rng.uniform(0.5, 1.2)

    def lay(size: float) -> Sheet:
        if isinstance(truth, Table):
            return lay_table(truth, Random(look), font, size, ink)
        if isinstance(truth, Chart):
            return lay_chart(truth, Random(look), font, size, ink)
        return lay_form(truth, Random(look), font, size, ink)

    drawn = page(rng, lay, ink.paper, margin, scans=0.6 * level)
    if not drawn:
        return None
    picture, glyphs, margin_px = drawn
    if rng.random() < 0.5 * level:
        picture, glyphs = photographed(rng, picture, glyphs, ink.paper, margin_px, level)
    return Document(KINDS[(Table, Chart, Form).index(type(truth))], picture, truth, glyphs, font, seed)


def _ink(rng: Random, level: float) -> Ink:
    """Chooses dark text on light paper, and colours or greys for series, clearly different for neighbours."""
    paper = _grey(rng, 215, 255, 5) if rng.random() < 0.5 * level else (255, 255, 255)
    text = _grey(rng, 0, 70) if rng.random() < 0.7 else (rng.randint(0, 40), rng.randint(0, 50), rng.randint(60, 120))
    depth = rng.randint(14, 40)
    shade = (paper[0] - depth, paper[1] - depth, paper[2] - rng.choice((depth, depth // 2)))
    if rng.random() < 0.25:
        first = rng.randint(30, 80)
        series = tuple((v, v, v) for v in (first + step for step in (0, 110, 55, 135, 25, 85, 10)))
    else:
        hue, step = rng.random(), rng.choice((0.38, 0.44, 0.55, 0.62))
        series = tuple(_vivid(rng, hue + i * step) for i in range(7))
    return Ink(paper, text, _grey(rng, 0, 150), shade, series)


def _grey(rng: Random, low: int, high: int, spread: int = 0) -> RGB:
    """Returns a grey whose channels vary by at most `spread`."""
    grey = rng.randint(low, high)
    red, green, blue = (max(0, min(255, grey + rng.randint(-spread, spread))) for _ in range(3))
    return red, green, blue


def _vivid(rng: Random, hue: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.5, 0.95), rng.uniform(0.5, 0.9))
    return round(red * 255), round(green * 255), round(blue * 255)
