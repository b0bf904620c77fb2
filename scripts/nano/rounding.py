"""Rounds weights as 4-bit files do, so that training learns weights that lose little accuracy by it."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
Rounding = Callable[[torch.Tensor], torch.Tensor]

BLOCK = 32  # weights that share a scale in ggml's 4-bit types
BLOCKS = 8  # blocks of a Q4_K super-block, whose scales are multiples of one number


def rounded(weights: Tensors, rounding: Rounding | None) -> Tensors:
    """Returns the weights with their matrices rounded; the gradient ignores the rounding (straight-through)."""
    if rounding is None:
        return weights
    return {
        name: value + (rounding(value.detach()) - value.detach())
        if value.dim() == 2 and value.shape[1] % BLOCK == 0 and "embed" not in name
        else value
        for name, value in weights.items()
    }


def round_to_q4_0(matrix: torch.Tensor) -> torch.Tensor:
    """Rounds a matrix as ggml's Q4_0 does: to -8..7 steps in each block, -8 being the weight of largest magnitude."""
    blocks = matrix.unflatten(1, (-1, BLOCK))
    step = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    whole = (blocks / torch.where(step == 0, 1.0, step) + 8.5).floor().clamp(0, 15) - 8
    return (whole * step.half().float()).flatten(1)


def round_to_q4_k(matrix: torch.Tensor) -> torch.Tensor:
    """Rounds a matrix about as ggml's Q4_K does: to 16 values per block, from its lowest weight (or 0) to its highest.

    Steps and lowest weights are rounded to 6 bits: to multiples of 1/63 of the largest ones in eight blocks. ggml also
    searches for the steps that lose least.
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
