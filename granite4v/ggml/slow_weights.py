"""A warning about weights that this CPU multiplies at less than half of the speed it has for others.

Compared with types of about eight bits, which lose hardly anything: that a type of four bits may be faster still is the
user's choice. Only files that are measured are judged, and only by what is known or measured within a second.
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
# A buffer type that ends the process would be at least as many times as fast as the plain kernel: with Q8_0 and AMX it
# was 4 to 5 times on a CPU whose build had been mended.
CRASHED_GAIN = 4.0
Side = Literal["vision", "text"]


class Slow(NamedTuple):
    """At what share of the speed of the other type, or of a kernel that crashes, weights are multiplied."""

    share: float
    type_name: str
    crashed: str | None = None


def warn_if_slow(path: Path, side: Side, n_weights: Mapping[str, int], backend: Backend) -> None:
    """Gives a SpeedWarning, once in a process for each file. Raises Aborted."""
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
    """Whether weights of the type `main` are slow, by the times of several types."""
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
    """GFLOP/s of the fastest kernel that is known; 0 without one."""
    return max((gflop(type_name) / rows[MANY] for rows in measured.values()), default=0.0)


def message(path: Path, side: Side, main: str, slow: Slow) -> str:
    """What to tell the user, with the remedy."""
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
    """Once in a process: the same model may be opened again and again."""
    warnings.warn(text, SpeedWarning, stacklevel=4)
