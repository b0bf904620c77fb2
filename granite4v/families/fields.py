"""Converts single values by conventions that the families share. Independent of any model."""

from __future__ import annotations

import ctypes

from granite4v.errors import CheckpointError


def single(value: float) -> float:
    """Rounds to the nearest float32. For a sum, difference, product or quotient of two float32 values, this is the
    result of float32 arithmetic."""
    return ctypes.c_float(value).value


def short(value: float) -> float:
    """Returns the shortest decimal that float32 stores as this value: 1e-06 instead of 9.999999974752427e-07. For
    values below 1e38.

    GGUF stores numbers as float32; Hugging Face's JSON has the decimal. Nine digits distinguish any two float32 values.
    """
    exact = single(value)
    decimals = (float(f"{exact:.{n_digits}g}") for n_digits in range(1, 10))
    return next(decimal for decimal in decimals if single(decimal) == exact)


def hidden_state_index(index: int, n_layers: int) -> int:
    """Resolves a negative hidden state index of a tower with `n_layers` layers. Raises CheckpointError if the index is
    out of range."""
    resolved = index + n_layers + 1 if index < 0 else index
    if not 0 <= resolved <= n_layers:
        raise CheckpointError(f"config.json takes vision hidden state {index}; the tower has {n_layers + 1} of them.")
    return resolved
