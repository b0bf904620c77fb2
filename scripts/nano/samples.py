"""Training samples for the nano model: token ids, labels and tiles, batched by length."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from scripts.nano.reading import EDGE, FIRST_CODE, N_CLASSES, N_CODES, N_SLOTS, NEAR_PX, Lesson, Lessons

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

    from scripts.nano.documents import Document
    from scripts.nano.drawing import RGB
    from scripts.nano.reading import Page
    from scripts.nano.truth import Table
    from tests.toy.spec import CheckpointSpec

# What begins where a table's text does: a cell of its body, or one that stands out as a header; else neither.
CELL, HEADER = 1, 2
# What is known of a patch: its first and second glyph, the two before the first one in the same text, what is between,
# whether a text ends there, and which cell begins with the first glyph.
PATCH_CLASSES = (N_CLASSES, N_CLASSES, N_CLASSES, N_CLASSES, 4, 2, 3)
# What the stream of a slot tells of an image token: the glyph, the two before it in its text, what is between, and
# which cell begins there.
SLOT_CLASSES = (N_CLASSES, N_CLASSES, N_CLASSES, 4, 3)
# What the first stream tells of it: whether a text begins and whether one ends there, the last four glyphs of the text
# that ends, row and column of the token in its tile, and where in the token the line's middle is.
PLACE_CLASSES = (2, 2, N_CLASSES, N_CLASSES, N_CLASSES, N_CLASSES, 9, 9, 5)
N_TOKEN_MARKS = N_SLOTS * len(SLOT_CLASSES) + len(PLACE_CLASSES)
OPEN = 255  # the marks of a slot that a glyph may be seen in or not, and of such a patch
IGNORE = -100
LETTERS = "letters"  # the kind of a sample that is tiles and glyphs only
LESSONS = {"places": "places", "lines": "lines", "far_lines": "lines", "find": "find", "carry": "carry"}
# How many texts position 0 weighs where texts are counted: the share that is left to it tells their number, best where
# they are about as many.
ROW_TOO_MANY_SHARE = 0.06  # of the tables in OTSL and HTML
SINK_WEIGHT = {"places": 2.0, "lines": 2.5, "far_lines": 10.0}


@dataclass(frozen=True)
class Sample:
    """One conversation. `answer_at` is where the answer's tokens begin; `tokens` ends with end-of-text."""

    tokens: list[int]
    answer_at: int
    tiles: np.ndarray | None  # uint8 (n_tiles, px, px, 3)
    image_rows: np.ndarray | None  # as model.token_index with the picture's first tile as 0
    image_at: int
    patches: np.ndarray | None  # uint8 (n_tiles, patches, len(PATCH_CLASSES))
    marks: np.ndarray | None  # uint8 (n_tiles, image tokens, N_TOKEN_MARKS): four slots (or OPEN), then the place
    lessons: Lessons | None
    kind: str
    unlearned: int | None = None  # the place among `tokens` of one that the model is not to say, only to go on from

    def without_overview(self) -> Sample:
        """For the eye alone, which need not know where the tiles stand in a page."""
        assert self.tiles is not None and self.patches is not None and self.marks is not None
        return replace(self, tiles=self.tiles[1:], patches=self.patches[1:], marks=self.marks[1:])


@dataclass(frozen=True)
class Taught:
    """A lesson of a batch: `queries` (m, 2) are (row, position); `pairs` (p, 2) are (query, attended position)."""

    queries: torch.Tensor
    pairs: torch.Tensor
    shares: torch.Tensor  # (p,), that sum to one over a query's pairs


@dataclass(frozen=True)
class Batch:
    """`labels[i]` is the token that follows position i, or IGNORE."""

    tokens: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor | None
    rows: torch.Tensor | None
    positions: torch.Tensor | None
    patches: torch.Tensor | None
    marks: torch.Tensor | None
    lessons: dict[str, Taught]
    looks: torch.Tensor  # (n, 6): row, position, image token's position, slot, and both again where it may be as well
    shown: torch.Tensor  # (n, 4): row, position, line, place
    sought: torch.Tensor  # (n, 4)
    kinds: list[str]


class Prompter:
    """Chat prompts as token ids, rendered by the checkpoint's own template."""

    def __init__(self) -> None:
        import json

        import jinja2
        from tokenizers import Tokenizer

        from scripts.nano.language import CHAT_TEMPLATE, build_tokenizer

        built = build_tokenizer()
        self.n_vocab, self.pad_id, self.end_id, self.image_id = (
            built.n_vocab,
            built.pad_id,
            built.end_of_text_id,
            built.image_id,
        )
        self.tokenizer = Tokenizer.from_str(json.dumps(built.tokenizer_json))
        self._template = jinja2.Environment().from_string(CHAT_TEMPLATE)

    def prompt(self, text: str, image: bool) -> list[int]:
        """Ids up to where the answer begins; with `image`, one placeholder stands for the picture."""
        parts: list[dict[str, str]] = [{"type": "image"}] if image else []
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        rendered = self._template.render(messages=messages, add_generation_prompt=True)
        return self.encode(rendered)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def text_sample(rng: random.Random, prompter: Prompter) -> Sample:
    """What the base model learns from: an instruction and its answer, or plain text."""
    from scripts.nano import corpus

    if rng.random() < 0.15:
        tokens, start = prompter.encode(corpus.plain_text(rng)), 1
    else:
        question, answer = corpus.text_example(rng)
        tokens = prompter.prompt(question, image=False)
        start = len(tokens)
        tokens = tokens + prompter.encode(answer)
    return Sample([*tokens, prompter.end_id], start, None, None, 0, None, None, None, "text")


def ask(document: Document, rng: random.Random) -> tuple[str, str, str]:
    """(task name, prompt text, true answer) for a document; long formats are asked for less often."""
    from scripts.nano import formats
    from scripts.nano.truth import Chart, Table

    truth = document.truth
    if isinstance(truth, Table):
        tag = rng.choices(["<tables_otsl>", "<tables_html>", "<tables_json>"], [54, 26, 20])[0]
        return tag, tag, formats.answer_for(tag, truth)
    if isinstance(truth, Chart):
        tag = rng.choices(["<chart2csv>", "<chart2summary>", "<chart2code>"], [84, 8, 8])[0]
        return tag, tag, formats.answer_for(tag, truth)
    if rng.random() < 0.75:
        return "kvp", formats.kvp_prompt(formats.form_schema(truth)), formats.form_json(truth)
    name = rng.choice(truth.fields)[0]
    return "question", formats.field_question(name), formats.field_answer(truth, name)


def document_sample(document: Document, rng: random.Random, prompter: Prompter, spec: CheckpointSpec) -> Sample:
    """A picture, what is asked about it and the true answer.

    Or, now and then, one that begins a row more than the table has, and leaves it empty: how to go on after a row too
    many has been begun.
    """
    from scripts.nano.truth import Table

    task, question, answer = ask(document, rng)
    if not isinstance(document.truth, Table) or task == "<tables_json>" or rng.random() >= ROW_TOO_MANY_SHARE:
        return _with_picture(document, task, question, answer, prompter, spec)
    longer = _with_row_too_many(document.truth, task)
    pairs = zip(prompter.encode(answer), prompter.encode(longer), strict=False)
    place = next(i for i, (token, other) in enumerate(pairs) if token != other)
    sample = _with_picture(document, task, question, longer, prompter, spec)
    return replace(sample, unlearned=sample.answer_at + place)


def _with_row_too_many(table: Table, task: str) -> str:
    from scripts.nano import formats
    from scripts.nano.truth import Cell

    row = tuple(Cell(table.n_rows, col, "") for col in range(table.n_cols))
    longer = formats.answer_for(task, replace(table, n_rows=table.n_rows + 1, cells=table.cells + row))
    head, tail = longer[: longer.rfind("<nl><ecel>")], longer[longer.rfind("<nl><ecel>") :]
    return head + tail.replace("<ecel>", "<fcel>", 1) if task == "<tables_otsl>" else longer


def _with_picture(
    document: Document, task: str, question: str, answer: str, prompter: Prompter, spec: CheckpointSpec
) -> Sample:
    from granite4v.clip_projector.tiles_anyres import cut
    from scripts.nano.model import tiling, token_index
    from scripts.nano.reading import answer_lessons, image_lessons, page_of

    rows = token_index(document.picture.size, 0, spec)
    prompt = prompter.prompt(question, image=True)
    at = prompt.index(prompter.image_id)
    prompt[at : at + 1] = [prompter.image_id] * len(rows)
    encoded = prompter.tokenizer.encode(answer, add_special_tokens=False)
    tokens = [*prompt, *encoded.ids, prompter.end_id]
    page, lessons = page_of(document, spec), Lessons()
    letters = {start: len(prompt) + i for i, (start, end) in enumerate(encoded.offsets) if end == start + 1}
    image_lessons(page, at, lessons)
    answer_lessons(document, answer, page, letters, len(prompt), at, lessons)
    patches, marks = marks_of(document, page, spec)
    return Sample(tokens, len(prompt), cut(document.picture, tiling(spec)), rows, at, patches, marks, lessons, task)


def lines_sample(rng: random.Random, prompter: Prompter, spec: CheckpointSpec, level: float) -> Sample:
    """A strip of paper full of lines, to be copied: the first thing to read. `level` 0..1: how many lines, how wide."""
    from scripts.nano import drawing, formats, values
    from scripts.nano.documents import Document
    from scripts.nano.truth import Form

    finer = rng.choice((1, 2))
    size = rng.uniform(16.0, 18.0 + 3 * level)
    face = drawing.face(rng.choice(sorted(drawing.fonts())), size * finer, rng.random() < 0.3)
    width = spec.tile_px * rng.choice((2, 2, 3))
    lines: list[str] = []
    for _ in range(rng.randint(1, 2 + round(4 * level))):
        line = ""
        while True:
            longer = f"{line} {values.cell_text(rng, values.column_kind(rng))}".strip()
            if line and (face.width(longer) / finer > width - 8 or rng.random() < 0.15):
                break
            line = longer
        while face.width(line) / finer > width - 8:
            line = line[:-1].rstrip()
        lines.append(line)
    pitch = size * rng.uniform(1.45, 1.9)
    height = max(24, round(len(lines) * pitch + rng.uniform(4, 14)))
    sheet = drawing.Sheet()
    top, indent = rng.uniform(0, max(0.0, height - len(lines) * pitch)), rng.uniform(2, 6)
    for i, line in enumerate(lines):
        sheet.text(indent * finer, (top + (i + 0.5) * pitch) * finer, line, face, (0, 0, 0))
    picture, glyphs = sheet.render(width * finer, height * finer, 0, 0, (255, 255, 255))
    if finer > 1:
        picture, glyphs = picture.reduce(finer), glyphs.moved(glyphs.x / finer, glyphs.y / finer)
    document = Document("lines", picture, Form("", ()), glyphs, "", 0)
    return _with_picture(document, "lines", formats.COPY_TEXT, "\n".join(lines), prompter, spec)


def letters_sample(rng: random.Random, spec: CheckpointSpec) -> Sample:
    """Tiles full of lines of text, each line in a font and size of its own: many glyphs to learn from, no question.

    Between them stand what stands between texts of documents: rules, shades, boxes.
    """
    from granite4v.clip_projector.tiles_anyres import cut
    from scripts.nano import drawing, values
    from scripts.nano.documents import Document
    from scripts.nano.model import tiling
    from scripts.nano.reading import page_of
    from scripts.nano.truth import Form

    finer = rng.choice((1, 2))
    width, height = 3 * spec.tile_px, 2 * spec.tile_px
    grey = rng.randint(215, 255) if rng.random() < 0.4 else 255
    paper, ink = (grey, grey, grey), (rng.randint(0, 70), rng.randint(0, 70), rng.randint(0, 110))
    if rng.random() < 0.1:
        paper, ink = ink, paper
    rule, shade, bar = (_mixed(paper, ink, share) for share in (0.6, 0.25, 0.5))
    ruled, barred = rng.random() < 0.5, rng.random() < 0.35
    sheet, y = drawing.Sheet(), rng.uniform(2, 14)
    while y < height:
        size = rng.uniform(14.0, 25.0) if rng.random() < 0.2 else rng.uniform(15.0, 22.0)
        face = drawing.face(rng.choice(sorted(drawing.fonts())), size * finer, rng.random() < 0.3)
        pitch, x = size * rng.uniform(1.25, 1.8), rng.uniform(-4, 12)
        top, bottom = (y + (size - pitch) / 2) * finer, (y + (size + pitch) / 2) * finer
        if rng.random() < 0.15:
            sheet.box(0, top, width * finer, bottom, shade)
        if ruled:
            sheet.line(0, bottom, width * finer, bottom, rule, rng.choice((1, finer)))
        while x < width:
            text = values.cell_text(rng, values.column_kind(rng))
            if rng.random() < 0.08:
                text = "".join(chr(rng.randrange(FIRST_CODE, FIRST_CODE + N_CODES)) for _ in range(rng.randint(1, 8)))
            sheet.text(x * finer, (y + size / 2) * finer, text, face, ink)
            gap = rng.uniform(0.75, 2.2) * size
            x += face.width(text) / finer + gap
            middle = (x - gap / 2) * finer
            if barred:
                sheet.line(middle, top, middle, bottom, rule, rng.choice((1, finer)))
            elif rng.random() < 0.1:
                half = 0.3 * gap * finer
                sheet.box(middle - half, top + half / 2, middle + half, bottom - half / 2, bar)
        y += pitch
    picture, glyphs = sheet.render(width * finer, height * finer, 0, 0, paper)
    if finer > 1:
        picture, glyphs = picture.reduce(finer), glyphs.moved(glyphs.x / finer, glyphs.y / finer)
    if rng.random() < 0.5:
        picture, glyphs = drawing.photographed(rng, picture, glyphs, paper, 4.0, 1.0)
    document = Document("letters", picture, Form("", ()), glyphs, "", 0)
    patches, marks = marks_of(document, page_of(document, spec), spec)
    return Sample([], 0, cut(picture, tiling(spec))[1:], None, 0, patches[1:], marks[1:], None, LETTERS)


def _mixed(paper: RGB, ink: RGB, share: float) -> RGB:
    """A colour with so much of the ink's."""
    red, green, blue = (round(p + share * (i - p)) for p, i in zip(paper, ink, strict=True))
    return red, green, blue


def marks_of(document: Document, page: Page, spec: CheckpointSpec) -> tuple[np.ndarray, np.ndarray]:
    """What there is to know of each patch, (n_tiles, patches, ..), and of each image token, (n_tiles, tokens, ..).

    The overview has nothing but places: what is small and squeezed is not to be read.
    """
    import numpy as np

    from granite4v.clip_projector.grid_anyres import best_resolution
    from scripts.nano.drawing import ENDING, START
    from scripts.nano.model import grid_side, tiling, tokens_side

    side, tokens, px, patch = grid_side(spec), tokens_side(spec), spec.tile_px, spec.patch_px
    height, width = best_resolution(document.picture.size, tiling(spec).image_grid_pinpoints)
    columns = width // px
    n_tiles = 1 + columns * (height // px)
    patches = np.zeros((n_tiles, side, side, len(PATCH_CLASSES)), dtype=np.uint8)
    marks = np.zeros((n_tiles, tokens, tokens, N_TOKEN_MARKS), dtype=np.uint8)
    place = N_SLOTS * len(SLOT_CLASSES)
    marks[..., place + 6] = np.arange(1, tokens + 1)[:, None]
    marks[..., place + 7] = np.arange(1, tokens + 1)

    code, gap = document.glyphs.code - FIRST_CODE + 1, document.glyphs.gap.astype(int)
    code = np.where((code >= 1) & (code <= N_CODES), code, 0)
    tile_x, tile_y = page.x // px, page.y // px
    before = []
    seen = np.isin(gap, (START, START + ENDING))  # whether the text begins before
    cut_off = np.zeros(len(code), dtype=bool)
    for steps in (1, 2, 3):
        cut_off = cut_off | (np.roll(tile_x, steps) != tile_x) | (np.roll(tile_y, steps) != tile_y)
        before.append(np.where(seen, 0, np.where(cut_off, EDGE, np.roll(code, steps))))
        seen = seen | np.roll(np.isin(gap, (START, START + ENDING)), steps)
    ends = np.zeros(len(code), dtype=bool)
    ends[[text.last_but_colon for text in page.texts]] = True
    starts = np.isin(gap, (START, START + ENDING))
    begins = _cells_that_begin(document, page, len(code))
    kind = gap - ENDING * (gap > ENDING)

    inside = (page.x >= 0) & (page.x < width) & (page.y >= 0) & (page.y < height) & (code > 0)
    for i in np.argsort(page.x, kind="stable").tolist():
        if not inside[i]:
            continue
        tile = 1 + int(tile_y[i]) * columns + int(tile_x[i])
        x, y = page.x[i] % px, page.y[i] % px
        here = patches[tile, int(y // patch), int(x // patch)]
        here[5] |= ends[i]
        if here[0]:
            here[1] = code[i]
        else:
            here[:5] = code[i], 0, before[0][i], before[1][i], kind[i]
            here[6] = begins[i]
        if page.slot[i] < 0:
            continue
        here = marks[tile, int(y // (2 * patch)), int(x // (2 * patch))]
        first = int(page.slot[i]) * len(SLOT_CLASSES)
        here[first : first + len(SLOT_CLASSES)] = code[i], before[0][i], before[1][i], kind[i], begins[i]
        here[place] |= starts[i]
        here[place + 8] = 1 + int(y % (2 * patch) // (patch / 2))
        if ends[i]:
            here[place + 1 : place + 6] = 1, code[i], before[0][i], before[1][i], before[2][i]
    for row, column, slot in page.open:
        if 0 <= column < width // (2 * patch) and 0 <= row < height // (2 * patch):
            tile = 1 + row // tokens * columns + column // tokens
            first = slot * len(SLOT_CLASSES)
            marks[tile, row % tokens, column % tokens, first : first + len(SLOT_CLASSES)] = OPEN
    for i in np.flatnonzero(inside).tolist():
        tile = 1 + int(tile_y[i]) * columns + int(tile_x[i])
        x, y = page.x[i] % px, page.y[i] % px
        for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            beside_x, beside_y = x + dx * NEAR_PX[0], y + dy * NEAR_PX[1]
            if 0 <= beside_x < px and 0 <= beside_y < px:
                here = patches[tile, int(beside_y // patch), int(beside_x // patch)]
                here[:5] = here[:5] if here[0] else OPEN
    return patches.reshape(n_tiles, side * side, -1), marks.reshape(n_tiles, tokens * tokens, -1)


def _cells_that_begin(document: Document, page: Page, n_glyphs: int) -> np.ndarray:
    """For every glyph CELL or HEADER where it is the first one of a table's cell, else 0."""
    import numpy as np

    from scripts.nano.truth import Table

    begins, table = np.zeros(n_glyphs, dtype=np.uint8), document.truth
    if isinstance(table, Table):
        shown = [cell for cell in table.cells if cell.text]
        for cell, text in zip(shown, page.texts, strict=True):
            begins[text.first] = HEADER if cell.header or cell.row < table.n_header_rows else CELL
    return begins


def collate(samples: list[Sample], prompter: Prompter, spec: CheckpointSpec) -> Batch:
    """Samples padded on the right to the longest; letters only add their tiles, after all others."""
    import numpy as np
    import torch

    from scripts.nano.model import tokens_side

    letters = [sample for sample in samples if sample.kind == LETTERS]
    samples = [sample for sample in samples if sample.kind != LETTERS]
    length = max((len(sample.tokens) for sample in samples), default=0)
    tokens = np.full((len(samples), length), prompter.pad_id, dtype=np.int64)
    labels = np.full((len(samples), length), IGNORE, dtype=np.int64)
    rows: list[Any] = []
    positions: list[Any] = []
    per_tile, first = tokens_side(spec) ** 2, 0
    for i, sample in enumerate(samples):
        n = len(sample.tokens)
        tokens[i, :n] = sample.tokens
        labels[i, sample.answer_at - 1 : n - 1] = sample.tokens[sample.answer_at :]
        if sample.unlearned is not None:
            labels[i, sample.unlearned - 1] = IGNORE
        if sample.tiles is not None and sample.image_rows is not None:
            rows.append(np.where(sample.image_rows < 0, -1, sample.image_rows + first * per_tile))
            positions.append(i * length + sample.image_at + np.arange(len(sample.image_rows)))
            first += len(sample.tiles)
    pictures = [sample for sample in samples if sample.tiles is not None] + letters
    taught = [(i, sample.lessons) for i, sample in enumerate(samples) if sample.lessons]

    def joined(parts: list[Any]) -> torch.Tensor | None:
        return torch.from_numpy(np.concatenate(parts)) if parts else None

    def table(name: str) -> torch.Tensor:
        of_all = [(i, *one) for i, lessons in taught for one in getattr(lessons, name)]
        return torch.tensor(of_all, dtype=torch.int64).view(len(of_all), 6 if name == "looks" else 4)

    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        joined([sample.tiles for sample in pictures]),
        joined(rows),
        joined(positions),
        joined([sample.patches for sample in pictures]),
        joined([sample.marks for sample in pictures]),
        {name: _taught(name, [(i, getattr(lessons, of)) for i, lessons in taught]) for name, of in LESSONS.items()},
        table("looks"),
        table("shown"),
        table("sought"),
        [sample.kind for sample in samples],
    )


def _taught(name: str, lessons: list[tuple[int, Lesson]]) -> Taught:
    import torch

    queries = [(i, query) for i, lesson in lessons for query in lesson.queries]
    targets = [targets for _, lesson in lessons for targets in lesson.targets]
    pairs = [(i, target) for i, of_query in enumerate(targets) for target in of_query]
    sink = SINK_WEIGHT.get(name, 1.0)
    weights = [[sink if target == 0 else 1.0 for target in of_query] for of_query in targets]
    shares = [weight / sum(of_query) for of_query in weights for weight in of_query]
    return Taught(
        torch.tensor(queries, dtype=torch.int64).view(-1, 2),
        torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
        torch.tensor(shares, dtype=torch.float32),
    )


def batches(draw: Any, budget: int, pool: int, rng: random.Random) -> Iterator[list[Sample]]:
    """Endless lists of samples of similar length whose padded positions stay within `budget`.

    `draw()` gives a sample; `pool` of them are sorted at a time.
    """
    while True:
        samples = sorted((draw() for _ in range(pool)), key=lambda sample: len(sample.tokens))
        groups: list[list[Sample]] = [[]]
        for sample in samples:
            if groups[-1] and (len(groups[-1]) + 1) * len(sample.tokens) > budget:
                groups.append([])
            groups[-1].append(sample)
        rng.shuffle(groups)
        yield from groups
