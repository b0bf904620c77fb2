"""Weights rounded as files of 4 bits round them, so that training learns to lose little by it."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
Rounding = Callable[[torch.Tensor], torch.Tensor]

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
    blocks = matrix.unflatten(1, (-1, BLOCK))
    step = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    whole = (blocks / torch.where(step == 0, 1.0, step) + 8.5).floor().clamp(0, 15) - 8
    return (whole * step.half().float()).flatten(1)


def round_to_q4_k(matrix: torch.Tensor) -> torch.Tensor:
    """About what ggml's Q4_K keeps: in each block 16 steps from its lowest weight (or 0) to its highest.

    Steps and lowest weights are whole parts, 6 bits, of the largest ones in eight blocks. ggml also searches for the
    steps that lose least.
    """
    blocks = matrix.unflatten(1, (-1, BLOCKS, BLOCK))
    lowest = blocks.amin(-1, keepdim=True).clamp(max=0)
    step = (blocks.amax(-1, keepdim=True) - lowest) / 15

    def in_parts(values: torch.Tensor) -> torch.Tensor:
        part = (values.abs().amax(-2, keepdim=True) / 63).clamp(min=1e-9)
        return (values / part).round() * part

    step, lowest = in_parts(step), in_parts(lowest)
    whole = ((blocks - lowest) / torch.where(step == 0, 1.0, step)).round().clamp(0, 15)
    return (whole * step + lowest).flatten(1)
