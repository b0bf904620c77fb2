"""Conventions for single values that the families share. Independent of any model."""

from __future__ import annotations

import ctypes

from granite4v.errors import CheckpointError


def single(value: float) -> float:
    """The nearest float32. Of a sum, difference, product or quotient of two float32: the one that float32 gives."""
    return ctypes.c_float(value).value


def short(value: float) -> float:
    """The shortest decimal that float32 stores as this value, below 1e38: 1e-06 instead of 9.999999974752427e-07.

    GGUF keeps numbers in float32; Hugging Face's JSON has the decimal. Nine digits tell any two float32 apart.
    """
    exact = single(value)
    decimals = (float(f"{exact:.{n_digits}g}") for n_digits in range(1, 10))
    return next(decimal for decimal in decimals if single(decimal) == exact)


def hidden_state_index(index: int, n_layers: int) -> int:
    """A hidden state of a tower with so many layers, negative indices resolved; raises CheckpointError outside it."""
    resolved = index + n_layers + 1 if index < 0 else index
    if not 0 <= resolved <= n_layers:
        raise CheckpointError(f"config.json takes vision hidden state {index}; the tower has {n_layers + 1} of them.")
    return resolved
