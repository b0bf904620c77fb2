"""The nano model's training code, compared with transformers and torch's own attention."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from granite4v.ggml.quantize import quantize_rows
from scripts.nano.batches import IGNORE, collate
from scripts.nano.codes import codes, ideal_streams
from scripts.nano.documents import draw_document
from scripts.nano.initial import NEIGHBOURS, initial
from scripts.nano.kernels import Kernels
from scripts.nano.language import build_tokenizer
from scripts.nano.marks import PLACE_AT, PLACE_CLASSES, SLOT_CLASSES
from scripts.nano.model import decode, log_shares, logits, merged, patches, project, tower
from scripts.nano.reading import N_SLOTS
from scripts.nano.rounding import round_to_q4_0, round_to_q4_k, rounded
from scripts.nano.samples import Prompter, document_sample, letters_sample, lines_sample
from scripts.nano.spec import NANO, TAUGHT_HEADS, VISION
from scripts.nano.trainer import Trainer
from tests.peers.reference import relative_l2
from tests.toy.spec import model_config


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
    # growing keys make the scores of later positions overflow an exponential that ignores the mask
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
    """Half precision rounds large scores by more than one; the gradient of a certain head must not depend on that."""
    torch.manual_seed(0)
    keys = torch.randn(1, 1, 40, 64)
    keys = (keys / keys.norm(dim=-1, keepdim=True) * 60).bfloat16()
    queries = keys.flip(2).clone().requires_grad_(True)  # each one matches one key, and is far from the others
    upstream = torch.randn(1, 1, 40, 64).bfloat16()
    Kernels(fuse=False).attention(queries, keys, torch.randn(1, 1, 40, 64).bfloat16(), False, 0.125).backward(upstream)
    assert queries.grad is not None
    assert queries.grad.abs().max() < 1e-6


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
