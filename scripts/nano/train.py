#!/usr/bin/env python3
"""Trains the nano model: a text-only base, an eye, and, with the base frozen, the way over a page and reading.

    python -m scripts.nano.train base  RUN --minutes 25      # language model on text alone
    python -m scripts.nano.train tower RUN --minutes 65      # tower and projectors on which glyph is where
    python -m scripts.nano.train way   RUN --minutes 40      # the adapter on perfect streams: where is the next glyph?
    python -m scripts.nano.train read  RUN --minutes 41 --processes 2    # all of it on pictures
    python -m scripts.nano.train export RUN granite4v/nano
    python -m scripts.nano.train restore RUN granite4v/nano  # a run to go on from, made of a checkpoint
    python -m scripts.nano.train read  RUN --minutes 108 --processes 2 --rate 0.0035 --adapter-rate 0.5 \\
        --eye-every 1 --budget 2800                          # how the shipped checkpoint went on

What is shipped is the mean (`export --mean-with`) of nine saves of that, one every two minutes from 87 to 103; it reads
a point more of small tables than the mean of the last four. From minute 80 there were fewer charts (50, 15, 35) and
hardly any easy documents. After `restore`, `way` would only do harm: the adapter knows the eye's own streams by then,
which are not perfect ones.

`tower` needs neither `base` nor `way` and can run beside them, one core each. Every stage writes RUN/<stage>.pt
again and again, appends its curve to RUN/<stage>.jsonl, and goes on from what is there when it is started again.
`--device cuda` trains on a GPU. On a CPU, torch spends much time in page faults unless memory is kept: preload
tcmalloc (LD_PRELOAD=libtcmalloc_minimal.so.4), or set MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ high.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from scripts.nano.documents import Document
    from scripts.nano.samples import Batch

    Tensors = dict[str, torch.Tensor]
    Rounding = Callable[[torch.Tensor], torch.Tensor]

# How much each lesson counts beside the answer's own loss.
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
DEEPER_WEIGHT = 0.25  # more for every line further down the page: there are fewer of them, and they are harder to count
IDLE_WEIGHT = 0.1  # of each head that should look nowhere
FREE_EYE_SHARE = 0.15  # of the last stage: from then on the tower learns on, whose marks limit what can be found
N_LETTER_SHEETS = {"base": 0, "tower": 6, "way": 0, "read": 5}
GAP_SHARE, GAP_TRIES = 0.2, 12  # of tables: look for one that counting texts does not tell, among so many others
OVERVIEW_SHARE = 0.25  # of the documents that `tower` sees: there is nothing to read in it
LEVELS = (0.5, 0.7, 1.0, 1.0)  # of the documents when all of them can be had
BLANK_SHARE = 0.15  # of the patches and tokens without ink that the classifiers are asked about
IDEAL_WEIGHT = 0.5  # of how far streams are from those that `way` learned with
N_WHERE = 3  # marks of a token, the last ones, that no eye takes for another's: where the token is
MISSED, BLUR = 0.01, 0.2  # in `way`: share of tokens that tell another's marks, noise on what all of them tell
TEXT_SHARE = 0.04  # of the samples in the last stage, so that the adapter keeps what the base can do
ROUNDED_SHARE = 0.6  # of the last stage's steps that are taken with 4 bits a weight, so that such files lose little
HEADS = "heads."  # the classifiers of glyphs and addresses, needed in training only
WAY = ("model.image_newline", HEADS + "address")  # trained where the way is learned, not where the eye is


def main() -> None:
    options = _arguments()
    if options.stage == "export":
        from scripts.nano.export import export

        export(options.run, options.out, options.mean_with)
        return
    options.run.mkdir(parents=True, exist_ok=True)
    if options.stage == "restore":
        from scripts.nano.export import restore

        restore(options.out, options.run)
        return
    if options.processes > 1:
        import os

        import torch

        options.rendezvous = f"file:///tmp/nano-{os.getpid()}"
        torch.multiprocessing.spawn(_work, (options,), nprocs=options.processes)
    else:
        _work(0, options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["base", "tower", "way", "read", "export", "restore"])
    parser.add_argument("run", type=Path, help="directory of the run's weights and curves")
    parser.add_argument("out", type=Path, nargs="?", help="the checkpoint that export writes and restore reads")
    parser.add_argument("--minutes", type=float, default=20, help="length of the whole schedule")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes, one thread each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=int, default=8192, help="padded positions a process takes in one step")
    parser.add_argument("--rate", type=float, default=0.0, help="learning rate of the matrices; 0: the stage's own")
    parser.add_argument("--adapter-rate", type=float, default=2.0, help="of the other matrices' learning rate")
    parser.add_argument(
        "--eye-every",
        type=int,
        default=5,
        help="read: the eye learns in one step of so many; 1: from the start",
    )
    parser.add_argument("--mean-with", type=Path, nargs="*", default=[], help="export: other saves of the last stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-fuse", action="store_true", help="without torch.compile")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps")
    return parser.parse_args()


def _work(rank: int, options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    if options.processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=options.rendezvous, rank=rank, world_size=options.processes
        )
    Trainer(rank, options).train()


class Trainer:
    """One process of one stage."""

    def __init__(self, rank: int, options: argparse.Namespace) -> None:
        import torch

        from scripts.nano.model import NANO, Kernels, initial
        from scripts.nano.reading import MOST_LINES, MOST_PLACES, N_SLOTS
        from scripts.nano.samples import PATCH_CLASSES, PLACE_CLASSES, SLOT_CLASSES, Prompter

        self.rank, self.options, self.stage = rank, options, options.stage
        self.spec, self.kernels, self.prompter = NANO, Kernels(not options.no_fuse), Prompter()
        self.text, self.vision, self.adapter = initial(self.spec, self.prompter.n_vocab, options.seed)
        generator = torch.Generator().manual_seed(options.seed + 1)
        width = self.spec.text_hidden
        sizes = {f"slot{i}": (sum(SLOT_CLASSES), width) for i in range(N_SLOTS)}
        sizes |= {"place": (sum(PLACE_CLASSES), width), "address": (MOST_LINES + MOST_PLACES, width)}
        sizes |= {"tower": (sum(PATCH_CLASSES), self.spec.vision_hidden)}
        self.heads = {
            HEADS + name: torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in)
            for name, (n_out, n_in) in sizes.items()
        }
        self.minutes, self.step, saved = 0.0, 0, None
        level = -0.5 if self.stage == "way" else 1.0  # below 0 there are only lines to copy
        for stage in ("base", "tower", "way", "read"):
            path = options.run / f"{stage}.pt"
            if path.exists():
                content = torch.load(path, weights_only=True)
                for group in (self.text, self.vision, self.adapter, self.heads):
                    group.update({name: value for name, value in content["weights"].items() if name in group})
                if stage == self.stage:
                    self.minutes, self.step, saved = content["minutes"], content["step"], content["optimizers"]
                    level = content["level"]
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
        self.optimizers = _optimizers(
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
        self.level = level
        self.rounding: Rounding | None = None  # of the text's weights in this step; with any, vision's are Q4_0

    # --- data ---

    def draw(self, rng: random.Random, seeds: tuple[int, int]) -> Any:
        """One sample of the stage's own kind, from seeds in the given range."""
        from scripts.nano.samples import document_sample, lines_sample, text_sample

        if self.stage == "base" or (self.stage in ("way", "read") and self.level > 0 and rng.random() < TEXT_SHARE):
            return text_sample(rng, self.prompter)
        from scripts.nano.documents import draw_document

        if self.stage == "way" and (self.level <= 0 or rng.random() < 0.04 + 0.3 * (1 - self.level)):
            return lines_sample(rng, self.prompter, self.spec, max(0.0, min(1.0, 1 + 2 * self.level)))
        kind = rng.choices(["table", "chart", "form"], [50, 21, 29])[0]
        level = rng.choice(LEVELS) if self.level >= 1 else rng.random() * 0.3 + self.level * 0.7
        document = draw_document(rng.randrange(*seeds), kind, level)
        as_they_come = seeds[0] > 0  # held-out ones
        if kind == "table" and not as_they_come and rng.random() < GAP_SHARE:
            drawn = (draw_document(rng.randrange(*seeds), kind, level) for _ in range(GAP_TRIES))
            document = next((other for other in drawn if has_gap(other)), document)
        sample = document_sample(document, rng, self.prompter, self.spec)
        if self.stage == "tower" and rng.random() > OVERVIEW_SHARE:
            return sample.without_overview()
        return sample

    def letters(self, rng: random.Random) -> list[Any]:
        """Sheets of letters that a step looks at besides its documents."""
        from scripts.nano.samples import letters_sample

        n_sheets = 0 if self.is_eye_frozen() else N_LETTER_SHEETS[self.stage]
        return [letters_sample(rng, self.spec) for _ in range(n_sheets)]

    def is_eye_frozen(self) -> bool:
        """In this step. While the decoder does not yet know where to look, its gradient would only disturb the eye;
        later, steps in which the tower learns too may be few because they cost time."""
        early = self.minutes < FREE_EYE_SHARE * self.options.minutes and self.options.eye_every > 1
        return self.stage == "read" and (early or self.step % self.options.eye_every > 0)

    # --- the loss ---

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss to descend, and figures for the curve."""
        import torch

        from scripts.nano.model import TEXT, decode, logits, merged
        from scripts.nano.samples import IGNORE

        figures: dict[str, float] = {}
        total = torch.zeros(())
        images = None
        if batch.tiles is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_eye_frozen()):
                streams = self.streams(batch, figures) if self.stage != "way" else self.ideal_streams(batch)
            if "seen" in figures:
                total = total + streams.pop()
            if self.stage == "tower":
                return total, figures
            newline = self.vision["model.image_newline"].view(1, -1).bfloat16()
            packed = [torch.cat([stream.flatten(0, 1), newline])[batch.rows] for stream in streams]
            images = (batch.positions, packed)
        weights = self.text if self.stage == "base" else merged(self.text, self.adapter, self.spec)
        half = _half(rounded(weights, self.rounding))
        taught: Tensors = {}
        lessons = batch if images is not None else None
        hidden = decode(half, batch.tokens, images, self.spec, self.kernels, lessons, taught).flatten(0, 1)
        total = total + self.lesson_loss(batch, taught, figures)
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
        """What the tower and the projectors make of the tiles; behind the streams, how well they tell what is there."""
        from scripts.nano.model import project, tower

        vision = _half(rounded(self.vision, round_to_q4_0 if self.rounding else None))
        states = tower(vision, batch.tiles, self.spec, self.kernels)
        streams = project(vision, states, self.spec, self.kernels)
        return streams if self.is_eye_frozen() else [*streams, self.glyph_loss(batch, states[-1], streams, figures)]

    def ideal_streams(self, batch: Batch) -> list[torch.Tensor]:
        """The streams of an eye that misses little: now and then a token tells another one's marks."""
        import torch

        from scripts.nano.model import ideal_streams

        assert batch.marks is not None
        marks = batch.marks.clone()
        flat = marks[..., :-N_WHERE].flatten(0, 1)
        wrong = torch.rand(flat.shape[0]) < MISSED
        flat[wrong] = flat[torch.randint(len(flat), (int(wrong.sum()),))]
        marks[..., :-N_WHERE] = flat.view(marks[..., :-N_WHERE].shape)
        streams = [stream.nan_to_num() for stream in ideal_streams(marks, self.spec)]
        return [(stream + torch.randn_like(stream) * BLUR).bfloat16() for stream in streams]

    def lesson_loss(self, batch: Batch, taught: Tensors, figures: dict[str, float]) -> torch.Tensor:
        """How far the heads are from what they are taught."""
        import torch

        from scripts.nano.reading import MOST_LINES

        total = torch.zeros(())
        if "history" in taught:
            total = total + taught["history"].mean() * LESSON_WEIGHTS["history"]
            figures["history"] = taught["history"].mean().item()
        for name in ("places", "lines", "far_lines", "find", "carry"):
            if name in taught:
                lesson = batch.lessons[name]
                certain = torch.zeros(len(lesson.queries)).index_add(
                    0, lesson.pairs[:, 0], lesson.shares * lesson.shares.log()
                )
                excess = taught[name] + certain
                total = total + excess.mean() * LESSON_WEIGHTS[name]
                figures[f"{name} excess"] = excess.mean().item()
                if name == "find":
                    figures["find right"] = (excess < 0.7).float().mean().item()
        if "looks" in taught:
            surprise = taught["looks"]
            _, _, token, slot, other_token, other_slot = batch.looks.unbind(1)
            wanted = surprise.gather(1, slot[:, None])[:, 0]
            other = torch.where(other_slot != slot, surprise.gather(1, other_slot[:, None])[:, 0], 0.0)
            idle = (surprise.sum() - wanted.sum() - other.sum()) / len(surprise)
            either = (-torch.logaddexp(-wanted, -taught["others"])).clamp(min=0)
            wanted = torch.where((other_token != token) | (other_slot != slot), either, wanted)
            if "nowhere" in taught:
                idle = idle + taught["nowhere"].sum(1).mean()
            total = total + (wanted.mean() + IDLE_WEIGHT * idle) * LESSON_WEIGHTS["looks"]
            figures["looks right"] = (wanted < 0.7).float().mean().item()
            figures["looks surprise"] = wanted.mean().item()
            figures["idle"] = idle.item()
        for name in ("shown", "sought"):
            if name in taught:
                out = (taught[name] @ self.heads[HEADS + "address"].bfloat16().t()).float()
                lines, places = out[:, :MOST_LINES], out[:, MOST_LINES:]
                _, _, line, place = getattr(batch, name).unbind(1)
                deep = torch.nn.functional.cross_entropy(lines, line, reduction="none") * (1 + line * DEEPER_WEIGHT)
                loss = deep.mean() + torch.nn.functional.cross_entropy(places, place)
                total = total + loss * LESSON_WEIGHTS[name]
                figures[f"{name} line"] = (lines.argmax(1) == line).float().mean().item()
                figures[f"{name} place"] = (places.argmax(1) == place).float().mean().item()
        return total

    def glyph_loss(
        self, batch: Batch, state: torch.Tensor, streams: list[torch.Tensor], figures: dict[str, float]
    ) -> torch.Tensor:
        """How well the tower's last state tells what a patch holds, and each stream what it should of a token."""
        import torch

        from scripts.nano.model import ideal_streams
        from scripts.nano.reading import N_SLOTS
        from scripts.nano.samples import OPEN, PATCH_CLASSES, PLACE_CLASSES, SLOT_CLASSES

        assert batch.patches is not None and batch.marks is not None
        marks = torch.split(batch.marks.flatten(0, 1).long(), [*[len(SLOT_CLASSES)] * N_SLOTS, len(PLACE_CLASSES)], 1)
        heads = _half(self.heads)
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
        wanted = ideal_streams(batch.marks, self.spec)
        for stream, ideal in zip(streams[1:], wanted[1:], strict=True):  # the deepest may tell what it likes
            apart = (stream.float() - torch.where(ideal.isnan(), stream.detach().float(), ideal)).square().mean()
            total = total + apart * IDEAL_WEIGHT
            figures["apart"] = figures.get("apart", 0.0) + apart.item() / (len(wanted) - 1)
        figures["seen"] = total.item()
        return total

    # --- the loop ---

    def train(self) -> None:
        """Runs until the schedule's minutes are over."""
        from scripts.nano.samples import batches, collate
        from scripts.nano.truth import HELD_OUT_SEEDS

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
        """The largest of all processes' clocks: what follows from the time must be the same in all of them."""
        if self.options.processes == 1:
            return minutes
        import torch

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
        """Warm-up over 40 steps, then a cosine to 3%, by the clock."""
        done = min(1.0, self.minutes / self.options.minutes)
        factor = min(1.0, (self.step + 1) / 40) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        return factor

    def share_gradients(self) -> None:
        import torch

        for value in self.trained.values():
            if value.grad is None:  # a batch of text has none for the eye, and every process must send the same
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
                    value.grad = None  # or the optimizers would go on with what they remember
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm} at step {self.step}; start again from the last save"
            )

    def evaluate(self) -> None:
        """Figures on held-out documents (or held-out text), with teacher forcing."""
        import torch

        from scripts.nano.samples import batches, collate
        from scripts.nano.truth import HELD_OUT_SEEDS

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
        import torch

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


def has_gap(document: Document) -> bool:
    """Whether it is a table whose first cell is empty, or the last one of a row."""
    from scripts.nano.truth import Table

    table = document.truth
    return isinstance(table, Table) and any(
        not cell.text and (cell.row == cell.col == 0 or cell.col + cell.colspan == table.n_cols) for cell in table.cells
    )


BLOCK = 32  # weights that share a scale in ggml's types of 4 bits
BLOCKS = 8  # that share what their scales are counted in, in Q4_K


def rounded(weights: Tensors, rounding: Rounding | None) -> Tensors:
    """The weights with their matrices rounded; the gradient is taken as if they were not."""
    if rounding is None:
        return weights
    return {
        name: value + (rounding(value.detach()) - value.detach())
        if value.dim() == 2 and value.shape[1] % BLOCK == 0 and "embed" not in name
        else value
        for name, value in weights.items()
    }


def round_to_q4_0(matrix: torch.Tensor) -> torch.Tensor:
    """What ggml's Q4_0 keeps of a matrix: in each block 16 steps, of which the lowest is the weight that is largest."""
    import torch

    blocks = matrix.unflatten(1, (-1, BLOCK))
    step = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    whole = (blocks / torch.where(step == 0, 1.0, step) + 8.5).floor().clamp(0, 15) - 8
    return (whole * step.half().float()).flatten(1)


def round_to_q4_k(matrix: torch.Tensor) -> torch.Tensor:
    """About what ggml's Q4_K keeps: in each block 16 steps from its lowest weight (or 0) to its highest.

    Steps and lowest weights are whole parts, 6 bits, of the largest ones in eight blocks. ggml also searches for the
    steps that lose least.
    """
    import torch

    blocks = matrix.unflatten(1, (-1, BLOCKS, BLOCK))
    lowest = blocks.amin(-1, keepdim=True).clamp(max=0)
    step = (blocks.amax(-1, keepdim=True) - lowest) / 15

    def in_parts(values: torch.Tensor) -> torch.Tensor:
        part = (values.abs().amax(-2, keepdim=True) / 63).clamp(min=1e-9)
        return (values / part).round() * part

    step, lowest = in_parts(step), in_parts(lowest)
    whole = ((blocks - lowest) / torch.where(step == 0, 1.0, step)).round().clamp(0, 15)
    return (whole * step + lowest).flatten(1)


def _half(weights: Tensors) -> Tensors:
    """The weights as the kernels take them: bfloat16, with the norms' own kept in float32."""
    return {
        name: value if "norm" in name.lower() and "newline" not in name else value.bfloat16()
        for name, value in weights.items()
    }


def _optimizers(trained: Tensors, rate: float, adapter_rate: float) -> list[Any]:
    """Muon for matrices, AdamW for everything else.

    With AdamW the adapter's product comes to use a quarter of its rank. `adapter_rate` is its share of `rate`.
    """
    import torch

    def is_matrix(name: str, value: torch.Tensor) -> bool:
        return value.dim() == 2 and "embed" not in name and not name.startswith(HEADS)

    others = {name: value for name, value in trained.items() if not is_matrix(name, value)}
    adam = [
        {"params": [value for name, value in others.items() if name.startswith(HEADS) == is_head], "lr": rate * share}
        for is_head, share in ((False, 0.1), (True, 1.0))
    ]
    adam = [group for group in adam if group["params"]]
    out: list[Any] = [torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    matrices = {name: value for name, value in trained.items() if is_matrix(name, value)}
    groups = [
        {"params": [value for name, value in matrices.items() if ("lora" in name) == is_lora], "lr": rate * share}
        for is_lora, share in ((False, 1.0), (True, adapter_rate))
    ]
    out.append(torch.optim.Muon([group for group in groups if group["params"]], weight_decay=0.01, momentum=0.95))
    for group in (group for optimizer in out for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return out


if __name__ == "__main__":
    main()
