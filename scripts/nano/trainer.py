"""One stage of training: its samples, its loss, and its loop, in one or several processes."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from scripts.nano.batches import IGNORE, Batch, batches, collate
from scripts.nano.codes import ideal_streams
from scripts.nano.documents import Document, draw_document
from scripts.nano.initial import initial
from scripts.nano.kernels import Kernels
from scripts.nano.losses import HEADS, glyph_loss, in_bfloat16, lesson_loss
from scripts.nano.marks import PATCH_CLASSES, PLACE_CLASSES, SLOT_CLASSES
from scripts.nano.model import decode, logits, merged, project, tower
from scripts.nano.optimizers import optimizers_for
from scripts.nano.reading import MOST_LINES, MOST_PLACES, N_SLOTS
from scripts.nano.rounding import Rounding, round_to_q4_0, round_to_q4_k, rounded
from scripts.nano.samples import Prompter, Sample, document_sample, letters_sample, lines_sample, text_sample
from scripts.nano.spec import NANO, TEXT
from scripts.nano.truth import HELD_OUT_SEEDS, Table
from tests.toy.spec import CheckpointSpec

Tensors = dict[str, torch.Tensor]

STAGES = ("base", "tower", "way", "read")
FREE_EYE_SHARE = 0.15  # share of the last stage with a frozen tower; then it trains too, as its marks limit accuracy
N_LETTER_SHEETS = {"base": 0, "tower": 6, "way": 0, "read": 5}
GAP_SHARE, GAP_TRIES = 0.2, 12  # share of tables replaced by one with a gap, which breaks counting; draws to find one
OVERVIEW_SHARE = 0.25  # of the documents in `tower` that keep the overview tile, which has nothing to read
LEVELS = (0.5, 0.7, 1.0, 1.0)  # of the documents once the level has reached 1
N_WHERE = 3  # marks at the end of a token's marks that are never confused: the token's position
MISSED, BLUR = 0.01, 0.2  # in `way`: share of tokens with another token's marks; noise added to all streams
TEXT_SHARE = 0.04  # of the samples in the last stages, so that the adapter keeps the base's abilities
ROUNDED_SHARE = 0.6  # of the last stage's steps with weights rounded to 4 bits, so that 4-bit files lose little
WAY = ("model.image_newline", HEADS + "address")  # trained with the adapter in `way`, not with the tower


class Trainer:
    """One process of one training stage. 'Eye' means the tower and its projectors."""

    def __init__(self, rank: int, options: argparse.Namespace) -> None:
        self.rank, self.options, self.stage = rank, options, options.stage
        self.spec, self.kernels, self.prompter = NANO, Kernels(not options.no_fuse), Prompter()
        self.text, self.vision, self.adapter = initial(self.spec, self.prompter.n_vocab, options.seed)
        self.heads = _fresh_heads(self.spec, options.seed)
        self.minutes, self.step = 0.0, 0
        self.level = -0.5 if self.stage == "way" else 1.0  # up to 0 there are only lines to copy
        saved = self._load_stages(options.run)
        eye = {name: value for name, value in (self.vision | self.heads).items() if name not in WAY}
        way = {name: value for name, value in (self.vision | self.heads).items() if name in WAY}
        names = {
            "base": self.text,
            "tower": eye,
            "way": {**self.adapter, **way},
            "read": {**self.adapter, **way, **eye},
        }[self.stage]
        for group in (self.text, self.vision, self.adapter, self.heads):
            for name, value in group.items():
                group[name] = value.to(options.device)
        known = {**self.text, **self.vision, **self.adapter, **self.heads}
        self.trained: Tensors = {name: known[name].requires_grad_(True) for name in names}
        self.optimizers = optimizers_for(
            self.trained,
            options.rate or {"base": 0.02, "tower": 0.02, "way": 0.004, "read": 0.002}[self.stage],
            options.adapter_rate,
        )
        if saved is not None:
            for optimizer, state in zip(self.optimizers, saved, strict=True):
                peaks = [group["peak"] for group in optimizer.param_groups]
                optimizer.load_state_dict(state)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["peak"] = peak
        self.averages: dict[str, float] = {}
        self.rounding: Rounding | None = None  # of the text weights in this step; if set, vision weights are Q4_0

    def _load_stages(self, run: Path) -> Any:
        """Loads the weights of all stages trained so far. Returns this stage's saved optimizer states, if any."""
        saved = None
        for stage in STAGES:
            path = run / f"{stage}.pt"
            if path.exists():
                content = torch.load(path, weights_only=True)
                for group in (self.text, self.vision, self.adapter, self.heads):
                    group.update({name: value for name, value in content["weights"].items() if name in group})
                if stage == self.stage:
                    self.minutes, self.step, saved = content["minutes"], content["step"], content["optimizers"]
                    self.level = content["level"]
        return saved

    # --- data ---

    def draw(self, rng: random.Random, seeds: tuple[int, int]) -> Sample:
        """Draws one sample of the kind that the stage trains on, from seeds in the given range."""
        if self.stage == "base" or (self.stage in ("way", "read") and self.level > 0 and rng.random() < TEXT_SHARE):
            return text_sample(rng, self.prompter)
        if self.stage == "way" and (self.level <= 0 or rng.random() < 0.04 + 0.3 * (1 - self.level)):
            return lines_sample(rng, self.prompter, self.spec, max(0.0, min(1.0, 1 + 2 * self.level)))
        kind = rng.choices(["table", "chart", "form"], [50, 21, 29])[0]
        level = rng.choice(LEVELS) if self.level >= 1 else rng.random() * 0.3 + self.level * 0.7
        document = draw_document(rng.randrange(*seeds), kind, level)
        as_they_come = seeds[0] > 0  # held-out documents are not selected
        if kind == "table" and not as_they_come and rng.random() < GAP_SHARE:
            drawn = (draw_document(rng.randrange(*seeds), kind, level) for _ in range(GAP_TRIES))
            document = next((other for other in drawn if has_gap(other)), document)
        sample = document_sample(document, rng, self.prompter, self.spec)
        if self.stage == "tower" and rng.random() > OVERVIEW_SHARE:
            return sample.without_overview()
        return sample

    def letters(self, rng: random.Random) -> list[Sample]:
        """Draws the sheets of letters that a step uses in addition to its documents."""
        n_sheets = 0 if self.is_eye_frozen() else N_LETTER_SHEETS[self.stage]
        return [letters_sample(rng, self.spec) for _ in range(n_sheets)]

    def is_eye_frozen(self) -> bool:
        """Whether the tower and projectors are frozen in this step.

        Early in `read`, the decoder does not yet know where to look, and its gradient would only disturb them. Later,
        they train in one of `--eye-every` steps, because such steps take longer.
        """
        early = self.minutes < FREE_EYE_SHARE * self.options.minutes and self.options.eye_every > 1
        return self.stage == "read" and (early or self.step % self.options.eye_every > 0)

    # --- the loss ---

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the loss, and figures for the curve."""
        figures: dict[str, float] = {}
        total = torch.zeros(())
        images = None
        if batch.tiles is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_eye_frozen()):
                streams = self.streams(batch, figures) if self.stage != "way" else self.blurred_streams(batch)
            if "seen" in figures:
                total = total + streams.pop()
            if self.stage == "tower":
                return total, figures
            newline = self.vision["model.image_newline"].view(1, -1).bfloat16()
            packed = [torch.cat([stream.flatten(0, 1), newline])[batch.rows] for stream in streams]
            images = (batch.positions, packed)
        weights = self.text if self.stage == "base" else merged(self.text, self.adapter, self.spec)
        half = in_bfloat16(rounded(weights, self.rounding))
        taught: Tensors = {}
        lessons = batch if images is not None else None
        hidden = decode(half, batch.tokens, images, self.spec, self.kernels, lessons, taught).flatten(0, 1)
        total = total + lesson_loss(batch, taught, self.heads, figures)
        labels = batch.labels.flatten()
        where = (labels != IGNORE).nonzero()[:, 0]
        predicted = logits({TEXT + "embed_tokens.weight": half[TEXT + "embed_tokens.weight"]}, hidden[where], self.spec)
        loss = torch.nn.functional.cross_entropy(predicted, labels[where])
        right = predicted.argmax(-1) == labels[where]
        figures["loss"], figures["tokens"] = loss.item(), right.float().mean().item()
        fine = torch.ones_like(labels, dtype=torch.bool)
        fine[where] = right
        exact = fine.view(batch.labels.shape).all(1)
        for kind in set(batch.kinds):
            chosen = [right for right, k in zip(exact.tolist(), batch.kinds, strict=True) if k == kind]
            figures[f"exact {kind}"] = sum(chosen) / len(chosen)
        return total + loss, figures

    def streams(self, batch: Batch, figures: dict[str, float]) -> list[torch.Tensor]:
        """Computes the streams of the tiles. Unless the eye is frozen, the glyph loss is appended as last element."""
        vision = in_bfloat16(rounded(self.vision, round_to_q4_0 if self.rounding else None))
        states = tower(vision, batch.tiles, self.spec, self.kernels)
        streams = project(vision, states, self.spec, self.kernels)
        if self.is_eye_frozen():
            return streams
        return [*streams, glyph_loss(batch, states[-1], streams, self.heads, self.spec, figures)]

    def blurred_streams(self, batch: Batch) -> list[torch.Tensor]:
        """Returns ideal streams with noise, in which some tokens have another token's marks, as from a good tower."""
        assert batch.marks is not None
        marks = batch.marks.clone()
        flat = marks[..., :-N_WHERE].flatten(0, 1)
        wrong = torch.rand(flat.shape[0]) < MISSED
        flat[wrong] = flat[torch.randint(len(flat), (int(wrong.sum()),))]
        marks[..., :-N_WHERE] = flat.view(marks[..., :-N_WHERE].shape)
        streams = [stream.nan_to_num() for stream in ideal_streams(marks, self.spec)]
        return [(stream + torch.randn_like(stream) * BLUR).bfloat16() for stream in streams]

    # --- the loop ---

    def train(self) -> None:
        """Trains until the schedule's minutes or steps are over."""
        rng = random.Random(f"{self.options.seed} {self.rank} {self.step}")
        self.set_level()
        source = batches(lambda: self.draw(rng, (0, HELD_OUT_SEEDS)), self.options.budget, 128, rng)
        began, told, evaluated = time.monotonic() - self.minutes * 60, 0.0, time.monotonic()
        last_saved = time.monotonic()
        while True:
            self.minutes = self.common((time.monotonic() - began) / 60)
            if self.minutes >= self.options.minutes or self.step >= (self.options.steps or math.inf):
                break
            self.set_level()
            rate = self.set_rate()
            is_rounding = self.stage == "read" and rng.random() < ROUNDED_SHARE
            self.rounding = rng.choice((round_to_q4_0, round_to_q4_k)) if is_rounding else None
            batch = collate([*next(source), *self.letters(rng)], self.prompter, self.spec)
            loss, figures = self.loss(batch)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            self.share_gradients()
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            for name, value in figures.items():
                self.averages[name] = 0.95 * self.averages.get(name, value) + 0.05 * value
            if self.rank == 0 and time.monotonic() - told > 20:
                told = time.monotonic()
                self.tell(
                    {"minutes": self.minutes, "step": self.step, "rate": rate, "level": self.level, **self.averages}
                )
            if self.rank == 0 and time.monotonic() - last_saved > 120:
                last_saved = time.monotonic()
                self.save()
            if time.monotonic() - evaluated > 480 and self.rank == 0:
                evaluated = time.monotonic()
                self.evaluate()
        if self.rank == 0:
            self.evaluate()
            self.save()

    def common(self, minutes: float) -> float:
        """Returns the largest of all processes' clocks, since decisions by time must be the same in all of them."""
        if self.options.processes == 1:
            return minutes
        clock = torch.tensor([minutes])
        torch.distributed.all_reduce(clock, torch.distributed.ReduceOp.MAX)
        return clock.item()

    def set_level(self) -> None:
        done = self.minutes / self.options.minutes
        if self.stage == "way":
            enough = 0.5 if self.level < 0 else 0.7
            rise = 0.015 if self.averages.get("tokens", 0) > enough else 0.0
            self.level = min(1.0, max(self.level + rise, (done - 0.2) / 0.3))
        if self.stage == "tower":
            self.level = min(1.0, 0.3 + done / 0.3)

    def set_rate(self) -> float:
        """Sets the learning rates: a warm-up over 40 steps, times a cosine by time down to 3%. Returns the factor."""
        done = min(1.0, self.minutes / self.options.minutes)
        factor = min(1.0, (self.step + 1) / 40) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        return factor

    def share_gradients(self) -> None:
        for value in self.trained.values():
            if value.grad is None:  # a batch of text has none for the eye, and all processes must send the same tensors
                value.grad = torch.zeros_like(value)
        grads = [value.grad for value in self.trained.values() if value.grad is not None]
        if self.options.processes > 1:
            flat = torch.cat([grad.flatten() for grad in grads])
            torch.distributed.all_reduce(flat)
            flat /= self.options.processes
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        if self.is_eye_frozen():
            for name, value in self.trained.items():
                if "lora" not in name and name not in WAY:
                    value.grad = None  # a zero gradient would still apply the optimizers' momentum
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm} at step {self.step}; start again from the last save"
            )

    def evaluate(self) -> None:
        """Writes figures on held-out documents (or held-out text) to the curve, with teacher forcing."""
        rng = random.Random("held out")
        level, self.level, self.rounding = self.level, 1.0, None
        sums: dict[str, list[float]] = {}
        n = 0
        for group in batches(
            lambda: self.draw(rng, (HELD_OUT_SEEDS, 2 * HELD_OUT_SEEDS)), self.options.budget, 64, rng
        ):
            with torch.no_grad():
                _, figures = self.loss(collate(group, self.prompter, self.spec))
            for name, value in figures.items():
                sums.setdefault(name, []).append(value)
            n += len(group)
            if n >= 64:
                break
        self.level = level
        self.tell({"minutes": self.minutes, "held out": n, **{name: sum(v) / len(v) for name, v in sums.items()}})

    def tell(self, record: dict[str, float]) -> None:
        line = json.dumps({name: round(value, 4) for name, value in record.items()})
        print(line, file=sys.stderr, flush=True)
        with (self.options.run / f"{self.stage}.jsonl").open("a") as curve:
            curve.write(line + "\n")

    def save(self) -> None:
        path = self.options.run / f"{self.stage}.pt"
        content = {
            "weights": {name: value.detach().cpu() for name, value in self.trained.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "minutes": self.minutes,
            "step": self.step,
            "level": self.level,
        }
        torch.save(content, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)


def _fresh_heads(spec: CheckpointSpec, seed: int) -> Tensors:
    """Draws the classifiers of glyphs and addresses, which only training needs."""
    generator = torch.Generator().manual_seed(seed + 1)
    width = spec.text_hidden
    sizes = {f"slot{i}": (sum(SLOT_CLASSES), width) for i in range(N_SLOTS)}
    sizes |= {"place": (sum(PLACE_CLASSES), width), "address": (MOST_LINES + MOST_PLACES, width)}
    sizes |= {"tower": (sum(PATCH_CLASSES), spec.vision_hidden)}
    return {
        HEADS + name: torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in)
        for name, (n_out, n_in) in sizes.items()
    }


def has_gap(document: Document) -> bool:
    """Whether the document is a table whose first cell, or the last cell of a row, is empty."""
    table = document.truth
    return isinstance(table, Table) and any(
        not cell.text and (cell.row == cell.col == 0 or cell.col + cell.colspan == table.n_cols) for cell in table.cells
    )
