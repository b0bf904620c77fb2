"""The nano model's training code against transformers and torch's own attention."""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from granite4v.ggml.quantize import quantize_rows
from granite4v.runtime.formats import read as read_answer
from scripts.nano.batches import IGNORE, Batch, batches, collate
from scripts.nano.codes import codes, ideal_streams
from scripts.nano.documents import Document, draw_document
from scripts.nano.formats import answer_for, chart_csv
from scripts.nano.initial import NEIGHBOURS, initial
from scripts.nano.kernels import Kernels
from scripts.nano.language import build_tokenizer
from scripts.nano.marks import CELL, HEADER, N_TOKEN_MARKS, OPEN, PLACE_AT, PLACE_CLASSES, SLOT_CLASSES, marks_of
from scripts.nano.model import decode, log_shares, logits, merged, patches, project, tower
from scripts.nano.reading import EDGE, N_SLOTS, NEAR_PX, addresses, chart_rows, page_of, told
from scripts.nano.rounding import round_to_q4_0, round_to_q4_k, rounded
from scripts.nano.samples import Prompter, Sample, document_sample, letters_sample, lines_sample, text_sample
from scripts.nano.spec import NANO, TAUGHT_HEADS, VISION
from scripts.nano.trainer import Trainer, has_gap
from scripts.nano.truth import Cell, Chart, Form, Table
from tests.peers.reference import relative_l2
from tests.toy.spec import model_config


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter()


def batch_of(seeds: list[int], prompter: Prompter) -> Batch:
    rng = random.Random(0)
    samples = [document_sample(draw_document(seed, level=0.5), rng, prompter, NANO) for seed in seeds]
    return collate([*samples, text_sample(rng, prompter)], prompter, NANO)


def test_training_computes_what_transformers_computes(prompter: Prompter) -> None:
    from transformers import Granite4VisionConfig, Granite4VisionForConditionalGeneration

    text, vision, adapter = initial(NANO, prompter.n_vocab, seed=3)
    config = Granite4VisionConfig.from_dict(model_config(NANO, build_tokenizer()))
    config._attn_implementation = "eager"
    reference = Granite4VisionForConditionalGeneration(config).eval()
    weights = merged(text, adapter, NANO)
    missing, unexpected = reference.load_state_dict({**weights, **vision}, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected

    document = draw_document(5, "table")
    batch = collate([document_sample(document, random.Random(1), prompter, NANO)], prompter, NANO)
    assert batch.tiles is not None
    kernels = Kernels(fuse=False)
    with torch.no_grad():
        streams = project(vision, tower(vision, batch.tiles, NANO, kernels), NANO, kernels)
        newline = vision["model.image_newline"].view(1, -1)
        packed = [torch.cat([stream.flatten(0, 1), newline])[batch.rows] for stream in streams]
        found = logits(weights, decode(weights, batch.tokens, (batch.positions, packed), NANO, kernels), NANO)
        expected = reference(
            input_ids=batch.tokens,
            pixel_values=(batch.tiles.float() / 127.5 - 1).permute(0, 3, 1, 2)[None],
            image_sizes=torch.tensor([[document.picture.height, document.picture.width]]),
        ).logits
    assert relative_l2(found.numpy(), expected.numpy()) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_the_attention_gradient_is_torchs(causal: bool) -> None:
    torch.manual_seed(0)
    # keys that grow make scores of later positions overflow an exponential that forgets the mask
    inputs = [torch.randn(5, 3, 300, 64) * 3 for _ in range(3)]
    inputs[1][:, :, 150:] *= 20
    upstream = torch.randn(5, 3, 300, 64)
    gradients: list[list[np.ndarray]] = []
    own = Kernels(fuse=False).attention

    def stock(q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    for attention in (own, stock):
        leaves = [x.clone().requires_grad_(True) for x in inputs]
        attention(*leaves, causal, 0.125).backward(upstream)
        gradients.append([x.grad.numpy() for x in leaves if x.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        assert relative_l2(found, expected) < 1e-4


def test_a_head_that_is_sure_gets_no_gradient() -> None:
    """Half precision rounds large scores by more than one; what a sure head should become must not depend on that."""
    torch.manual_seed(0)
    keys = torch.randn(1, 1, 40, 64)
    keys = (keys / keys.norm(dim=-1, keepdim=True) * 60).bfloat16()
    queries = keys.flip(2).clone().requires_grad_(True)  # every one finds one key, and is far from the others
    upstream = torch.randn(1, 1, 40, 64).bfloat16()
    Kernels(fuse=False).attention(queries, keys, torch.randn(1, 1, 40, 64).bfloat16(), False, 0.125).backward(upstream)
    assert queries.grad is not None
    assert queries.grad.abs().max() < 1e-6


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
    """What the labels have for the image token at a position."""
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
            else:  # a sign, or what stands between two texts: the letter that comes next
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
    """Moved over the edge, the whole page reads as if the glyph had been there; nothing says that it is not."""
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


def test_ideal_streams_tell_their_marks() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = [*SLOT_CLASSES * N_SLOTS, *PLACE_CLASSES]
    drawn = torch.stack([torch.randint(n, (40,), generator=generator) for n in classes], dim=1)
    deepest, place, *slots = ideal_streams(drawn.to(torch.uint8), NANO)
    assert not deepest.any()
    kinds = codes(NANO)
    for tables, stream, first, n in zip(
        kinds,
        [place, *slots],
        [PLACE_AT, *range(0, PLACE_AT, len(SLOT_CLASSES))],
        [len(PLACE_CLASSES), *[len(SLOT_CLASSES)] * N_SLOTS],
        strict=True,
    ):
        expected = sum(tables[i][drawn[:, first + i]] for i in range(n))
        assert torch.allclose(stream, torch.as_tensor(expected), atol=1e-5)
        assert torch.equal(tables[0][0], torch.zeros(NANO.text_hidden))


def test_lessons_are_taken_from_the_attention(prompter: Prompter) -> None:
    text, _, _ = initial(NANO, prompter.n_vocab, seed=4)
    batch = collate([lines_sample(random.Random(3), prompter, NANO, 0.5)], prompter, NANO)
    assert batch.marks is not None and batch.positions is not None
    known = [stream.nan_to_num() for stream in ideal_streams(batch.marks, NANO)]
    packed = [torch.cat([s.flatten(0, 1), s[0, :1]])[batch.rows] for s in known]
    taught: dict[str, torch.Tensor] = {}
    decode(text, batch.tokens, (batch.positions, packed), NANO, Kernels(fuse=False), batch, taught)
    for name in ("places", "lines"):
        assert name in TAUGHT_HEADS
        lesson = batch.lessons[name]
        least = torch.zeros(len(lesson.queries)).index_add(0, lesson.pairs[:, 0], -lesson.shares * lesson.shares.log())
        assert (taught[name] >= least - 1e-4).all(), "no attention is less surprised than the wanted one"
    assert taught["looks"].shape == (len(batch.looks), NANO.text_heads)
    assert taught["shown"].shape == (len(batch.shown), NANO.text_hidden)
    assert len(taught["nowhere"]) + len(batch.looks) == (batch.labels != IGNORE).sum()


def test_shares_of_several_rows_are_those_of_each_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(3, 2, 9, 4), torch.randn(3, 2, 9, 4)
    queries = torch.tensor([[0, 5], [0, 2], [2, 8], [2, 3], [2, 4]])
    found = log_shares(q, k, queries, 0.5)
    for i, (row, position) in enumerate(queries.tolist()):
        for head in range(2):
            scores = q[row, head, position] @ k[row, head, : position + 1].T * 0.5
            assert torch.allclose(found[i, head, : position + 1], torch.log_softmax(scores, 0), atol=1e-5)
            assert (found[i, head, position + 1 :] == -torch.inf).all()


def test_the_eye_learns_in_its_own_steps_only(prompter: Prompter, tmp_path: Path) -> None:
    options = argparse.Namespace(
        stage="read",
        run=tmp_path,
        minutes=10.0,
        steps=0,
        processes=1,
        budget=2000,
        device="cpu",
        rate=0.003,
        no_fuse=True,
        adapter_rate=2.0,
        eye_every=3,
        seed=0,
    )
    trainer = Trainer(0, options)
    batch = collate([lines_sample(random.Random(3), prompter, NANO, 0.5)], prompter, NANO)
    name = VISION + "encoder.layers.0.mlp.fc1.weight"
    changed = []
    for trainer.minutes, trainer.step in ((1.0, 0), (9.0, 3), (9.0, 4)):
        before = trainer.trained[name].detach().clone()
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
        trainer.loss(batch)[0].backward()
        trainer.share_gradients()
        for optimizer in trainer.optimizers:
            optimizer.step()
        changed.append(not torch.equal(before, trainer.trained[name]))
    assert changed == [False, True, False]


def test_the_first_layers_start_by_looking_at_neighbours(prompter: Prompter) -> None:
    _, vision, _ = initial(NANO, prompter.n_vocab, seed=0)
    tiles = letters_sample(random.Random(0), NANO).tiles
    at = VISION + "embeddings."
    x = patches(torch.from_numpy(tiles), NANO, torch.float32) @ vision[at + "patch_embedding.weight"].flatten(1).t()
    x = torch.nn.functional.layer_norm(x + vision[at + "position_embedding.weight"], (NANO.vision_hidden,))
    for i, offsets in enumerate(NEIGHBOURS):
        layer = f"{VISION}encoder.layers.{i}.self_attn."
        q, k = (
            (x @ vision[f"{layer}{name}.weight"].t()).view(len(x), 256, NANO.vision_heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj")
        )
        shares = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1).mean(0)
        for head, (down, right) in enumerate(offsets):
            assert shares[head, 8 * 16 + 8, (8 + down) * 16 + 8 + right] > 0.5


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


def test_rounding_is_that_of_the_files() -> None:
    matrix = torch.randn(7, 96, generator=torch.Generator().manual_seed(5))
    matrix[3, 32:64] = 0
    kind = GGMLQuantizationType.Q4_0
    assert np.array_equal(round_to_q4_0(matrix).numpy(), dequantize(quantize(matrix.numpy(), kind), kind))


def test_rounding_is_about_that_of_larger_blocks() -> None:
    matrix = torch.randn(16, 512, generator=torch.Generator().manual_seed(5))
    matrix[3, 32:64] = 0
    found = round_to_q4_k(matrix).numpy()
    kept = dequantize(quantize_rows(matrix.numpy(), "Q4_K", 1), GGMLQuantizationType.Q4_K)
    assert relative_l2(found, matrix.numpy()) < 1.2 * relative_l2(kept, matrix.numpy())
    for block in found.reshape(-1, 32):
        assert len(np.unique(block)) <= 16


@pytest.mark.parametrize("rounding", [round_to_q4_0, round_to_q4_k])
def test_rounded_weights_are_learned_as_if_they_were_not(rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
    matrix = torch.randn(4, 256, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    weights = {"fc1.weight": matrix, "fc1.bias": bias}
    assert rounded(weights, None) is weights
    found = rounded(weights, rounding)
    assert torch.allclose(found["fc1.weight"], rounding(matrix.detach()), atol=1e-6)
    assert not torch.equal(found["fc1.weight"], matrix) and torch.equal(found["fc1.bias"], bias)
    (found["fc1.weight"] * 3).sum().backward()
    assert matrix.grad is not None and torch.equal(matrix.grad, torch.full((4, 256), 3.0))
