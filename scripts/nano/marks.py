"""Marks: the classes that training asks the tower and the streams to predict for each patch and each image token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from granite4v.clip_projector.grid_anyres import best_resolution
from scripts.nano.documents import Document
from scripts.nano.drawing import ENDING, START
from scripts.nano.reading import EDGE, FIRST_CODE, N_CLASSES, N_CODES, N_SLOTS, NEAR_PX, Page
from scripts.nano.spec import grid_side, tiling, tokens_side
from scripts.nano.truth import Table
from tests.toy.spec import CheckpointSpec

# Kind of the table cell that begins with a glyph: of the body, or a header; 0 if none begins there.
CELL, HEADER = 1, 2
# Marks of a patch: its first and second glyph, the two before the first one in the same text, the gap before the first
# one, whether a text ends there, and which kind of cell begins with the first glyph.
PATCH_CLASSES = (N_CLASSES, N_CLASSES, N_CLASSES, N_CLASSES, 4, 2, 3)
# Marks of an image token in the stream of one slot: the glyph, the two before it in its text, the gap before it, and
# which kind of cell begins there.
SLOT_CLASSES = (N_CLASSES, N_CLASSES, N_CLASSES, 4, 3)
# Marks of an image token in the place stream: whether a text begins and whether one ends there, the last four glyphs of
# the text that ends, row and column of the token in its tile, and the height of the line's middle in the token.
PLACE_CLASSES = (2, 2, N_CLASSES, N_CLASSES, N_CLASSES, N_CLASSES, 9, 9, 5)
PLACE_AT = N_SLOTS * len(SLOT_CLASSES)  # index of the first place mark of a token, after those of its slots
N_TOKEN_MARKS = PLACE_AT + len(PLACE_CLASSES)
OPEN = 255  # marks of a slot or patch in which a glyph may or may not be seen; not trained


@dataclass(frozen=True)
class _Glyphs:
    """Arrays with one entry per glyph. Codes count from 1; 0 is a character that is not read."""

    code: np.ndarray
    before: list[np.ndarray]  # the three glyphs before it in its text: 0 before the text's first, EDGE in another tile
    starts: np.ndarray  # whether its text begins with it
    ends: np.ndarray  # whether its text ends with it, ignoring a colon
    begins: np.ndarray  # CELL or HEADER where a table cell begins with it
    gap: np.ndarray  # ADJACENT, SPACE or START: the gap between it and the glyph before


def marks_of(document: Document, page: Page, spec: CheckpointSpec) -> tuple[np.ndarray, np.ndarray]:
    """Returns the marks of each patch, (n_tiles, patches, ..), and of each image token, (n_tiles, tokens, ..).

    The overview tile has only row and column marks: its scaled-down text is not meant to be read.
    """
    side, tokens, px, patch = grid_side(spec), tokens_side(spec), spec.tile_px, spec.patch_px
    height, width = best_resolution(document.picture.size, tiling(spec).image_grid_pinpoints)
    columns = width // px
    n_tiles = 1 + columns * (height // px)
    patches = np.zeros((n_tiles, side, side, len(PATCH_CLASSES)), dtype=np.uint8)
    marks = np.zeros((n_tiles, tokens, tokens, N_TOKEN_MARKS), dtype=np.uint8)
    marks[..., PLACE_AT + 6] = np.arange(1, tokens + 1)[:, None]
    marks[..., PLACE_AT + 7] = np.arange(1, tokens + 1)
    glyphs = _glyphs(document, page, px)
    inside = (page.x >= 0) & (page.x < width) & (page.y >= 0) & (page.y < height) & (glyphs.code > 0)
    tile = 1 + page.y // px * columns + page.x // px
    for i in np.argsort(page.x, kind="stable").tolist():
        if not inside[i]:
            continue
        x, y = page.x[i] % px, page.y[i] % px
        _mark_patch(patches[int(tile[i]), int(y // patch), int(x // patch)], glyphs, i)
        if page.slot[i] >= 0:
            here = marks[int(tile[i]), int(y // (2 * patch)), int(x // (2 * patch))]
            _mark_token(here, glyphs, i, int(page.slot[i]))
            here[PLACE_AT + 8] = 1 + int(y % (2 * patch) // (patch / 2))
    for row, column, slot in page.open:
        if 0 <= column < width // (2 * patch) and 0 <= row < height // (2 * patch):
            at = 1 + row // tokens * columns + column // tokens
            first = slot * len(SLOT_CLASSES)
            marks[at, row % tokens, column % tokens, first : first + len(SLOT_CLASSES)] = OPEN
    for i in np.flatnonzero(inside).tolist():
        _open_beside(patches[int(tile[i])], page.x[i] % px, page.y[i] % px, px, patch)
    return patches.reshape(n_tiles, side * side, -1), marks.reshape(n_tiles, tokens * tokens, -1)


def _glyphs(document: Document, page: Page, px: int) -> _Glyphs:
    code, gap = document.glyphs.code - FIRST_CODE + 1, document.glyphs.gap.astype(int)
    code = np.where((code >= 1) & (code <= N_CODES), code, 0)
    tile_x, tile_y = page.x // px, page.y // px
    starts = np.isin(gap, (START, START + ENDING))
    before = []
    seen = starts  # whether the text begins within the steps so far
    cut_off = np.zeros(len(code), dtype=bool)
    for steps in (1, 2, 3):
        cut_off = cut_off | (np.roll(tile_x, steps) != tile_x) | (np.roll(tile_y, steps) != tile_y)
        before.append(np.where(seen, 0, np.where(cut_off, EDGE, np.roll(code, steps))))
        seen = seen | np.roll(starts, steps)
    ends = np.zeros(len(code), dtype=bool)
    ends[[text.last_but_colon for text in page.texts]] = True
    begins = _cells_that_begin(document, page, len(code))
    return _Glyphs(code, before, starts, ends, begins, gap - ENDING * (gap > ENDING))


def _mark_patch(here: np.ndarray, glyphs: _Glyphs, i: int) -> None:
    """Adds the patch's next glyph: all marks for the first one, its character and a text's end for a later one."""
    here[5] |= glyphs.ends[i]
    if here[0]:
        here[1] = glyphs.code[i]
    else:
        here[:5] = glyphs.code[i], 0, glyphs.before[0][i], glyphs.before[1][i], glyphs.gap[i]
        here[6] = glyphs.begins[i]


def _mark_token(here: np.ndarray, glyphs: _Glyphs, i: int, slot: int) -> None:
    """Adds a glyph to its slot of an image token, and whether a text begins or ends in the token."""
    first = slot * len(SLOT_CLASSES)
    before = [known[i] for known in glyphs.before]
    here[first : first + len(SLOT_CLASSES)] = glyphs.code[i], *before[:2], glyphs.gap[i], glyphs.begins[i]
    here[PLACE_AT] |= glyphs.starts[i]
    if glyphs.ends[i]:
        here[PLACE_AT + 1 : PLACE_AT + 6] = 1, glyphs.code[i], *before


def _open_beside(patches: np.ndarray, x: float, y: float, px: int, patch: int) -> None:
    """Marks empty patches as OPEN if they are so close to a glyph that part of it may lie on them."""
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        beside_x, beside_y = x + dx * NEAR_PX[0], y + dy * NEAR_PX[1]
        if 0 <= beside_x < px and 0 <= beside_y < px:
            here = patches[int(beside_y // patch), int(beside_x // patch)]
            here[:5] = here[:5] if here[0] else OPEN


def _cells_that_begin(document: Document, page: Page, n_glyphs: int) -> np.ndarray:
    """Returns for every glyph CELL or HEADER if it is the first one of a table cell, else 0."""
    begins, table = np.zeros(n_glyphs, dtype=np.uint8), document.truth
    if isinstance(table, Table):
        shown = [cell for cell in table.cells if cell.text]
        for cell, text in zip(shown, page.texts, strict=True):
            begins[text.first] = HEADER if cell.header or cell.row < table.n_header_rows else CELL
    return begins
