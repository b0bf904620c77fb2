"""The nano model's training code against transformers and torch's own attention."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_spec import model_config
from documents import draw_document
from drawing import ENDING, START
from formats import chart_csv
from language import build_tokenizer
from model import NANO, NEIGHBOURS, VISION, Kernels, _surprise, decode, initial, logits, merged, patches, project, tower
from reading import chart_rows, glyphs_of_answer, links_of, told
from reference import relative_l2
from samples import (
    AFTER,
    GAP,
    IGNORE,
    N_MARKS,
    N_SLOTS,
    Batch,
    Prompter,
    Sample,
    batches,
    collate,
    document_sample,
    glyph_labels,
    image_token_of_glyphs,
    letters_sample,
    lines_sample,
    text_sample,
)
from train import FREE_TOWER_STEPS, Trainer
from truth import Chart, Form, Table


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


def test_every_glyph_is_in_one_patch(prompter: Prompter) -> None:
    del prompter
    for seed in range(20):
        document = draw_document(seed, "table", level=0.3)
        labels = glyph_labels(document, NANO)[1:, :, :N_SLOTS]
        placed = labels[(labels > 0) & (labels < 255)]
        codes = sorted(chr(code + 32) for code in placed.tolist())
        drawn = sorted(chr(code) for code in document.glyphs.code.tolist())
        missing = len(drawn) - len(codes)
        assert 0 <= missing <= 0.05 * len(drawn), "more than a twentieth share a patch with two others"
        assert not set(codes) - set(drawn)


def marks(sample: Sample, position: int, slot: int) -> list[int]:
    """What the labels of the tiles have for the patch of an image token in which a slot is."""
    assert sample.image_rows is not None and sample.glyphs is not None
    tile, token = divmod(int(sample.image_rows[position - sample.image_at]), 64)
    row, column = divmod(token, 8)
    patches = sample.glyphs[tile].reshape(16, 16, N_MARKS)[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    return [int(mark) for mark in patches.reshape(4, N_MARKS)[slot // 2]]


def test_answers_look_where_their_letters_stand(prompter: Prompter) -> None:
    rng = random.Random(2)
    samples = [lines_sample(rng, prompter, NANO, 1.0) for _ in range(20)]
    for kind in ("table", "chart", "form"):
        samples += [document_sample(draw_document(seed, kind), rng, prompter, NANO) for seed in range(10)]
    for sample in samples:
        assert len({answer for answer, *_ in sample.looks}) == len(sample.looks)
    shown = [
        (prompter.tokenizer.decode([sample.tokens[answer]]), chr(marks(sample, image, slot)[slot % 2] + 32))
        for sample in samples
        for answer, image, slot, _, _ in sample.looks
    ]
    at_letters = [(said, glyph) for said, glyph in shown if len(said) == 1 and not said.isspace()]
    assert len(at_letters) > 1500
    found = [
        (prompter.tokenizer.decode(sample.tokens[at:answer]), chr(marks(sample, image, slot)[slot % 2] + 32))
        for sample in samples
        for at in [sample.tokens.index(prompter.image_id)]
        for answer, _, _, image, slot in sample.looks
        if slot >= 0
    ]
    assert len(found) > 1500
    # the glyph that was written last, but for signs that stand on the page and in no word of the answer
    assert np.mean([glyph in said.rstrip()[-12:] for said, glyph in found]) > 0.97
    last = [(said[-1], glyph) for said, glyph in found if said[-1].isalnum()]
    assert np.mean([said == glyph for said, glyph in last]) > 0.9
    # signs between words look ahead to the next word
    assert np.mean([said == glyph for said, glyph in at_letters if said.isalnum()]) > 0.97


def test_a_value_of_a_form_is_found_by_its_label(prompter: Prompter) -> None:
    rng = random.Random(6)
    n_found = 0
    for seed in range(30):
        document = draw_document(seed, "form")
        assert isinstance(document.truth, Form)
        sample = document_sample(document, rng, prompter, NANO)
        answer = prompter.tokenizer.decode(sample.tokens[sample.answer_at : -1], skip_special_tokens=False)
        page = "".join(map(chr, document.glyphs.code.tolist()))
        values, led = told(document, answer)
        for at, text in values:
            value = page[text.first : text.last + 1]
            assert answer[at:].replace(" ", "").startswith(value)
            label = page[: led[text.first] + 1].lower()
            names = [name for name, said in document.truth.fields if said and said.replace(" ", "") == value]
            assert any(label.endswith(name.rsplit("_", 1)[-1][-4:]) for name in names)
        n_found += len(values)
        if sample.kind == "kvp":
            assert len(values) == sum(value is not None for _, value in document.truth.fields)
        else:  # nothing was written before the value, so the label is all there is to go by
            assert sample.looks[0][0] == sample.answer_at and sample.looks[0][4] >= 0
    assert n_found > 80


def test_rows_of_a_chart_are_its_labels_and_values() -> None:
    n_linked = 0
    for seed in range(60):
        document = draw_document(seed, "chart")
        chart = document.truth
        assert isinstance(chart, Chart)
        page = "".join(map(chr, document.glyphs.code.tolist()))
        rows = [[page[text.first : text.last + 1] for text in row] for row in chart_rows(document)]
        expected = [
            [text.replace(" ", "") for text in (label, *values)]
            for label, values in zip(chart.labels, chart.values, strict=True)
        ]
        assert rows == ([] if chart.kind == "pie" else expected)
        answer = chart_csv(chart)
        glyphs = glyphs_of_answer(document, answer, told(document, answer)[0])
        assert all(answer[at] == page[glyph] for at, glyph in glyphs)
        if rows:
            body = answer.index("\n")
            letters = [char for char in answer[body:] if char not in '\n" ']
            n_commas = sum(len(row) - 1 for row in rows)
            assert len([at for at, _ in glyphs if at > body]) == len(letters) - n_commas
            shown, _ = image_token_of_glyphs(document, NANO)
            links = links_of(document, shown.tolist())
            assert all(start > end for start, end in links) and len(dict(links)) == len(links)
            n_linked += len(links)
    assert n_linked > 100


def test_texts_are_linked_to_where_the_text_before_them_ends(prompter: Prompter) -> None:
    rng = random.Random(5)
    samples = [document_sample(draw_document(seed, "table"), rng, prompter, NANO) for seed in range(20)]
    links = [(sample, *link) for sample in samples for link in sample.links]
    assert len(links) > 200
    for sample, first, last in links:
        assert sample.image_at <= last < first < sample.image_at + len(sample.image_rows)
        gaps = {at: [marks(sample, at, 2 * patch)[GAP] for patch in range(4)] for at in (first, last)}
        # the first glyph of a patch says what is before it; a text's last letter may be a patch's second
        assert any(gap in (START, START + ENDING) for gap in gaps[first])
        assert any(marks(sample, last, 2 * patch)[AFTER] == 0 and gaps[last][patch] for patch in range(4))


@pytest.mark.parametrize("seed", range(5))
def test_marks_tell_what_is_before_a_glyph(seed: int) -> None:
    document = draw_document(seed, "table", level=0.0)
    assert isinstance(document.truth, Table)
    texts = [f"^{cell.text}$" for cell in document.truth.cells]
    labels = glyph_labels(document, NANO)[1:].reshape(-1, N_MARKS)
    n_adjacent = 0
    for first, _, before, two_before, gap, _ in labels[labels[:, 0] > 0].tolist():
        letters = "".join(chr(mark + 32) for mark in (two_before, before) if mark)
        between, start = {1: "", 2: " ", 0: "^"}[gap % 3], "" if two_before else "^"
        end = "$" if gap > 3 else ""
        seen = [
            text for text in texts if f"{(before and chr(before + 32)) or ''}{between}{chr(first + 32)}{end}" in text
        ]
        assert seen, (before, first, gap)
        assert any(f"{start}{letters}" in text.replace(" ", "") for text in seen)
        n_adjacent += gap in (1, 4)
    assert n_adjacent > 0


def test_how_surprised_a_head_is_is_its_attention(prompter: Prompter) -> None:
    text, vision, _ = initial(NANO, prompter.n_vocab, seed=4)
    batch = collate([lines_sample(random.Random(3), prompter, NANO, 0.5)], prompter, NANO)
    assert batch.tiles is not None
    kernels = Kernels(fuse=False)
    streams = project(vision, tower(vision, batch.tiles, NANO, kernels), NANO, kernels)
    newline = vision["model.image_newline"].view(1, -1)
    packed = [torch.cat([stream.flatten(0, 1), newline])[batch.rows] for stream in streams]
    row, position, *_ = batch.looks[-1].tolist()
    everywhere = torch.tensor([[row, position, target, 2, target, 7] for target in range(position + 1)])
    looked: list[torch.Tensor] = []
    decode(text, batch.tokens, (batch.positions, packed), NANO, kernels, everywhere, looked)
    assert len(looked) == 3
    finding, looking, looking_second = torch.exp(-torch.stack(looked))  # each (targets, heads)
    assert torch.allclose(looking[:, 1].sum(), torch.tensor(1.0), atol=1e-5), "slot 2: the second patch's first glyph"
    assert torch.allclose(finding[:, 3].sum(), torch.tensor(1.0), atol=1e-5), "slot 7: the fourth patch's second one"
    idle = torch.cat((looking[:, [0, 2, 3]], looking_second, finding[:, :3]), dim=1)
    assert torch.equal(idle, idle[:1].expand_as(idle)), "the other heads should look at position 0"
    linked: list[torch.Tensor] = []
    links = everywhere[:, :3]
    decode(text, batch.tokens, (batch.positions, packed), NANO, kernels, links=links, linked=linked)
    assert torch.allclose(torch.exp(-torch.cat(linked, dim=1)).sum(0), torch.ones(2), atol=1e-5)


def test_surprises_of_several_rows_are_those_of_each_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(3, 2, 9, 4), torch.randn(3, 2, 9, 4)
    looks = torch.tensor([[row, position, 0, 0, 0, 0] for row, position in ((0, 5), (0, 2), (2, 8), (2, 3), (2, 4))])
    targets = torch.tensor([[5, 1], [0, 2], [7, 3], [3, 0], [1, 4]])
    found = _surprise(q, k, looks, targets, 0.5)
    for i, (row, position, *_) in enumerate(looks.tolist()):
        for head in range(2):
            scores = q[row, head, position] @ k[row, head, : position + 1].T * 0.5
            assert torch.isclose(found[i, head], -torch.log_softmax(scores, 0)[targets[i, head]], atol=1e-5)


def test_the_tower_learns_in_its_own_steps_only(prompter: Prompter, tmp_path: Path) -> None:
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
        seed=0,
    )
    trainer = Trainer(0, options)
    batch = collate([lines_sample(random.Random(3), prompter, NANO, 0.5)], prompter, NANO)
    name = VISION + "encoder.layers.0.mlp.fc1.weight"
    changed = []
    for trainer.minutes, trainer.step in ((1.0, 0), (9.0, FREE_TOWER_STEPS), (9.0, FREE_TOWER_STEPS + 1)):
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
    assert letters.glyphs is not None and letters.tiles is not None
    assert letters.tiles.shape == (6, 128, 128, 3) and letters.glyphs.shape == (6, 256, N_MARKS)
    assert (letters.glyphs > 0).sum() > 200
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
