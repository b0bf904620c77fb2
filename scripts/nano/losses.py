"""Auxiliary losses in addition to the answers' loss: for the attention of taught heads, and for the tower's marks.

`figures` collects the values that the training curve shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from scripts.nano.batches import Batch
from scripts.nano.codes import ideal_streams
from scripts.nano.marks import OPEN, PATCH_CLASSES, PLACE_CLASSES, SLOT_CLASSES
from scripts.nano.reading import MOST_LINES, N_SLOTS
from tests.toy.spec import CheckpointSpec

Tensors = dict[str, torch.Tensor]

# The weight of each lesson relative to the answer's loss.
LESSON_WEIGHTS = {
    "history": 0.1,
    "places": 1.0,
    "lines": 0.5,
    "far_lines": 0.5,
    "find": 0.3,
    "carry": 0.1,
    "looks": 0.6,
}
LESSON_WEIGHTS |= {"shown": 0.8, "sought": 0.6}
DEEPER_WEIGHT = 0.25  # extra weight per line further down the page: lower lines are rarer and harder to count
IDLE_WEIGHT = 0.1  # of each head that should look nowhere
BLANK_SHARE = 0.15  # of the patches and tokens without ink that the classifiers are trained on
IDEAL_WEIGHT = 0.5  # of the distance between streams and the ideal ones that `way` trained with
HEADS = "heads."  # prefix of the classifiers of glyphs and addresses, which only training needs


def in_bfloat16(weights: Tensors) -> Tensors:
    """Converts the weights for the kernels: to bfloat16, except those of norms, which stay float32."""
    return {
        name: value if "norm" in name.lower() and "newline" not in name else value.bfloat16()
        for name, value in weights.items()
    }


def lesson_loss(batch: Batch, taught: Tensors, heads: Tensors, figures: dict[str, float]) -> torch.Tensor:
    """Returns the weighted loss of the decoder's taught heads."""
    total = torch.zeros(())
    for term in itertools.chain(
        _attention_terms(batch, taught, figures),
        _look_terms(batch, taught, figures),
        _address_terms(batch, taught, heads[HEADS + "address"], figures),
    ):
        total = total + term
    return total


def _attention_terms(batch: Batch, taught: Tensors, figures: dict[str, float]) -> Iterator[torch.Tensor]:
    """Yields the terms of heads that attend to the tokens before, and to the texts of a page."""
    if "history" in taught:
        yield taught["history"].mean() * LESSON_WEIGHTS["history"]
        figures["history"] = taught["history"].mean().item()
    for name in ("places", "lines", "far_lines", "find", "carry"):
        if name in taught:
            lesson = batch.lessons[name]
            certain = torch.zeros(len(lesson.queries)).index_add(
                0, lesson.pairs[:, 0], lesson.shares * lesson.shares.log()
            )
            excess = taught[name] + certain
            yield excess.mean() * LESSON_WEIGHTS[name]
            figures[f"{name} excess"] = excess.mean().item()
            if name == "find":
                figures["find right"] = (excess < 0.7).float().mean().item()


def _look_terms(batch: Batch, taught: Tensors, figures: dict[str, float]) -> Iterator[torch.Tensor]:
    """Yields the term of the heads that look at the next glyph, one head per slot, and nowhere otherwise."""
    if "looks" not in taught:
        return
    surprise = taught["looks"]
    _, _, token, slot, other_token, other_slot = batch.looks.unbind(1)
    wanted = surprise.gather(1, slot[:, None])[:, 0]
    other = torch.where(other_slot != slot, surprise.gather(1, other_slot[:, None])[:, 0], 0.0)
    idle = (surprise.sum() - wanted.sum() - other.sum()) / len(surprise)
    either = (-torch.logaddexp(-wanted, -taught["others"])).clamp(min=0)
    wanted = torch.where((other_token != token) | (other_slot != slot), either, wanted)
    if "nowhere" in taught:
        idle = idle + taught["nowhere"].sum(1).mean()
    yield (wanted.mean() + IDLE_WEIGHT * idle) * LESSON_WEIGHTS["looks"]
    figures["looks right"] = (wanted < 0.7).float().mean().item()
    figures["looks surprise"] = wanted.mean().item()
    figures["idle"] = idle.item()


def _address_terms(
    batch: Batch, taught: Tensors, address: torch.Tensor, figures: dict[str, float]
) -> Iterator[torch.Tensor]:
    """Yields the terms of hidden states that encode an address: an image token's, and that of an answer's next text."""
    for name in ("shown", "sought"):
        if name in taught:
            out = (taught[name] @ address.bfloat16().t()).float()
            lines, places = out[:, :MOST_LINES], out[:, MOST_LINES:]
            _, _, line, place = getattr(batch, name).unbind(1)
            deep = torch.nn.functional.cross_entropy(lines, line, reduction="none") * (1 + line * DEEPER_WEIGHT)
            loss = deep.mean() + torch.nn.functional.cross_entropy(places, place)
            yield loss * LESSON_WEIGHTS[name]
            figures[f"{name} line"] = (lines.argmax(1) == line).float().mean().item()
            figures[f"{name} place"] = (places.argmax(1) == place).float().mean().item()


def glyph_loss(
    batch: Batch,
    state: torch.Tensor,
    streams: list[torch.Tensor],
    heads: Tensors,
    spec: CheckpointSpec,
    figures: dict[str, float],
) -> torch.Tensor:
    """Returns the loss of predicting patch marks from the tower's last state and token marks from the streams.

    Adds the distance of the streams from the ideal ones.
    """
    assert batch.patches is not None and batch.marks is not None
    marks = torch.split(batch.marks.flatten(0, 1).long(), [*[len(SLOT_CLASSES)] * N_SLOTS, len(PLACE_CLASSES)], 1)
    heads = in_bfloat16(heads)
    asked: list[tuple[str, torch.Tensor, torch.Tensor, tuple[int, ...]]]
    asked = [("tower", state.flatten(0, 1), batch.patches.flatten(0, 1).long(), PATCH_CLASSES)]
    asked += [("place", streams[1].flatten(0, 1), marks[-1], PLACE_CLASSES)]
    asked += [(f"slot{i}", streams[2 + i].flatten(0, 1), marks[i], SLOT_CLASSES) for i in range(N_SLOTS)]
    total = torch.zeros(())
    for name, source, target, classes in asked:
        inked = target[:, : 6 if name == "place" else len(classes)].any(1)
        chosen = inked | (torch.rand(len(inked)) < BLANK_SHARE)
        chosen = (chosen & (target[:, 0] != OPEN)).nonzero()[:, 0]
        out = (source[chosen] @ heads[HEADS + name].t()).float().split(classes, 1)
        target = target[chosen]
        for i, one in enumerate(out):
            weight = torch.where(target[:, i] > 0, 1.0, 0.5)
            losses = torch.nn.functional.cross_entropy(one, target[:, i], reduction="none")
            total = total + (losses * weight).sum() / weight.sum() / len(asked)
            told = target[:, i] > 0
            shown = i == 0 or (name, i) in (("place", 1), ("place", 2), ("slot0", 1), ("slot0", 4), ("place", 6))
            if shown and told.any():
                figures[f"{name} {i}"] = (one.argmax(1) == target[:, i])[told].float().mean().item()
    wanted = ideal_streams(batch.marks, spec)
    for stream, ideal in zip(streams[1:], wanted[1:], strict=True):  # the deepest is unconstrained
        apart = (stream.float() - torch.where(ideal.isnan(), stream.detach().float(), ideal)).square().mean()
        total = total + apart * IDEAL_WEIGHT
        figures["apart"] = figures.get("apart", 0.0) + apart.item() / (len(wanted) - 1)
    figures["seen"] = total.item()
    return total
