"""Decides whether a checkpoint's output head is its token embedding: config.json's flag, corrected by the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from granite4v.converter.checkpoint import Checkpoint
from granite4v.converter.safetensors_file import ELEMENT_BYTES, SourceTensor, read_rows
from granite4v.converter.tensors.decoder import EMBEDDING, HEAD, HEAD_PREFIXES, PREFIXES

COMPARED_BYTES = 1 << 22  # bytes of each matrix that are compared at once


def decide_head(checkpoint: Checkpoint, declared: bool) -> tuple[Checkpoint, bool, list[str]]:
    """Returns the checkpoint, whether its head is tied to the embedding, and warnings. `declared`: config.json ties it.

    As in transformers 5.24 (`modeling_utils.tie_weights`), if config.json ties the two matrices, either may be missing,
    and if both exist and differ, both are kept. If config.json does not tie them and the head is missing, it is tied,
    as in other engines; transformers would fill it with random numbers. Reads both matrices if they exist and are
    declared tied.
    """
    embedding = _first(checkpoint.tensors, PREFIXES, EMBEDDING)
    head = _first(checkpoint.tensors, HEAD_PREFIXES, HEAD)
    if head is None:
        if declared or embedding is None or checkpoint.incomplete:
            return checkpoint, declared or not checkpoint.incomplete, []
        warning = "config.json does not tie the output head to the token embedding, but the checkpoint has none; tied"
        return checkpoint, True, [warning]
    if not declared:
        return checkpoint, False, []
    if embedding is None and not checkpoint.incomplete:
        tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != head.name}
        tensors[PREFIXES[0] + EMBEDDING] = head
        return replace(checkpoint, tensors=tensors), True, []
    if embedding is None or checkpoint.problems or _equal(embedding, head):
        return checkpoint, True, []
    return (
        checkpoint,
        False,
        [
            f"config.json ties the output head to the token embedding, but '{head.name}' differs from "
            f"'{embedding.name}'; both are kept"
        ],
    )


def _first(tensors: Mapping[str, SourceTensor], prefixes: tuple[str, ...], name: str) -> SourceTensor | None:
    return next((tensors[prefix + name] for prefix in prefixes if prefix + name in tensors), None)


def _equal(one: SourceTensor, other: SourceTensor) -> bool:
    """Whether two matrices hold equal numbers, even in different types. Reads some rows at a time."""
    if one.dtype not in ELEMENT_BYTES or other.dtype not in ELEMENT_BYTES:
        return True  # their types are refused later
    if one.shape != other.shape:
        return False
    step = max(1, COMPARED_BYTES // max(1, 4 * one.n_cols))
    for first in range(0, one.n_rows, step):
        last = min(first + step, one.n_rows)
        rows, others = (read_rows(tensor, first, last) for tensor in (one, other))
        if rows.dtype != others.dtype:
            rows, others = rows.astype(np.float32), others.astype(np.float32)
        if not np.array_equal(rows, others):
            return False
    return True
