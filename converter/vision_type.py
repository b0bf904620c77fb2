"""Chooses the weight type that makes a vision file the fastest on this machine, for `--vision-type auto`.

The candidates cost little accuracy: F16, which costs none, BF16, Q8_0 and Q6_K (see docs/benchmarks.md for the cost of
each). The choice is the type with the fastest matrix product of a vision tower's size, or a more exact type that takes
little longer. Measurements are kept in the user's cache, as for the runtime's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from granite4v.ggml import autotune
from granite4v.ggml.backend import Backend
from granite4v.ggml.kernel_timing import MANY
from granite4v.ggml.kernels import N_IN, N_OUT

AUTO = "auto"
CANDIDATES = ("F16", "BF16", "Q8_0", "Q6_K")  # the most exact first
EQUAL = 1.1  # a more exact type is preferred if it takes at most this many times as long as the fastest


@dataclass(frozen=True)
class FastestType:
    """The chosen type, and the measurements of all candidates: GFLOP/s with the fastest kernel, and its name."""

    type_name: str
    rates: dict[str, tuple[float, str]]

    def __str__(self) -> str:
        """The type and the measurements, for a message."""
        listed = ", ".join(f"{kind} {rate:,.0f} ({kernel})" for kind, (rate, kernel) in self.rates.items())
        return f"vision type {self.type_name}: GFLOP/s of this CPU are {listed}"


def fastest_vision_type(n_threads: int | None = None, announce: Callable[[], None] | None = None) -> FastestType:
    """Chooses the type. The first call on a machine measures for a few seconds; `announce` is called if that takes
    longer than one second.

    Raises DeviceError for a number of threads that ggml does not accept.
    """
    backend = Backend("cpu", n_threads)
    try:
        seconds = autotune.vision_seconds(backend, CANDIDATES, announce)
    finally:
        backend.close()
    best = min(taken for taken, _ in seconds.values())
    chosen = next(kind for kind in CANDIDATES if seconds[kind][0] <= best * EQUAL)
    gflop = 2 * N_IN * N_OUT * MANY / 1e9  # products with the zeros that pad rows do not count
    return FastestType(chosen, {kind: (gflop / taken, kernel) for kind, (taken, kernel) in seconds.items()})
