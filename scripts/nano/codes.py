"""Ideal streams: a vector for every class of every mark, and the streams that encode exactly a token's marks."""

from __future__ import annotations

import functools
import math

import torch

from scripts.nano.marks import OPEN, PLACE_CLASSES, SLOT_CLASSES
from scripts.nano.reading import N_SLOTS
from tests.toy.spec import CheckpointSpec

# Dimensions of a mark's subspace, by its number of classes.
CODE_DIMS = {2: 1, 3: 2, 4: 3, 5: 4, 9: 8, 96: 24}


@functools.cache
def codes(spec: CheckpointSpec) -> list[list[torch.Tensor]]:
    """Returns the vector of every class of every mark, for every stream but the deepest.

    Streams are in the order of `projectors(spec)`. Class 0, nothing, is the zero vector. An ideal stream is the sum of
    its marks' vectors.
    """
    generator = torch.Generator().manual_seed(1)
    *shared, cell = SLOT_CLASSES

    def vectors(n_classes: int, n_marks: int) -> torch.Tensor:
        n = CODE_DIMS[n_classes]
        plane = torch.linalg.qr(torch.randn(spec.text_hidden, n, generator=generator)).Q
        points = torch.randn(n_classes, n, generator=generator)
        if n == n_classes - 1:
            points[1:] = torch.eye(n)  # as far apart as possible
        points = points @ plane.t()
        points = points / points.norm(dim=1, keepdim=True) * math.sqrt(spec.text_hidden / n_marks)
        return points.index_fill(0, torch.tensor([0]), 0.0)

    n_slots = len(spec.spatial_target_layers)
    place = [vectors(n, len(PLACE_CLASSES)) for n in PLACE_CLASSES]
    slots = [[vectors(n, len(shared)) for n in shared] for _ in range(n_slots)]
    # drawn last, so that adding this mark left the vectors that checkpoints have learned unchanged
    return [place, *([*slot, vectors(cell, len(shared))] for slot in slots)]


def ideal_streams(marks: torch.Tensor, spec: CheckpointSpec) -> list[torch.Tensor]:
    """Returns the streams of `projectors(spec)`, each (..., text_hidden), that encode exactly `marks`.

    The deepest stream is zero. Values are NaN where marks are OPEN.
    """
    split = torch.split(marks.long(), [*[len(SLOT_CLASSES)] * N_SLOTS, len(PLACE_CLASSES)], dim=-1)
    known = []
    for tables, part in zip(codes(spec), [split[-1], *split[:-1]], strict=True):
        is_open = part[..., :1] == OPEN
        told = part.masked_fill(is_open, 0).unbind(-1)
        stream = torch.stack([table[mark] for table, mark in zip(tables, told, strict=True)]).sum(0)
        known.append(stream.masked_fill(is_open, torch.nan))
    return [torch.zeros_like(known[0]), *known]
