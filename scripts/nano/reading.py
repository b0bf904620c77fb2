"""Computes how a page is read: positions of glyphs on the model's grid, addresses of texts, and lessons for the heads.

A text's address is its line on the page and its place in that line. An answer's next letter is the next glyph of the
text at the current address, or the first one at the next address. The decoder's heads are taught to find it.
"""

from __future__ import annotations

import html
import itertools
import json
import re
from dataclasses import dataclass, field

import numpy as np

from granite4v.clip_projector.grid_anyres import best_resolution, fit_size, layout
from scripts.nano.documents import Document
from scripts.nano.drawing import ENDING, START
from scripts.nano.spec import tiling, tokens_side
from scripts.nano.truth import Chart, Form, Table
from tests.toy.spec import CheckpointSpec

FIRST_CODE, N_CODES = 33, 94  # the visible ASCII characters; class 0 is none
EDGE = N_CODES + 1  # class of a preceding glyph that is in another tile
N_CLASSES = N_CODES + 2
N_SLOTS = 4  # of an image token: the first glyph of its left and right half, then the second ones
MOST_LINES, MOST_PLACES = 16, 8  # larger addresses are clamped


@dataclass(frozen=True)
class Text:
    """A text of the page: indices of its first and last glyph, and its letters without spaces."""

    first: int
    last: int
    letters: str

    @property
    def last_but_colon(self) -> int:
        return self.last - int(len(self.letters) > 1 and self.letters[-1] == ":")


def texts_of(document: Document) -> list[Text]:
    """Returns all texts in drawing order."""
    page = "".join(map(chr, document.glyphs.code.tolist()))
    starts = np.flatnonzero(np.isin(document.glyphs.gap, (START, START + ENDING))).tolist()
    return [Text(start, end - 1, page[start:end]) for start, end in zip(starts, [*starts[1:], len(page)], strict=True)]


# --- the page on the model's grid ---


@dataclass(frozen=True)
class Page:
    """A document as the model sees it. Arrays have one entry per glyph; -1 where the model has no slot for it.

    `x`, `y`: pixels of the tiled image. `token`: index among the image's tokens, from 0. `slot`: slot in that token.
    `address`: (line, place in the line) of every text. A glyph on the edge between two slots may also be seen in the
    other one, `other_token` and `other_slot` (for other glyphs these equal `token` and `slot`). `open`: slots, as (row
    and column of the token, slot), that may therefore be empty or not.
    """

    texts: list[Text]
    x: np.ndarray
    y: np.ndarray
    token: np.ndarray
    slot: np.ndarray
    address: list[tuple[int, int]]
    other_token: np.ndarray
    other_slot: np.ndarray
    open: list[tuple[int, int, int]]


def page_of(document: Document, spec: CheckpointSpec) -> Page:
    """Computes the positions and addresses of everything on a document's page."""
    size = document.picture.size
    resolution = best_resolution(size, tiling(spec).image_grid_pinpoints)
    fitted = fit_size(size, resolution)
    where = layout(size, tiling(spec), tokens_side(spec))
    x = document.glyphs.x * (fitted[0] / size[0]) + (resolution[1] - fitted[0]) // 2
    y = document.glyphs.y * (fitted[1] / size[1]) + (resolution[0] - fitted[1]) // 2
    texts = texts_of(document)
    text_of = np.repeat(np.arange(len(texts)), [text.last - text.first + 1 for text in texts])
    address = addresses([(x[text.first], float(np.mean(y[text.first : text.last + 1]))) for text in texts])

    px = 2 * spec.patch_px
    column, row = (x // px).astype(int), (y // px).astype(int)
    halves: dict[Half, list[int]] = {}
    for i in np.argsort(x, kind="stable").tolist():
        halves.setdefault((int(row[i]), int(column[i]), int(x[i] % px >= px / 2)), []).append(i)

    def slots(half: Half, glyphs: list[int]) -> dict[int, Place]:
        """Assigns the half's two slots: to the first and the last glyph of its uppermost line."""
        lines = [address[text_of[i]][0] for i in glyphs]
        here = [i for i, line in zip(glyphs, lines, strict=True) if line == min(lines)]
        return {i: (*half[:2], half[2] + 2 * n) for n, i in ((1, here[-1]), (0, here[0]))} if here else {}

    places = {i: place for half, glyphs in halves.items() for i, place in slots(half, glyphs).items()}
    others: dict[int, Place] = {}
    unsure: set[Place] = set()
    for half, glyphs in halves.items():
        for i in glyphs:
            if i in places:
                for beside in _beside(half, float(x[i]), float(y[i]), spec):
                    there = halves.get(beside, [])
                    if beside[0] != half[0]:
                        moved = {} if there else {i: (*beside[:2], places[i][2])}
                    else:
                        moved = slots(half, [k for k in glyphs if k != i])
                        moved |= slots(beside, sorted([*there, i], key=lambda k: x[k]))
                    moved = {k: place for k, place in moved.items() if places.get(k, place) != place}
                    others |= moved
                    unsure |= set(moved.values())

    def tokens(found: dict[int, Place]) -> tuple[np.ndarray, np.ndarray]:
        token, slot = np.full(len(x), -1), np.full(len(x), -1)
        for i, (row, column, place) in found.items():
            if where.top <= row < where.bottom and where.left <= column < where.right:
                token[i] = (row - where.top) * (where.right - where.left + 1) + column - where.left
                token[i] += where.tokens_side**2
                slot[i] = place
        return token, slot

    token, slot = tokens(places)
    other_token, other_slot = tokens(places | others)
    other_slot = np.where(other_token < 0, slot, other_slot)
    other_token = np.where(other_token < 0, token, other_token)
    return Page(texts, x, y, token, slot, address, other_token, other_slot, sorted(unsure - set(places.values())))


Half = tuple[int, int, int]  # row and column of an image token in the image, 0 or 1 for its left or right half
Place = tuple[int, int, int]  # row and column of an image token, slot
NEAR_PX = (1.0, 1.2)  # a glyph this close to an edge, horizontally and vertically, may be seen on either side


def _beside(half: Half, x: float, y: float, spec: CheckpointSpec) -> list[Half]:
    """Returns the adjacent halves of the same tile whose edge a glyph is close to: left and right, then up and down."""
    row, column, right = half
    px, tile = 2 * spec.patch_px, spec.tile_px
    aside: list[Half] = []
    down: list[Half] = []
    for step in (-1, 1):
        edge = int((x + step * NEAR_PX[0]) // (px // 2))
        if edge != 2 * column + right and edge * (px // 2) // tile == int(x // tile):
            aside.append((row, edge // 2, edge % 2))
        below = int((y + step * NEAR_PX[1]) // px)
        if below != row and below * px // tile == int(y // tile):
            down.append((below, column, right))
    return aside + down


LINE_PX = 7.0  # texts whose middles are at most this far apart are in one line


def addresses(places: list[tuple[float, float]]) -> list[tuple[int, int]]:
    """Returns (line, place in the line) for texts given as (x of their start, y of their middle), in pixels.

    For example, [(0, 10), (50, 12), (0, 30)] gives [(0, 0), (0, 1), (1, 0)].
    """
    out = [(0, 0)] * len(places)
    lines: list[list[int]] = []
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        if not lines or places[i][1] - places[lines[-1][-1]][1] > LINE_PX:
            lines.append([])
        lines[-1].append(i)
    for line, here in enumerate(lines):
        for place, i in enumerate(sorted(here, key=lambda i: places[i][0])):
            out[i] = (min(line, MOST_LINES - 1), min(place, MOST_PLACES - 1))
    return out


# --- the texts in an answer ---

# the page's texts in the order of an answer, each with its position in the answer, in characters
Told = list[tuple[int, Text]]


def told(document: Document, answer: str) -> tuple[Told, dict[int, Text]]:
    """Returns the page's texts in an answer, and the labels of a form's values, by the value's first glyph."""
    texts = texts_of(document)
    if isinstance(document.truth, Form):
        if document.kind == "form":
            return _told_fields(document.truth, texts, answer)
        return _in_order(texts, answer, ("{}",)), {}  # lines to be copied
    if isinstance(document.truth, Chart):
        rows = chart_rows(document)
        if not rows or answer.count("\n") != len(rows):  # no CSV
            return [], {}
        head = answer.find("\n")
        named = [text for text in texts if text.letters in answer[:head].replace(" ", "").split(",")]
        named.sort(key=lambda text: answer[:head].replace(" ", "").find(text.letters))
        return _in_order(named, answer[:head], ("{}",)) + _in_order(
            [t for row in rows for t in row], answer, ("{}",), head
        ), {}
    return _told_cells(document.truth, texts, answer), {}


def _in_order(texts: list[Text], answer: str, frames: tuple[str, ...], at: int = 0) -> Told:
    """Finds texts one after another in the answer, each within a frame; texts spelled differently are left out."""
    found: Told = []
    for text in texts:
        letters = " ?".join(map(re.escape, text.letters))
        places = [re.compile(frame.replace("{}", f"({letters})")).search(answer, at) for frame in frames]
        place = min((one for one in places if one), key=lambda one: one.start(), default=None)
        if place is not None:
            found.append((place.start(1), text))
            at = place.end(1)
    return found


def _told_cells(table: Table, texts: list[Text], answer: str) -> Told:
    cells = [cell for cell in table.cells if cell.text]
    if len(cells) != len(texts):
        return []
    if answer.startswith("<otsl>"):
        return _in_order(texts, answer, (">{}<",))
    if answer.startswith("<table>"):
        return _in_order(
            [text for text in texts if html.escape(text.letters, quote=False) == text.letters], answer, (">{}</",)
        )
    return _in_order(texts, answer, ('"content": "{}"',))


def _told_fields(form: Form, texts: list[Text], answer: str) -> tuple[Told, dict[int, Text]]:
    found: Told = []
    led: dict[int, Text] = {}
    is_json = answer.startswith("{")
    for name, value in form.fields:
        if not value or (not is_json and (found or answer != value)):
            continue
        for label, text in itertools.pairwise(texts):
            plain = "".join(char for char in label.letters.lower() if char.isalnum())
            if plain == name.replace("_", "") and text.letters == value.replace(" ", ""):
                start = f'"{name}": "'
                at = answer.find(start + json.dumps(value)[1:-1]) + len(start) if is_json else 0
                found.append((at, text))
                led[text.first] = label
                break
    return found, led


def chart_rows(document: Document) -> list[list[Text]]:
    """Returns label and values of each row of a chart; [] if any row is not found."""
    chart = document.truth
    assert isinstance(chart, Chart)
    texts, rows = texts_of(document), []
    for label, values in zip(chart.labels, chart.values, strict=True):
        wanted = [text.replace(" ", "") for text in (label, *values)]
        n = len(wanted)
        for i in range(len(texts) - n + 1):
            if [text.letters for text in texts[i : i + n]] == wanted:
                rows.append(texts[i : i + n])
                break
    return rows if len(rows) == len(chart.labels) else []


# --- what the heads are taught ---


@dataclass
class Lesson:
    """Positions in a conversation, and the positions that a head should attend to from each of them.

    All targets have the same weight, except position 0 where `batches.SINK_WEIGHT` says otherwise.
    """

    queries: list[int] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)

    def add(self, query: int, targets: list[int]) -> None:
        self.queries.append(query)
        self.targets.append(targets)


@dataclass
class Lessons:
    """What the decoder's heads are taught about one conversation.

    - `places`, `lines`: count the texts of the line so far and the lines so far, at image tokens and in the answer, by
      attending to all of them and to position 0
    - `find`: attends to the end of a field's label, or to position 0 for a field that is not on the page; `carry`:
      attends back to the position that did so
    - `looks`: (position, image token, slot, other token, other slot) of the next glyph. Between two texts that is the
      first glyph of the next one. A position that gives the size of a table looks at the text whose address shows it.
    - `shown`, `sought`: (position, line, place) of image tokens, and of the text that an answer's position needs next
    """

    places: Lesson = field(default_factory=Lesson)
    lines: Lesson = field(default_factory=Lesson)
    find: Lesson = field(default_factory=Lesson)
    carry: Lesson = field(default_factory=Lesson)
    looks: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    shown: list[tuple[int, int, int]] = field(default_factory=list)
    sought: list[tuple[int, int, int]] = field(default_factory=list)


def image_lessons(page: Page, image_at: int, lessons: Lessons) -> None:
    """Adds the lessons of image tokens: to find their address by counting.

    For example, a token in the second text of the second line attends to the beginnings of that line's first two texts
    (`places`), and to the beginnings of the first and second line (`lines`), each together with position 0.
    """
    at: dict[int, int] = {}  # image token: its text, or the first drawn of several
    for text in range(len(page.texts)):
        for glyph in range(page.texts[text].first, page.texts[text].last + 1):
            if page.token[glyph] >= 0:
                at.setdefault(int(page.token[glyph]), text)
    begins = {
        page.address[i]: int(page.token[text.first]) for i, text in enumerate(page.texts) if page.token[text.first] >= 0
    }
    for token, text in sorted(at.items()):
        line, place = page.address[text]
        lessons.shown.append((image_at + token, line, place))
        before = [begins[line, k] for k in range(place + 1) if (line, k) in begins and begins[line, k] <= token]
        above = [begins[k, 0] for k in range(line + 1) if (k, 0) in begins and begins[k, 0] <= token]
        lessons.places.add(image_at + token, [0, *(image_at + k for k in before)])
        lessons.lines.add(image_at + token, [0, *(image_at + k for k in above)])


def _look(page: Page, glyph: int, image_at: int) -> tuple[int, int, int, int]:
    return (
        image_at + int(page.token[glyph]),
        int(page.slot[glyph]),
        image_at + int(page.other_token[glyph]),
        int(page.other_slot[glyph]),
    )


def _counted(answer: str, page: Page, token_of_char: dict[int, int], start: int) -> Told:
    """Returns positions of an answer that depend on a table's size, each with the text whose address shows it.

    These are the numbers of rows and columns in JSON, and the beginning of a table in every format: if the first line
    has fewer texts than another one, it has an empty cell. `start`: position of the token before the answer.
    """
    if not answer.startswith(("<otsl>", "<table>", '{"dimensions"')):
        return []
    lowest = max(zip(page.address, page.texts, strict=True), key=lambda pair: pair[0])[1]
    rightmost = max(zip(page.address, page.texts, strict=True), key=lambda pair: (pair[0][1], -pair[0][0]))[1]
    if answer.startswith("<table>"):
        return [(start, rightmost)]
    if answer.startswith("<otsl>"):
        return [(start + 1, rightmost)]
    found: Told = [(start, rightmost)]
    for name, text in (("rows", lowest), ("columns", rightmost), ("total_rows", lowest)):
        at = answer.index(f'"{name}": ') + len(f'"{name}": ')
        if at in token_of_char:
            found.append((token_of_char[at] - 1, text))
    return found


def answer_lessons(
    document: Document,
    answer: str,
    page: Page,
    token_of_char: dict[int, int],
    answer_at: int,
    image_at: int,
    lessons: Lessons,
) -> None:
    """Adds the lessons of an answer. `token_of_char`: position of the token of each of the answer's letters."""
    found, labels = told(document, answer)
    text_at = {text.first: i for i, text in enumerate(page.texts)}
    order = [page.address[text_at[text.first]] for _, text in found]
    in_order = all(one < other for one, other in itertools.pairwise(order)) and not labels
    anchors: dict[tuple[int, int], int] = {}
    last = -1  # position of the last letter so far
    for (at, text), address in zip(found, order, strict=True):
        chars = [at + i for i, char in enumerate(answer[at : at + 2 * len(text.letters)]) if char != " "]
        chars = chars[: len(text.letters)]
        if chars[0] not in token_of_char:
            continue
        anchor = token_of_char[chars[0]] - 1
        anchors[address] = anchor
        before = [anchors[address[0], k] for k in range(address[1] + 1) if (address[0], k) in anchors]
        leaders = {line: position for (line, _), position in reversed(anchors.items())}
        label = labels.get(text.first)
        if label is not None:
            end = int(page.token[label.last_but_colon])
            if end >= 0:
                for position in (anchor - 1, anchor):
                    lessons.find.add(position, [image_at + end])
        elif last >= 0 and page.token[text.first] >= 0:
            for query in range(last, anchor):  # the tokens between two texts depend on where the next text is
                lessons.looks.append((query, *_look(page, text.first, image_at)))
                lessons.sought.append((query, *address))
        for char, glyph in zip(chars, range(text.first, text.last + 1), strict=False):
            if char not in token_of_char or page.token[glyph] < 0:
                continue
            position = token_of_char[char] - 1
            last = position + 1
            spaced = answer[char - 1] == " " and char > chars[0]
            for query in (position - 1, position) if spaced else (position,):
                lessons.looks.append((query, *_look(page, glyph, image_at)))
                lessons.sought.append((query, *address))
                if in_order:
                    lessons.places.add(query, [0, *before])
                    lessons.lines.add(query, [0, *leaders.values()])
                if label is not None:
                    lessons.carry.add(query, [anchor])
    for position, text in _counted(answer, page, token_of_char, answer_at - 1):
        if page.token[text.first] >= 0:
            lessons.looks.append((position, *_look(page, text.first, image_at)))
    if labels and answer.startswith("{"):
        for absent in re.finditer('"(\\w+)": null', answer):
            last = absent.end(1) - 1
            if last in token_of_char:
                lessons.find.add(token_of_char[last], [0])
