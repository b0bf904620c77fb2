"""Warns about weights that this CPU multiplies at less than half the speed of another type or kernel.

The comparison is with types of about eight bits, which lose hardly any accuracy. A type of four bits may be faster
still, but that trade-off is left to the user. Only files large enough to be measured are judged, and only by times that
are cached or can be measured within a second.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from granite4v.errors import SpeedWarning
from granite4v.ggml.autotune import EXACT_TYPES, INT8_TYPES, SMALL, Times, gflop, may_widen, times
from granite4v.ggml.backend import Backend
from granite4v.ggml.kernel_timing import MANY, Trial
from granite4v.ggml.kernels import FLOAT32, ONEDNN_BF16, PLAIN, available_kernels, compiled_kernels, prompt_kernels

SLOW = 0.5
BUDGET_S = 1.0
# Assumed minimum speed of a kernel that crashes the process, as a multiple of the plain kernel's. With Q8_0 and AMX it
# was 4 to 5 times on a CPU whose build had been fixed.
CRASHED_GAIN = 4.0
Side = Literal["vision", "text"]


class Slow(NamedTuple):
    """How slow the weights are: their share of the speed of `type_name`, or of its kernel `crashed`, if that is set."""

    share: float
    type_name: str
    crashed: str | None = None


def warn_if_slow(path: Path, side: Side, n_weights: Mapping[str, int], backend: Backend) -> None:
    """Issues a SpeedWarning if the main weight type of a file is slow, once per process and file. Raises Aborted."""
    if not backend.is_cpu or sum(n_weights.values()) < SMALL:
        return
    main = max(n_weights, key=n_weights.__getitem__)
    kernels = {
        kind: [
            kernel.name
            for kernel in available_kernels(backend, kind).values()
            if (side == "vision" and kind == main) or (kernel.arithmetic is None and kernel.widened is None)
        ]
        for kind in (main, *INT8_TYPES)
    }
    if side == "text":
        for kind, names in kernels.items():
            compiled = compiled_kernels(kind, MANY)
            names[:] = [*(name for name in names if name != PLAIN or not compiled), *compiled]
            names += prompt_kernels(kind) if may_widen(n_weights) else ()
    for kind in EXACT_TYPES & kernels.keys():
        kernels[kind] = [name for name in kernels[kind] if name != ONEDNN_BF16]
    wanted = [Trial(kind, name, MANY) for kind, names in kernels.items() for name in names]
    found = judge(main, times(backend, wanted, BUDGET_S))
    if found is not None:
        _warn(message(path, side, main, found))


def judge(main: str, measured: Mapping[str, Times]) -> Slow | None:
    """Judges by the times of several types whether weights of type `main` are slow; None if not, or if unknown."""
    own = _best_rate(main, measured[main])
    if own == 0:  # nothing is known
        return None
    for kind, by_kernel in measured.items():
        for name, rows in by_kernel.items():
            plain = by_kernel.get(PLAIN, {}).get(MANY, math.inf)
            if name not in (PLAIN, FLOAT32) and math.isinf(rows[MANY]) and not math.isinf(plain):
                share = own / (CRASHED_GAIN * gflop(kind) / plain)
                if share < SLOW:
                    return Slow(share, kind, name)
    best = max(measured, key=lambda kind: _best_rate(kind, measured[kind]))
    share = own / _best_rate(best, measured[best])
    return Slow(share, best) if share < SLOW else None


def _best_rate(type_name: str, measured: Times) -> float:
    """GFLOP/s of the fastest kernel measured for a type; 0 if none was, or all crashed."""
    return max((gflop(type_name) / rows[MANY] for rows in measured.values()), default=0.0)


def message(path: Path, side: Side, main: str, slow: Slow) -> str:
    """Words the warning, with the remedy."""
    if slow.crashed is not None:
        return (
            f"'{path.name}' runs at less than half of what this CPU can do: the '{slow.crashed}' kernels of the "
            "installed llama-cpp-python end the process, so they are not used; 'granite4v doctor' tells how to mend "
            "that."
        )
    remedy = (
        f"'granite4v requantize {path.parent} --vision-type auto' makes a faster file"
        if side == "vision"
        else f"convert the model again with '--text-type {slow.type_name}', or another quantized type"
    )
    return (
        f"'{path.name}' has weights in {main}, which this CPU multiplies at {slow.share:.0%} of the speed of "
        f"{slow.type_name}; {remedy}."
    )


@functools.cache
def _warn(text: str) -> None:
    """Warns once per process and text: the same model may be opened repeatedly."""
    warnings.warn(text, SpeedWarning, stacklevel=4)
