"""Training samples for the nano model: token ids, labels and tiles, batched by length."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch
    from checkpoint_spec import CheckpointSpec
    from documents import Document

N_SLOTS = 2  # glyphs that a patch can hold
# What is known of a patch: its glyphs, the two before the first one in the same text, the first one's gap, and the
# glyph after the last one in the same text.
FIRST, SECOND, BEFORE, TWO_BEFORE, GAP, AFTER = range(6)
N_MARKS = 6
QUICK = 3  # answer tokens: a sign between two words makes the model look at the second one already
FIRST_CODE, N_CODES = 33, 94  # the visible ASCII characters; class 0 stands for none
IGNORE = -100
LETTERS = "letters"  # the kind of a sample that is tiles and glyphs only


# (position of an answer's token, of the image token that shows it, slot there, and the same two of the glyph written
# before it, slot -1 when there is none)
Look = tuple[int, int, int, int, int]
Link = tuple[int, int]  # positions of the image token where a text begins, and of the one where the text before it ends


@dataclass(frozen=True)
class Sample:
    """One conversation. `answer_at` is where the answer's tokens begin; `tokens` ends with end-of-text."""

    tokens: list[int]
    answer_at: int
    tiles: np.ndarray | None  # uint8 (n_tiles, px, px, 3)
    image_rows: np.ndarray | None  # as model.token_index with the picture's first tile as 0
    image_at: int
    glyphs: np.ndarray | None  # uint8 (n_tiles, patches, N_MARKS), 255 where nothing can be said
    looks: list[Look]
    links: list[Link]
    kind: str


@dataclass(frozen=True)
class Batch:
    """`labels[i]` is the token that follows position i, or IGNORE."""

    tokens: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor | None
    rows: torch.Tensor | None
    positions: torch.Tensor | None
    glyphs: torch.Tensor | None
    looks: torch.Tensor  # (n, 6): row, position before an answer's token, and the rest of a `Look`
    links: torch.Tensor  # (n, 3): row and a `Link`
    kinds: list[str]


class Prompter:
    """Chat prompts as token ids, rendered by the checkpoint's own template."""

    def __init__(self) -> None:
        import json

        import jinja2
        from language import CHAT_TEMPLATE, build_tokenizer
        from tokenizers import Tokenizer

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
    import corpus

    if rng.random() < 0.15:
        tokens, start = prompter.encode(corpus.plain_text(rng)), 1
    else:
        question, answer = corpus.text_example(rng)
        tokens = prompter.prompt(question, image=False)
        start = len(tokens)
        tokens = tokens + prompter.encode(answer)
    return Sample([*tokens, prompter.end_id], start, None, None, 0, None, [], [], "text")


def ask(document: Document, rng: random.Random) -> tuple[str, str, str]:
    """(task name, prompt text, true answer) for a document; long formats are asked for less often."""
    import formats
    from truth import Chart, Table

    truth = document.truth
    if isinstance(truth, Table):
        tag = rng.choices(["<tables_otsl>", "<tables_html>", "<tables_json>"], [68, 20, 12])[0]
        return tag, tag, formats.answer_for(tag, truth)
    if isinstance(truth, Chart):
        tag = rng.choices(["<chart2csv>", "<chart2summary>", "<chart2code>"], [84, 8, 8])[0]
        return tag, tag, formats.answer_for(tag, truth)
    if rng.random() < 0.75:
        return "kvp", formats.kvp_prompt(formats.form_schema(truth)), formats.form_json(truth)
    name = rng.choice(truth.fields)[0]
    return "question", formats.field_question(name), formats.field_answer(truth, name)


def document_sample(document: Document, rng: random.Random, prompter: Prompter, spec: CheckpointSpec) -> Sample:
    """A picture, what is asked about it and the true answer."""
    task, question, answer = ask(document, rng)
    return _with_picture(document, task, question, answer, prompter, spec)


def _with_picture(
    document: Document, task: str, question: str, answer: str, prompter: Prompter, spec: CheckpointSpec
) -> Sample:
    from model import tiling, token_index
    from reading import glyphs_of_answer, links_of, told

    from granite4v.clip_projector.tiles import cut

    rows = token_index(document.picture.size, 0, spec)
    prompt = prompter.prompt(question, image=True)
    at = prompt.index(prompter.image_id)
    prompt[at : at + 1] = [prompter.image_id] * len(rows)
    encoded = prompter.tokenizer.encode(answer, add_special_tokens=False)
    tokens = [*prompt, *encoded.ids, prompter.end_id]
    tiles = cut(document.picture, tiling(spec))
    shown, slot = image_token_of_glyphs(document, spec)
    token_of_char = {start: i for i, (start, end) in enumerate(encoded.offsets) if end == start + 1}
    looks: list[Look] = []
    last, before = 0, (0, -1)
    known, led = told(document, answer)
    for char, glyph in glyphs_of_answer(document, answer, known):
        if char in token_of_char and shown[glyph] >= 0:
            token, here = token_of_char[char], (at + int(shown[glyph]), int(slot[glyph]))
            first = last + 1 if looks and token - last <= QUICK + 1 else token
            leading = led.get(glyph)
            if leading is not None and shown[leading] >= 0:
                before = (at + int(shown[leading]), int(slot[leading]))
                first = max(last + 1 if looks else 0, token - 1)  # from the sign between a key and its value
            looks += [(len(prompt) + i, *here, *before) for i in range(first, token + 1)]
            last, before = token, here
    links = [(at + first, at + last) for first, last in links_of(document, shown.tolist())]
    return Sample(tokens, len(prompt), tiles, rows, at, glyph_labels(document, spec), looks, links, task)


def image_token_of_glyphs(document: Document, spec: CheckpointSpec) -> tuple[np.ndarray, np.ndarray]:
    """For each glyph the image token, counted from the picture's first, that stands for its centre, and its slot there.

    Slots go through the token's patches, two a patch. The token is -1 where the square was taken off with the padding,
    or a patch has no slot for the glyph.
    """
    import numpy as np
    from model import tiling, tokens_side

    from granite4v.clip_projector.tiles import best_resolution, fit_size, layout

    width, height = document.picture.size
    resolution = best_resolution((width, height), tiling(spec).image_grid_pinpoints)
    fitted = fit_size((width, height), resolution)
    where = layout((width, height), tiling(spec), tokens_side(spec))
    x = document.glyphs.x * (fitted[0] / width) + (resolution[1] - fitted[0]) // 2
    y = document.glyphs.y * (fitted[1] / height) + (resolution[0] - fitted[1]) // 2
    column, row = (x // spec.patch_px).astype(int), (y // spec.patch_px).astype(int)
    slot = np.full(len(x), -1)
    in_patch: dict[tuple[int, int], list[int]] = {}
    for i in np.argsort(document.glyphs.x, kind="stable").tolist():
        in_patch.setdefault((int(row[i]), int(column[i])), []).append(i)
    for (down, right), here in in_patch.items():
        for number, i in ((0, here[0]), (1, here[-1]))[: len(here)]:
            slot[i] = (down % 2 * 2 + right % 2) * N_SLOTS + number
    column, row = column // 2, row // 2
    inside = (row >= where.top) & (row < where.bottom) & (column >= where.left) & (column < where.right) & (slot >= 0)
    at = where.tokens_side**2 + (row - where.top) * (where.right - where.left + 1) + column - where.left
    return np.where(inside, at, -1), slot


def lines_sample(rng: random.Random, prompter: Prompter, spec: CheckpointSpec, level: float) -> Sample:
    """A strip of paper full of lines, to be copied: the first thing to read. `level` 0..1: how many lines, how wide."""
    import drawing
    import formats
    import values
    from documents import Document
    from truth import Form

    finer = rng.choice((1, 2))
    size = rng.uniform(11.0, 12.0 + 3 * level)
    face = drawing.face(rng.choice(sorted(drawing.fonts())), size * finer, rng.random() < 0.3)
    width = spec.tile_px * rng.choice((1, 1, 2, 2, 3))
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
    pitch = size * rng.uniform(1.15, 1.6)
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
    """Tiles full of lines of text, each line in a font and size of its own: many glyphs to learn from, no question."""
    import drawing
    import values
    from documents import Document
    from model import tiling
    from truth import Form

    from granite4v.clip_projector.tiles import cut

    finer = rng.choice((1, 2))
    width, height = 3 * spec.tile_px, 2 * spec.tile_px
    grey = rng.randint(215, 255) if rng.random() < 0.4 else 255
    paper, ink = (grey, grey, grey), (rng.randint(0, 70), rng.randint(0, 70), rng.randint(0, 110))
    if rng.random() < 0.1:
        paper, ink = ink, paper
    sheet, y = drawing.Sheet(), rng.uniform(2, 14)
    while y < height:
        size = rng.uniform(9.5, 20.0) if rng.random() < 0.3 else rng.uniform(10.5, 15.0)
        face = drawing.face(rng.choice(sorted(drawing.fonts())), size * finer, rng.random() < 0.3)
        x = rng.uniform(-4, 12)
        while x < width:
            text = values.cell_text(rng, values.column_kind(rng))
            if rng.random() < 0.15:
                text = "".join(chr(rng.randrange(FIRST_CODE, FIRST_CODE + N_CODES)) for _ in range(rng.randint(1, 8)))
            sheet.text(x * finer, (y + size / 2) * finer, text, face, ink)
            x += face.width(text) / finer + rng.uniform(0.3, 2.0) * size
        y += size * rng.uniform(1.05, 1.7)
    picture, glyphs = sheet.render(width * finer, height * finer, 0, 0, paper)
    if finer > 1:
        picture, glyphs = picture.reduce(finer), glyphs.moved(glyphs.x / finer, glyphs.y / finer)
    if rng.random() < 0.5:
        picture, glyphs = drawing.photographed(rng, picture, glyphs, paper, 4.0, 1.0)
    document = Document("letters", picture, Form("", ()), glyphs, "", 0)
    return Sample([], 0, cut(picture, tiling(spec))[1:], None, 0, glyph_labels(document, spec)[1:], [], [], LETTERS)


def glyph_labels(document: Document, spec: CheckpointSpec) -> np.ndarray:
    """What there is to know of each patch, uint8 (n_tiles, patches, N_MARKS); 0 for none.

    Which glyphs have their centre there, left to right; what is before the first and after the last in their texts.

    The overview is left out (255) unless it shows the picture at 70% to 150% of its size both ways.
    """
    import numpy as np
    from drawing import ENDING, START
    from model import grid_side, tiling

    from granite4v.clip_projector.tiles import best_resolution, fit_size

    side, px, patch = grid_side(spec), spec.tile_px, spec.patch_px
    width, height = document.picture.size
    grid_height, grid_width = best_resolution((width, height), tiling(spec).image_grid_pinpoints)
    fitted = fit_size((width, height), (grid_height, grid_width))
    columns = grid_width // px
    n_tiles = 1 + columns * (grid_height // px)
    out = np.zeros((n_tiles, side * side, N_MARKS), dtype=np.uint8)
    code, gap = document.glyphs.code - FIRST_CODE + 1, document.glyphs.gap
    starts = np.isin(gap, (START, START + ENDING))
    code = np.where((code >= 1) & (code <= N_CODES), code, 0)
    before = np.where(starts, 0, np.roll(code, 1))
    two_before = np.where(starts | np.roll(starts, 1), 0, np.roll(code, 2))
    after = np.where(gap > ENDING, 0, np.roll(code, -1))
    order = np.argsort(document.glyphs.x, kind="stable")

    def place(first: int, scale: tuple[float, float], offset: tuple[int, int], columns: int) -> None:
        x = document.glyphs.x * scale[0] + offset[0]
        y = document.glyphs.y * scale[1] + offset[1]
        for i in order:
            if not code[i]:
                continue
            tile = first + int(y[i] // px) * columns + int(x[i] // px)
            row = int(y[i] % px // patch) * side + int(x[i] % px // patch)
            if 0 <= x[i] < columns * px and first <= tile < n_tiles:
                marks = out[tile, row]
                marks[AFTER] = after[i]
                if marks[FIRST]:
                    marks[SECOND] = code[i]
                else:
                    marks[[FIRST, BEFORE, TWO_BEFORE, GAP]] = code[i], before[i], two_before[i], gap[i]

    place(
        1,
        (fitted[0] / width, fitted[1] / height),
        ((grid_width - fitted[0]) // 2, (grid_height - fitted[1]) // 2),
        columns,
    )
    if all(0.7 <= px / side <= 1.5 for side in (width, height)):
        place(0, (px / width, px / height), (0, 0), 1)
    else:
        out[0] = 255
    return out


def collate(samples: list[Sample], prompter: Prompter, spec: CheckpointSpec) -> Batch:
    """Samples padded on the right to the longest; letters only add their tiles, after all others."""
    import numpy as np
    import torch
    from model import tokens_side

    letters = [sample for sample in samples if sample.kind == LETTERS]
    samples = [sample for sample in samples if sample.kind != LETTERS]
    length = max(len(sample.tokens) for sample in samples)
    tokens = np.full((len(samples), length), prompter.pad_id, dtype=np.int64)
    labels = np.full((len(samples), length), IGNORE, dtype=np.int64)
    looks = [(i, answer - 1, *shown) for i, sample in enumerate(samples) for answer, *shown in sample.looks]
    links = [(i, *link) for i, sample in enumerate(samples) for link in sample.links]
    rows: list[Any] = []
    positions: list[Any] = []
    per_tile, first = tokens_side(spec) ** 2, 0
    for i, sample in enumerate(samples):
        n = len(sample.tokens)
        tokens[i, :n] = sample.tokens
        labels[i, sample.answer_at - 1 : n - 1] = sample.tokens[sample.answer_at :]
        if sample.tiles is not None and sample.image_rows is not None:
            rows.append(np.where(sample.image_rows < 0, -1, sample.image_rows + first * per_tile))
            positions.append(i * length + sample.image_at + np.arange(len(sample.image_rows)))
            first += len(sample.tiles)
    with_picture = [sample for sample in samples if sample.tiles is not None] + letters
    kinds = [sample.kind for sample in samples]
    if not rows:
        none = torch.zeros(0, 6).long()
        return Batch(
            torch.from_numpy(tokens), torch.from_numpy(labels), None, None, None, None, none, none[:, :3], kinds
        )
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(np.concatenate([sample.tiles for sample in with_picture])),
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate([sample.glyphs for sample in with_picture])),
        torch.tensor(looks, dtype=torch.int64).view(-1, 6),
        torch.tensor(links, dtype=torch.int64).view(-1, 3),
        kinds,
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
