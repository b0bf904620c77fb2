"""How a page is read: where its glyphs are on the model's grid, which text stands where, and the way to each letter.

A text's address is its line on the page and its place in that line. An answer's next letter is the glyph at the
address that comes next, behind the letters that were written last: that is what the decoder's heads are taught.
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

FIRST_CODE, N_CODES = 33, 94  # the visible ASCII characters; class 0 stands for none
EDGE = N_CODES + 1  # for a glyph before, when it is in another tile
N_CLASSES = N_CODES + 2
N_SLOTS = 4  # of an image token: the first glyph of its left and right half, then the second ones
MOST_LINES, MOST_PLACES = 16, 8  # addresses beyond are cut off


@dataclass(frozen=True)
class Text:
    """A text of the page: its first glyph, its last one, and its letters without spaces."""

    first: int
    last: int
    letters: str

    @property
    def last_but_colon(self) -> int:
        return self.last - int(len(self.letters) > 1 and self.letters[-1] == ":")


def texts_of(document: Document) -> list[Text]:
    """All texts in the order in which they were drawn."""
    page = "".join(map(chr, document.glyphs.code.tolist()))
    starts = np.flatnonzero(np.isin(document.glyphs.gap, (START, START + ENDING))).tolist()
    return [Text(start, end - 1, page[start:end]) for start, end in zip(starts, [*starts[1:], len(page)], strict=True)]


# --- the page on the model's grid ---


@dataclass(frozen=True)
class Page:
    """A document as the model sees it. Arrays are one entry a glyph; -1 where the model has no place for it.

    `x`, `y` are pixels of the tiled picture, `token` counts the picture's image tokens from 0, `slot` is the place in
    that token; `address` is (line, place in it) of every text. A glyph that stands on an edge between two places may
    as well be seen in the other one, `other_token` and `other_slot`, else the same; `open` are the places, (row and
    column of tokens, slot), that nobody can say to be empty for this.
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
    """Where everything is."""
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
        """Of a half's glyphs of its upper line the first one and the last one."""
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


Half = tuple[int, int, int]  # row and column of an image token in the picture, left or right half of it
Place = tuple[int, int, int]  # row and column, slot
NEAR_PX = (1.0, 1.2)  # so close to an edge between places, to the side or up and down, a glyph may be seen in either


def _beside(half: Half, x: float, y: float, spec: CheckpointSpec) -> list[Half]:
    """The halves of the same tile on whose edge a glyph stands, those up or down behind the others."""
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


LINE_PX = 7.0  # texts whose middles are no farther apart stand in one line


def addresses(places: list[tuple[float, float]]) -> list[tuple[int, int]]:
    """(line, place in it) of texts that begin at x and stand at y, in pixels."""
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


# --- what stands in an answer ---

# what an answer says one after the other: a position in it, and the text there
Told = list[tuple[int, Text]]


def told(document: Document, answer: str) -> tuple[Told, dict[int, Text]]:
    """The texts of the page that an answer tells, and for a form's values their labels, by first glyph."""
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
    """Texts one after the other, each within a frame; those that are spelled otherwise are left out."""
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
    """Label and values of each row of a chart."""
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
    """Positions in a conversation, and what a head should attend to there: every target alike."""

    queries: list[int] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)

    def add(self, query: int, targets: list[int]) -> None:
        self.queries.append(query)
        self.targets.append(targets)


@dataclass
class Lessons:
    """`places` and `lines` count, at image tokens and in the answer, the texts of a line so far and the lines so far;
    `find` looks at the end of a label, `carry` back to where that was done. `looks`: (position, image token, slot, and
    those where it may be seen as well) of the next glyph, between texts the first one of the next, and of the text that
    tells how many there are. `shown`, `sought`: (position, line, place) of image tokens, and of what an answer's
    position looks for.
    """

    places: Lesson = field(default_factory=Lesson)
    lines: Lesson = field(default_factory=Lesson)
    find: Lesson = field(default_factory=Lesson)
    carry: Lesson = field(default_factory=Lesson)
    looks: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    shown: list[tuple[int, int, int]] = field(default_factory=list)
    sought: list[tuple[int, int, int]] = field(default_factory=list)


def image_lessons(page: Page, image_at: int, lessons: Lessons) -> None:
    """What the image tokens should find out: their address, by counting."""
    at: dict[int, int] = {}  # image token: its text, the one that begins there where there are two
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
    """Where a table's JSON says how many rows and columns there are, and the text whose address tells it.

    And where a table begins: when the line with most texts is not the first one, the first one has an empty cell.
    `start` is the position that the answer follows.
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
    """What an answer's positions should do; `token_of_char` are positions of the answer's letters."""
    found, labels = told(document, answer)
    text_at = {text.first: i for i, text in enumerate(page.texts)}
    order = [page.address[text_at[text.first]] for _, text in found]
    in_order = all(one < other for one, other in itertools.pairwise(order)) and not labels
    anchors: dict[tuple[int, int], int] = {}
    last = -1  # position of the letter that was written last
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
            for query in range(last, anchor):  # what stands between two texts depends on where the next one is
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
