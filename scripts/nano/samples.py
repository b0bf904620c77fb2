"""Training samples for the nano model: token ids, answers and tiles."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace

import jinja2
import numpy as np
from tokenizers import Tokenizer

from granite4v.clip_projector.tiles_anyres import cut
from scripts.nano import corpus, drawing, formats, values
from scripts.nano.documents import Document
from scripts.nano.drawing import RGB
from scripts.nano.language import CHAT_TEMPLATE, build_tokenizer
from scripts.nano.marks import marks_of
from scripts.nano.reading import FIRST_CODE, N_CODES, Lessons, answer_lessons, image_lessons, page_of
from scripts.nano.spec import tiling, token_index
from scripts.nano.truth import Cell, Chart, Form, Table
from tests.toy.spec import CheckpointSpec

LETTERS = "letters"  # kind of a sample that has only tiles and glyphs
ROW_TOO_MANY_SHARE = 0.06  # of the tables in OTSL and HTML


@dataclass(frozen=True)
class Sample:
    """One conversation. `answer_at`: index of the answer's first token. `tokens` ends with end-of-text."""

    tokens: list[int]
    answer_at: int
    tiles: np.ndarray | None  # uint8 (n_tiles, px, px, 3)
    image_rows: np.ndarray | None  # as spec.token_index returns it, with the image's first tile as 0
    image_at: int
    patches: np.ndarray | None  # uint8 (n_tiles, patches, len(PATCH_CLASSES))
    marks: np.ndarray | None  # uint8 (n_tiles, image tokens, N_TOKEN_MARKS): four slots (or OPEN), then the place
    lessons: Lessons | None
    kind: str
    unlearned: int | None = None  # index in `tokens` of one that is not trained as output, only as context

    def without_overview(self) -> Sample:
        """Drops the overview tile, for training the tower alone, which does not need the position of tiles."""
        assert self.tiles is not None and self.patches is not None and self.marks is not None
        return replace(self, tiles=self.tiles[1:], patches=self.patches[1:], marks=self.marks[1:])


class Prompter:
    """Renders chat prompts as token ids, with the checkpoint's own template."""

    def __init__(self) -> None:
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
        """Returns the ids up to the answer; with `image`, one placeholder represents the image."""
        parts: list[dict[str, str]] = [{"type": "image"}] if image else []
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        rendered = self._template.render(messages=messages, add_generation_prompt=True)
        return self.encode(rendered)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def text_sample(rng: random.Random, prompter: Prompter) -> Sample:
    """Draws a sample for the base model: an instruction and its answer, or plain text."""
    if rng.random() < 0.15:
        tokens, start = prompter.encode(corpus.plain_text(rng)), 1
    else:
        question, answer = corpus.text_example(rng)
        tokens = prompter.prompt(question, image=False)
        start = len(tokens)
        tokens = tokens + prompter.encode(answer)
    return Sample([*tokens, prompter.end_id], start, None, None, 0, None, None, None, "text")


def ask(document: Document, rng: random.Random) -> tuple[str, str, str]:
    """Returns (task name, prompt text, true answer) for a document; long formats are asked for less often."""
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
    """Returns a sample of an image, a question about it and the true answer.

    Now and then the answer begins one row more than the table has and leaves it empty, so that the model learns to
    recover after beginning a row too many. The token that begins that row is `unlearned`.
    """
    task, question, answer = ask(document, rng)
    if not isinstance(document.truth, Table) or task == "<tables_json>" or rng.random() >= ROW_TOO_MANY_SHARE:
        return _with_picture(document, task, question, answer, prompter, spec)
    longer = _with_row_too_many(document.truth, task)
    pairs = zip(prompter.encode(answer), prompter.encode(longer), strict=False)
    place = next(i for i, (token, other) in enumerate(pairs) if token != other)
    sample = _with_picture(document, task, question, longer, prompter, spec)
    return replace(sample, unlearned=sample.answer_at + place)


def _with_row_too_many(table: Table, task: str) -> str:
    row = tuple(Cell(table.n_rows, col, "") for col in range(table.n_cols))
    longer = formats.answer_for(task, replace(table, n_rows=table.n_rows + 1, cells=table.cells + row))
    head, tail = longer[: longer.rfind("<nl><ecel>")], longer[longer.rfind("<nl><ecel>") :]
    return head + tail.replace("<ecel>", "<fcel>", 1) if task == "<tables_otsl>" else longer


def _with_picture(
    document: Document, task: str, question: str, answer: str, prompter: Prompter, spec: CheckpointSpec
) -> Sample:
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
    """Draws a strip of text lines to be copied, the easiest thing to read. `level` 0..1: more lines, larger text."""
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
    """Draws tiles full of text lines, each in its own font and size: many glyphs to learn from, no question.

    Between the texts are the things found between texts of documents: rules, shades, boxes.
    """
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
    """Mixes paper and ink; `share` is the ink's."""
    red, green, blue = (round(p + share * (i - p)) for p, i in zip(paper, ink, strict=True))
    return red, green, blue
