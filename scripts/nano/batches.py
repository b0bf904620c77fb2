"""Collates samples of similar length into one batch of tensors, padded on the right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scripts.nano.reading import Lesson
from scripts.nano.samples import LETTERS, Prompter, Sample
from scripts.nano.spec import tokens_side
from tests.toy.spec import CheckpointSpec

IGNORE = -100
LESSONS = {"places": "places", "lines": "lines", "far_lines": "lines", "find": "find", "carry": "carry"}
# The weight of position 0, in texts, for heads that count texts. Its share of the attention encodes their number: with
# weight w and n texts it is w / (w + n), which shows relative changes of n best where n is about w.
SINK_WEIGHT = {"places": 2.0, "lines": 2.5, "far_lines": 10.0}


@dataclass(frozen=True)
class Taught:
    """A lesson of a batch. `queries` (m, 2): (row, position). `pairs` (p, 2): (index of a query, attended position)."""

    queries: torch.Tensor
    pairs: torch.Tensor
    shares: torch.Tensor  # (p,): wanted attention; sums to one over a query's pairs


@dataclass(frozen=True)
class Batch:
    """Several samples as tensors. `labels` (n, positions): the token that follows each position, or IGNORE."""

    tokens: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor | None
    rows: torch.Tensor | None
    positions: torch.Tensor | None
    patches: torch.Tensor | None
    marks: torch.Tensor | None
    lessons: dict[str, Taught]
    looks: torch.Tensor  # (n, 6): row, position, image token's position, slot, other token's position, other slot
    shown: torch.Tensor  # (n, 4): row, position, line, place
    sought: torch.Tensor  # (n, 4)
    kinds: list[str]


def collate(samples: list[Sample], prompter: Prompter, spec: CheckpointSpec) -> Batch:
    """Collates samples, padded on the right to the longest. Letter samples only add their tiles, after all others."""
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


def batches(draw: Callable[[], Sample], budget: int, pool: int, rng: random.Random) -> Iterator[list[Sample]]:
    """Yields endless lists of samples of similar length whose padded positions stay within `budget`.

    `draw()` returns a sample; `pool` of them are drawn and sorted by length at a time.
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
