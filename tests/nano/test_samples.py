"""Training samples: the questions, where answers look, and the marks of patches and image tokens."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from granite4v.runtime.formats import read as read_answer
from scripts.nano.batches import IGNORE, Batch, batches, collate
from scripts.nano.documents import Document, draw_document
from scripts.nano.formats import answer_for, chart_csv
from scripts.nano.marks import CELL, HEADER, N_TOKEN_MARKS, OPEN, PLACE_AT, SLOT_CLASSES, marks_of
from scripts.nano.reading import EDGE, N_SLOTS, NEAR_PX, addresses, chart_rows, page_of, told
from scripts.nano.samples import Prompter, Sample, document_sample, letters_sample, lines_sample, text_sample
from scripts.nano.spec import NANO
from scripts.nano.trainer import has_gap
from scripts.nano.truth import Cell, Chart, Form, Table


def batch_of(seeds: list[int], prompter: Prompter) -> Batch:
    rng = random.Random(0)
    samples = [document_sample(draw_document(seed, level=0.5), rng, prompter, NANO) for seed in seeds]
    return collate([*samples, text_sample(rng, prompter)], prompter, NANO)


def test_labels_are_the_answer_one_ahead(prompter: Prompter) -> None:
    batch = batch_of([1, 2, 3], prompter)
    assert batch.kinds[-1] == "text"
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        asked = [i for i, label in enumerate(labels) if label != IGNORE]
        assert [labels[i] for i in asked] == [tokens[i + 1] for i in asked]
        assert asked == list(range(asked[0], asked[-1] + 1))
        assert labels[asked[-1]] == prompter.end_id
    assert batch.rows is not None and batch.positions is not None
    at_pictures = batch.tokens.flatten()[batch.positions]
    assert len(batch.rows) == len(batch.positions)
    assert (at_pictures == prompter.image_id).all()
    assert (batch.tokens == prompter.image_id).sum() == len(batch.positions)


def test_every_glyph_is_in_one_patch() -> None:
    for seed in range(20):
        document = draw_document(seed, "table", level=0.3)
        labels = marks_of(document, page_of(document, NANO), NANO)[0][1:, :, :2]
        codes = sorted(chr(code + 32) for code in labels[(labels > 0) & (labels != OPEN)].tolist())
        drawn = sorted(chr(code) for code in document.glyphs.code.tolist())
        missing = len(drawn) - len(codes)
        assert 0 <= missing <= 0.05 * len(drawn), "more than a twentieth share a patch with two others"
        assert not set(codes) - set(drawn)


def marks(sample: Sample, position: int) -> list[int]:
    """Returns the labels of the image token at a position."""
    assert sample.image_rows is not None and sample.marks is not None
    return [
        int(mark) for mark in sample.marks.reshape(-1, N_TOKEN_MARKS)[sample.image_rows[position - sample.image_at]]
    ]


@pytest.fixture(scope="module")
def read(prompter: Prompter) -> list[tuple[Document, Sample]]:
    """Documents of all kinds with their samples."""
    rng = random.Random(2)
    drawn = [draw_document(seed, kind) for kind in ("table", "chart", "form") for seed in range(20)]
    return [(document, document_sample(document, rng, prompter, NANO)) for document in drawn]


def so_far(sample: Sample, position: int, prompter: Prompter) -> str:
    return prompter.tokenizer.decode(sample.tokens[sample.answer_at : position + 1])


def test_answers_look_where_their_letters_stand(prompter: Prompter, read: list[tuple[Document, Sample]]) -> None:
    rng = random.Random(2)
    samples = [sample for _, sample in read] + [lines_sample(rng, prompter, NANO, 1.0) for _ in range(10)]
    n_looks = n_letters = 0
    for sample in samples:
        assert sample.lessons is not None
        for query, image, slot, other, other_slot in sample.lessons.looks:
            assert marks(sample, other)[other_slot * len(SLOT_CLASSES)] > 0, "where it may be seen as well is not empty"
            said = prompter.tokenizer.decode([sample.tokens[query + 1]])
            glyph = chr(marks(sample, image)[slot * len(SLOT_CLASSES)] + 32)
            if query == sample.answer_at - 1 and sample.kind in ("<tables_html>", "<tables_json>"):
                assert said.startswith(("<table>", '{"dim')), "whether a cell of the first line is empty"
            elif sample.kind == "<tables_json>" and '"cells"' not in so_far(sample, query, prompter):
                assert said.isdigit(), "how many rows and columns there are"
            elif so_far(sample, query, prompter) == "<otsl>":
                assert said in ("<ched>", "<ecel>", "<fcel>", "<rhed>"), "whether a cell of the first line is empty"
            elif len(said) == 1 and (said.isalpha() or sample.kind == "<tables_otsl>") and said != " ":
                assert glyph == said
            else:  # a sign, or something between two texts: the letter that comes next
                after = [prompter.tokenizer.decode([token]) for token in sample.tokens[query + 1 : query + 12]]
                assert glyph in (text for text in after if len(text) == 1)
        if sample.kind == "<tables_otsl>":
            n_looks += len(sample.lessons.looks)
            n_letters += sum(
                len(prompter.tokenizer.decode([token])) == 1 for token in sample.tokens[sample.answer_at :]
            )
    assert n_looks > 0.97 * n_letters > 500, "all but letters that share their place with two others"


def test_a_table_begins_with_a_look_at_its_longest_line(read: list[tuple[Document, Sample]]) -> None:
    n_seen = Counter[str]()
    for document, sample in read:
        table = document.truth
        if not isinstance(table, Table) or any(cell.rowspan > 1 or cell.colspan > 1 for cell in table.cells):
            continue
        rows = [[cell.text for cell in table.cells if cell.row == i and cell.text] for i in range(table.n_rows)]
        longest = max(rows, key=len)
        assert sample.lessons is not None
        at = sample.answer_at - int(sample.kind != "<tables_otsl>")
        seen = [
            marks(sample, image)[slot * len(SLOT_CLASSES)] for q, image, slot, *_ in sample.lessons.looks if q == at
        ]
        assert seen in ([], [ord(longest[-1][0]) - 32]), "none where the glyph shares its place with two others"
        n_seen[sample.kind] += len(seen)
    assert len(n_seen) == 3 and min(n_seen.values()) > 0


def test_gaps_are_those_that_counting_does_not_tell() -> None:
    def gap(*texts: str) -> bool:
        cells = tuple(Cell(i // 3, i % 3, text) for i, text in enumerate(texts))
        return has_gap(replace(draw_document(1, "table"), truth=Table(2, 3, 1, cells)))

    assert gap("", "b", "c", "d", "e", "f") and gap("a", "b", "c", "d", "e", "")
    assert not gap("a", "b", "c", "", "", "f")
    assert not has_gap(draw_document(1, "form"))


def test_a_glyph_on_an_edge_may_be_seen_on_its_other_side() -> None:
    """Moved across the edge, the whole page reads as if the glyph had been there, and nothing contradicts that."""
    n_moved = {"aside": 0, "down": 0}
    for seed in range(40):
        document = draw_document(seed, "form", level=0.3)
        page = page_of(document, NANO)
        fitted = (page.x[-1] - page.x[0]) / (document.glyphs.x[-1] - document.glyphs.x[0])
        for axis, step in (("aside", -1), ("aside", 1), ("down", -1), ("down", 1)):
            x = document.glyphs.x + (axis == "aside") * step * 0.99 * NEAR_PX[0] / fitted
            y = document.glyphs.y + (axis == "down") * step * 0.99 * NEAR_PX[1] / fitted
            moved = page_of(replace(document, glyphs=document.glyphs.moved(x, y)), NANO)
            for i in range(len(page.x)):
                before, after = (page.token[i], page.slot[i]), (moved.token[i], moved.slot[i])
                alone = (page.token == page.token[i]).sum() == 1 == (moved.token == moved.token[i]).sum()
                in_tile = page.x[i] // 160 == moved.x[i] // 160 and page.y[i] // 160 == moved.y[i] // 160
                if alone and in_tile and before != after:
                    down = abs(page.other_token[i] - page.token[i]) > 1
                    if axis == "down" or not down:
                        assert (page.other_token[i], page.other_slot[i]) == after
                        n_moved[axis] += 1
    assert min(n_moved.values()) > 10


def test_a_value_of_a_form_is_found_by_its_label(prompter: Prompter, read: list[tuple[Document, Sample]]) -> None:
    n_found = 0
    for document, sample in read:
        if sample.kind != "kvp":
            continue
        assert isinstance(document.truth, Form) and sample.lessons is not None
        find = sample.lessons.find
        for query, (target,) in zip(find.queries, find.targets, strict=True):
            written = so_far(sample, query, prompter).replace('": "', "").rsplit('"', 1)[-1]
            name, value = written.replace("_", ""), dict(document.truth.fields)[written]
            assert (target == 0) == (value is None)
            if target:
                ending = marks(sample, target)[PLACE_AT + 1 : PLACE_AT + 3]
                assert ending[0] == 1 and chr(ending[1] + 32).lower() == name[-1]
                n_found += 1
        assert len(sample.lessons.carry.queries) <= len(sample.lessons.looks)
    assert n_found > 40


def test_rows_of_a_chart_are_its_labels_and_values() -> None:
    for seed in range(60):
        document = draw_document(seed, "chart")
        chart = document.truth
        assert isinstance(chart, Chart)
        rows = [[text.letters for text in row] for row in chart_rows(document)]
        assert rows == [
            [text.replace(" ", "") for text in (label, *values)]
            for label, values in zip(chart.labels, chart.values, strict=True)
        ]
        answer = chart_csv(chart)
        found, _ = told(document, answer)
        assert len(found) >= sum(map(len, rows))
        for at, text in found:
            assert answer[at:].replace(" ", "").startswith(text.letters)


def test_addresses_are_lines_and_places() -> None:
    places = [(10.0, 5.0), (300.0, 8.0), (10.0, 30.0), (150.0, 4.0), (90.0, 52.0), (20.0, 55.0)]
    assert addresses(places) == [(0, 0), (0, 2), (1, 0), (0, 1), (2, 1), (2, 0)]
    n_cells = 0
    for seed in range(30):
        document = draw_document(seed, "table", level=0.5)
        assert isinstance(document.truth, Table)
        if any(cell.rowspan > 1 or not cell.text for cell in document.truth.cells):
            continue
        page = page_of(document, NANO)
        order = [[cell for cell in document.truth.cells if cell.row == row] for row in range(document.truth.n_rows)]
        assert page.address == [(i, j) for i, row in enumerate(order) for j in range(len(row))]
        n_cells += len(page.address)
    assert n_cells > 100


def test_addresses_are_counted_by_texts_before(read: list[tuple[Document, Sample]]) -> None:
    n_queries = 0
    for _, sample in read:
        lessons = sample.lessons
        assert lessons is not None
        shown = {position: address for position, *address in lessons.shown}
        for lesson, which in ((lessons.places, 1), (lessons.lines, 0)):
            for query, targets in zip(lesson.queries, lesson.targets, strict=True):
                assert targets[0] == 0 and all(target <= query for target in targets)
                if query not in shown:
                    continue
                n_queries += 1
                assert len(targets) - 1 <= shown[query][which] + 1
                for target in targets[1:]:
                    assert marks(sample, target)[PLACE_AT] == 1, "a text begins there"
                    assert shown[target][which] <= shown[query][which]
    assert n_queries > 1000


def test_marks_tell_what_is_before_a_glyph(read: list[tuple[Document, Sample]]) -> None:
    n_seen = 0
    for document, sample in read:
        if not isinstance(document.truth, Table):
            continue
        texts = [f"^{cell.text.replace(' ', '')}" for cell in document.truth.cells]
        assert sample.marks is not None
        slots = sample.marks.reshape(-1, N_TOKEN_MARKS)[:, :PLACE_AT].reshape(-1, N_SLOTS, len(SLOT_CLASSES))
        seen = (slots[..., 0] > 0) & (slots[..., 0] != OPEN)
        for glyph, before, two_before, kind, cell in slots[seen].tolist():
            assert (kind == 3) == (before == 0) == (cell != 0)
            letters = "".join(
                "." if mark == EDGE else re.escape(chr(mark + 32)) for mark in (two_before, before) if mark
            )
            start = "" if two_before else "\\^"
            assert any(re.search(f"{start}{letters}{re.escape(chr(glyph + 32))}", text) for text in texts)
            n_seen += 1
    assert n_seen > 500


def test_marks_tell_headers_from_other_cells(read: list[tuple[Document, Sample]]) -> None:
    n_seen = {CELL: 0, HEADER: 0}
    for document, sample in read:
        assert sample.marks is not None
        slots = sample.marks.reshape(-1, N_TOKEN_MARKS)[:, :PLACE_AT].reshape(-1, N_SLOTS, len(SLOT_CLASSES))
        for kind in n_seen:
            told = Counter(slots[(slots[..., 4] == kind) & (slots[..., 0] != OPEN)][:, 0].tolist())
            if not isinstance(document.truth, Table):
                assert not told
                continue
            table = document.truth
            wanted = [
                cell for cell in table.cells if (cell.header or cell.row < table.n_header_rows) == (kind == HEADER)
            ]
            assert not told - Counter(ord(cell.text[0]) - 32 for cell in wanted if cell.text)
            n_seen[kind] += told.total()
    assert min(n_seen.values()) > 40


def test_a_row_too_many_is_not_learned_but_left_empty(prompter: Prompter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.nano.samples.ROW_TOO_MANY_SHARE", 1.0)
    rng = random.Random(6)
    kinds = set()
    for seed in range(12):
        document = draw_document(seed, "table")
        sample = document_sample(document, rng, prompter, NANO)
        kinds.add(sample.kind)
        if sample.kind == "<tables_json>":
            assert sample.unlearned is None
            continue
        assert sample.unlearned is not None
        labels = collate([sample], prompter, NANO).labels[0].tolist()
        assert [i for i in range(sample.answer_at, len(sample.tokens)) if labels[i - 1] == IGNORE] == [sample.unlearned]
        answer = prompter.tokenizer.decode(sample.tokens[sample.answer_at : -1])
        (found,) = read_answer(sample.kind.strip("<>"), answer)
        (wanted,) = read_answer(sample.kind.strip("<>"), answer_for(sample.kind, document.truth))
        assert found.texts() == [*wanted.texts(), [""] * wanted.n_cols]
    assert len(kinds) == 3


def test_letters_fill_their_tiles(prompter: Prompter) -> None:
    letters = letters_sample(random.Random(1), NANO)
    assert letters.patches is not None and letters.tiles is not None
    assert letters.tiles.shape == (6, NANO.tile_px, NANO.tile_px, 3) and letters.patches.shape[:2] == (6, 256)
    assert (letters.patches[..., 0] > 0).sum() > 200
    alone = collate([document_sample(draw_document(1), random.Random(0), prompter, NANO)], prompter, NANO)
    both = collate([letters, document_sample(draw_document(1), random.Random(0), prompter, NANO)], prompter, NANO)
    assert alone.tiles is not None and both.tiles is not None
    assert len(both.tiles) == len(alone.tiles) + 6
    assert torch.equal(both.tokens, alone.tokens) and torch.equal(both.tiles[:-6], alone.tiles)


def test_batches_keep_to_the_budget(prompter: Prompter) -> None:
    rng = random.Random(5)
    source = batches(lambda: text_sample(rng, prompter), 2000, 30, rng)
    for _ in range(10):
        group = next(source)
        longest = max(len(sample.tokens) for sample in group)
        assert len(group) == 1 or longest * len(group) <= 2000
