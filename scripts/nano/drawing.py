"""Fonts, sheets that record the position of each glyph, and the effects that make a sheet look like a photo.

A sheet is independent of tables and charts. A page is fitted to the grid of tiles that the model will choose.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

RGB = tuple[int, int, int]
TILE_PX, MOST_TILES = 160, 8
NOMINAL_PX = 16.0  # the font size that a sheet is measured at
PLACES = 16  # positions tried for a sheet on its page
SMALLEST_PX = 15.5  # font size as the model sees it, below which a page counts as unreadable

AILERON = "Aileron"
HELD_OUT = "Hanken Grotesk"
_MPL = "mpl-data/fonts/ttf"
_FILES = {  # name: package, regular file, bold file
    "DejaVu Sans": ("matplotlib", f"{_MPL}/DejaVuSans.ttf", f"{_MPL}/DejaVuSans-Bold.ttf"),
    "DejaVu Serif": ("matplotlib", f"{_MPL}/DejaVuSerif.ttf", f"{_MPL}/DejaVuSerif-Bold.ttf"),
    "Hanken Grotesk": ("font_hanken_grotesk", "files/HankenGrotesk-Regular.otf", "files/HankenGrotesk-Bold.otf"),
    "Roboto": ("font_roboto", "files/Roboto-Regular.ttf", "files/Roboto-Bold.ttf"),
    "Roboto Light": ("font_roboto", "files/Roboto-Light.ttf", "files/Roboto-Medium.ttf"),
    "Source Sans": ("font_source_sans_pro", "files/SourceSansPro-Regular.otf", "files/SourceSansPro-Bold.otf"),
    "Source Serif": ("font_source_serif_pro", "files/SourceSerifPro-Regular.otf", "files/SourceSerifPro-Bold.otf"),
}


@functools.cache
def _installed() -> dict[str, tuple[Path, Path]]:
    """Returns the regular and bold file of every font whose package is installed."""
    found = {}
    for name, (package, *files) in _FILES.items():
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            regular, bold = (Path(spec.origin).parent / file for file in files)
            if regular.exists() and bold.exists():
                found[name] = (regular, bold)
    return found


def fonts() -> dict[str, Path | None]:
    """Returns the training fonts by name; Pillow's built-in one has no file."""
    return {AILERON: None} | {name: files[0] for name, files in _installed().items() if name != HELD_OUT}


def held_out_font() -> str:
    """Returns the font that no training document uses. Raises LookupError when its package is not installed."""
    if HELD_OUT not in _installed():
        raise LookupError(f"the held-out font '{HELD_OUT}' is not installed; pip install font-hanken-grotesk")
    return HELD_OUT


class Face:
    """A font at a size, with the metrics to place each glyph."""

    def __init__(self, font: FreeTypeFont, size: float) -> None:
        self.font, self.size = font, size
        self._advance: dict[str, float] = {}
        self._middle: dict[str, float] = {}

    def _length(self, text: str) -> float:
        if text not in self._advance:
            self._advance[text] = self.font.getlength(text)
        return self._advance[text]

    def starts(self, text: str) -> list[float]:
        """Returns the pen position of each character and, last, of the end, in pixels."""
        x, positions = 0.0, []
        for i, char in enumerate(text):
            if i:
                x += self._length(text[i - 1 : i + 1]) - self._length(char)
            positions.append(x)
        return [*positions, x + self._length(text[-1])] if text else [0.0]

    def width(self, text: str) -> float:
        return self.starts(text)[-1]

    def middle(self, char: str) -> float:
        """Returns the middle of the ink, in pixels to the right of the pen position."""
        if char not in self._middle:
            left, _, right, _ = self.font.getbbox(char, anchor="ls")
            self._middle[char] = (left + right) / 2
        return self._middle[char]


@functools.cache
def _data(path: Path) -> bytes:
    return path.read_bytes()


@functools.lru_cache(maxsize=600)
def _face(name: str, bold: bool, size: float) -> Face:
    basic = ImageFont.Layout.BASIC  # the same spacing whether or not Pillow was built with raqm
    if name == AILERON:
        default = ImageFont.load_default(size)
        assert isinstance(default, ImageFont.FreeTypeFont)
        return Face(default.font_variant(layout_engine=basic), size)
    data = io.BytesIO(_data(_installed()[name][bold]))
    return Face(ImageFont.truetype(data, size, layout_engine=basic), size)


def face(name: str, size: float, bold: bool = False) -> Face:
    """Returns a cached face, its size rounded to half a pixel. Raises KeyError for a font that is not installed."""
    return _face(name, bold, round(size * 2) / 2)


ADJACENT, SPACE, START, ENDING = 1, 2, 3, 3
CAPITAL_MIDDLE = 0.36  # height of the middle of capital letters above the base line, as a share of the font size


@dataclass(frozen=True)
class Glyphs:
    """Every visible glyph of an image, text by text.

    `x`: middle of its ink, `y`: middle of its line's capital letters, both in pixels. `code`: its code point. `gap`:
    whether it is `ADJACENT` to the glyph before it, follows a `SPACE`, or is the `START` of a text; `ENDING` is added
    for the last glyph of a text.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    code: NDArray[np.int32]
    gap: NDArray[np.uint8]

    def moved(self, x: NDArray[Any], y: NDArray[Any]) -> Glyphs:
        return replace(self, x=x.astype(np.float32), y=y.astype(np.float32))


@dataclass(frozen=True)
class Ink:
    """The colours of a page. `series`: colours of bars, lines and slices."""

    paper: RGB
    text: RGB
    rule: RGB
    shade: RGB
    series: tuple[RGB, ...]


class Sheet:
    """Shapes and texts in pixels from an arbitrary origin; rendered once the page is known."""

    def __init__(self) -> None:
        self._shapes: list[Callable[[ImageDraw.ImageDraw, float, float], None]] = []
        self._texts: list[tuple[float, float, str, Face, RGB, RGB | None]] = []
        self.text_boxes: list[tuple[float, float, float, float]] = []
        self._extent = [math.inf, math.inf, -math.inf, -math.inf]

    def _grow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        e = self._extent
        self._extent = [min(e[0], x0), min(e[1], y0), max(e[2], x1), max(e[3], y1)]

    def extent(self) -> tuple[float, float, float, float]:
        """Returns left, top, right and bottom of everything on the sheet; zeros for an empty sheet."""
        x0, y0, x1, y1 = self._extent
        return (x0, y0, x1, y1) if x0 <= x1 else (0.0, 0.0, 0.0, 0.0)

    def text(
        self, x: float, y: float, text: str, face: Face, fill: RGB, align: float = 0.0, halo: RGB | None = None
    ) -> None:
        """Adds a text. `y`: middle of capital letters. `x`: left end (align 0), middle (0.5) or right end (1)."""
        if not text:
            return
        width = face.width(text)
        x, y = x - align * width, y + CAPITAL_MIDDLE * face.size
        self._texts.append((x, y, text, face, fill, halo))
        box = (x, y - 0.8 * face.size, x + width, y + 0.25 * face.size)
        self.text_boxes.append(box)
        self._grow(*box)

    def line(self, x0: float, y0: float, x1: float, y1: float, fill: RGB, width: int = 1) -> None:
        self._grow(x0, y0, x1, y1)
        self._shapes.append(
            lambda pen, dx, dy: pen.line(
                (round(x0 + dx), round(y0 + dy), round(x1 + dx), round(y1 + dy)), fill=fill, width=width
            )
        )

    def box(
        self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None, rule: RGB | None = None, width: int = 1
    ) -> None:
        self._grow(x0, y0, x1, y1)
        self._shapes.append(
            lambda pen, dx, dy: pen.rectangle(
                (round(x0 + dx), round(y0 + dy), round(x1 + dx), round(y1 + dy)), fill, rule, width
            )
        )

    def disc(self, x: float, y: float, radius: float, fill: RGB) -> None:
        self._grow(x - radius, y - radius, x + radius, y + radius)
        self._shapes.append(
            lambda pen, dx, dy: pen.ellipse((x + dx - radius, y + dy - radius, x + dx + radius, y + dy + radius), fill)
        )

    def slice(self, x: float, y: float, radius: float, start: float, end: float, fill: RGB, rule: RGB) -> None:
        """Adds a slice of a pie; angles are in degrees clockwise from three o'clock."""
        self._grow(x - radius, y - radius, x + radius, y + radius)
        self._shapes.append(
            lambda pen, dx, dy: pen.pieslice(
                (x + dx - radius, y + dy - radius, x + dx + radius, y + dy + radius), start, end, fill, rule
            )
        )

    def has_overlaps(self) -> bool:
        """Whether two texts overlap."""
        boxes = self.text_boxes
        return any(
            a[0] < b[2] and b[0] < a[2] and a[1] + 1 < b[3] and b[1] + 1 < a[3]
            for i, a in enumerate(boxes)
            for b in boxes[:i]
        )

    def render(self, width: int, height: int, dx: float, dy: float, paper: RGB) -> tuple[Image.Image, Glyphs]:
        """Draws the sheet on a page of `width` by `height` pixels, its origin moved by (dx, dy)."""
        picture = Image.new("RGB", (width, height), paper)
        pen = ImageDraw.Draw(picture)
        for shape in self._shapes:
            shape(pen, dx, dy)
        xs, ys, codes, gaps = [], [], [], []
        for x, y, text, face, fill, halo in self._texts:
            if halo:
                around = max(1, round(face.size / 7))
                pen.text((x + dx, y + dy), text, halo, face.font, anchor="ls", stroke_width=around)
            pen.text((x + dx, y + dy), text, fill, face.font, anchor="ls")
            gap = START
            for char, start in zip(text, face.starts(text), strict=False):
                if char != " ":
                    xs.append(x + dx + start + face.middle(char))
                    ys.append(y + dy - CAPITAL_MIDDLE * face.size)
                    codes.append(ord(char))
                    gaps.append(gap)
                    gap = ADJACENT
                elif gap == ADJACENT:
                    gap = SPACE
            if gap != START:
                gaps[-1] += ENDING
        glyphs = Glyphs(
            np.array(xs, np.float32),
            np.array(ys, np.float32),
            np.array(codes, np.int32),
            np.array(gaps, np.uint8),
        )
        return picture, glyphs


# --- pages ---


@functools.cache
def grids() -> tuple[tuple[int, int], ...]:
    """Returns every grid of tiles that the model supports, (width, height) in tiles."""
    sides = range(1, MOST_TILES + 1)
    return tuple((w, h) for h in sides for w in sides if w * h <= MOST_TILES)


def best_grid(width: int, height: int) -> tuple[tuple[int, int], float]:
    """Returns the grid that the model's preprocessing chooses for an image, in tiles, and the resizing factor."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        w, h = grid[0] * TILE_PX, grid[1] * TILE_PX
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - w * h

    grid = max(grids(), key=merit)
    return grid, min(grid[0] * TILE_PX / width, grid[1] * TILE_PX / height)


def n_cut_letters(boxes: list[tuple[float, float, float, float]], width: int, height: int, size: float) -> int:
    """Estimates how many letters of the texts in `boxes` are cut by an edge between tiles, on a page of this size."""
    (columns, rows), scale = best_grid(width, height)
    dx, dy = (columns * TILE_PX - int(width * scale)) // 2, (rows * TILE_PX - int(height * scale)) // 2
    count = 0
    for x0, y0, x1, y1 in boxes:
        middle = (y0 + y1) / 2 * scale + dy
        row = round(middle / TILE_PX)
        if 0 < row < rows and abs(middle - row * TILE_PX) < 0.4 * size * scale:
            count += round((x1 - x0) / (0.5 * size))
        count += int((x1 * scale + dx) // TILE_PX) - int((x0 * scale + dx) // TILE_PX)
    return count


def _page_size(rng: Random, em_width: float, em_height: float, scans: float) -> tuple[float, bool, int, int] | None:
    """Chooses font size, whether the page fills its grid of tiles, width and height, for a sheet measured in em."""

    def seen(grid: tuple[int, int]) -> float:
        """Returns the font size that the model sees when the page just fills a grid."""
        return min(grid[0] * TILE_PX / em_width, grid[1] * TILE_PX / em_height)

    larger = [g for g in grids() if g != (1, 1)]  # for a page of one tile the overview would show the same again
    roomy = max((g for g in larger if g[0] * g[1] > MOST_TILES - 3), key=seen)
    if SMALLEST_PX < seen(roomy) < 24 and rng.random() < scans:
        grid, enlarged = roomy, rng.uniform(1.5, 3.0)
        size, fill = seen(grid) * enlarged, True
        width, height = (round(side * TILE_PX * enlarged) for side in grid)
    else:
        wanted = rng.uniform(SMALLEST_PX + 0.5, 18.0)
        fitting = [g for g in larger if seen(g) >= wanted] or [g for g in larger if seen(g) >= SMALLEST_PX]
        if not fitting:
            return None
        grid = min(fitting, key=lambda g: (g[0] * g[1], -seen(g)))
        at_model = min(seen(grid), rng.uniform(17.0, 22.0))
        shrunk = rng.uniform(1.0, min(1.25, max(1.0, at_model / SMALLEST_PX)))
        size, fill = at_model / shrunk, rng.random() < 0.5
        width, height = (int(side * TILE_PX / shrunk) for side in grid)
    return size, fill, width, height


def page(
    rng: Random, lay: Callable[[float], Sheet], paper: RGB, margin: float, scans: float
) -> tuple[Image.Image, Glyphs, float] | None:
    """Draws a page with the sheet that `lay` returns for a font size. Returns also the margin in pixels.

    Returns None when no grid of tiles can hold it readably, or texts would overlap. `margin` is in font sizes. Most
    pages are a little smaller than their grid; a share of `scans` of the dense ones is far larger. Of `PLACES`
    positions for the sheet, the one where tile edges cut the fewest letters is taken, since cut letters are hard to
    read.
    """
    x0, y0, x1, y1 = lay(NOMINAL_PX).extent()
    em_width, em_height = ((x1 - x0) / NOMINAL_PX + 2 * margin) * 1.03, ((y1 - y0) / NOMINAL_PX + 2 * margin) * 1.03

    sized = _page_size(rng, em_width, em_height, scans)
    if sized is None:
        return None
    size, fill, width, height = sized
    finer = 2 if size < 24 and rng.random() < 0.6 else 1
    sheet = lay(size * finer)
    if sheet.has_overlaps():
        return None
    x0, y0, x1, y1 = (side / finer for side in sheet.extent())
    need_x, need_y = math.ceil(x1 - x0 + 2 * margin * size), math.ceil(y1 - y0 + 2 * margin * size)
    room = (max(width, need_x), max(height, need_y))

    def placed() -> tuple[int, int, float, float]:
        """Draws a page's width and height, and the position of the sheet on it."""
        width, height = room
        if not fill and need_x / width > need_y / height:
            height = rng.randint(min(need_y, height), height)
        elif not fill:
            width = rng.randint(min(need_x, width), width)
        left = margin * size + rng.choice((0.0, 0.5, rng.random())) * (width - need_x)
        top = margin * size + rng.choice((0.0, 0.5, rng.random())) * (height - need_y)
        return width, height, left, top

    def n_cut(place: tuple[int, int, float, float]) -> int:
        width, height, left, top = place
        boxes = [[side / finer for side in box] for box in sheet.text_boxes]
        moved = [(a - x0 + left, b - y0 + top, c - x0 + left, d - y0 + top) for a, b, c, d in boxes]
        return n_cut_letters(moved, width, height, size)

    width, height, left, top = min((placed() for _ in range(PLACES)), key=n_cut)
    picture, glyphs = sheet.render(width * finer, height * finer, (left - x0) * finer, (top - y0) * finer, paper)
    if finer > 1:  # drawn larger and reduced, letters keep their true shapes and distances, unlike hinted text
        picture, glyphs = picture.reduce(finer), glyphs.moved(glyphs.x / finer, glyphs.y / finer)
    return picture, glyphs, margin * size


def photographed(
    rng: Random, picture: Image.Image, glyphs: Glyphs, paper: RGB, margin_px: float, level: float
) -> tuple[Image.Image, Glyphs]:
    """Rotates the page a little, blurs it, adds noise and compresses it with JPEG, each with its own probability."""
    if rng.random() < 0.4:
        most = min(0.5, math.degrees(margin_px / max(picture.size)))  # nothing may leave the page
        picture, glyphs = turned(picture, glyphs, rng.uniform(-most, most), paper)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.3 + 0.3 * level)))
    if rng.random() < 0.4:
        noise = np.random.default_rng(rng.getrandbits(32))
        values = np.asarray(picture, np.float32)
        grain = noise.standard_normal(values.shape[:2], np.float32) * rng.uniform(2, 2 + 6 * level)
        picture = Image.fromarray(np.clip(values + grain[..., None], 0, 255).astype(np.uint8))
    if rng.random() < 0.6:
        squeezed = io.BytesIO()
        picture.save(squeezed, "JPEG", quality=rng.randint(round(90 - 40 * level), 90))
        picture = Image.open(squeezed).convert("RGB")
    return picture, glyphs


def turned(picture: Image.Image, glyphs: Glyphs, degrees: float, paper: RGB) -> tuple[Image.Image, Glyphs]:
    """Rotates image and glyphs counter-clockwise about the middle; the page keeps its size."""
    small = max(picture.size) < 600
    sampling = Image.Resampling.BICUBIC if small else Image.Resampling.BILINEAR
    out = picture.rotate(degrees, sampling, fillcolor=paper)
    angle = math.radians(degrees)
    cx, cy = picture.width / 2, picture.height / 2
    x, y = glyphs.x - cx, glyphs.y - cy
    cos, sin = math.cos(angle), math.sin(angle)
    return out, glyphs.moved(cx + x * cos + y * sin, cy - x * sin + y * cos)
