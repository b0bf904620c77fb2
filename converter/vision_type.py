"""Which weight type makes a vision file the fastest on this machine, for `--vision-type auto`.

Of the types that cost little accuracy: F16, which costs none, BF16, Q8_0 and Q6_K (docs/benchmarks.md has what each
costs).
The one whose product of a vision tower's size takes the least time is taken, or a more exact one that takes little
longer. What is measured is kept in the user's cache, as for the runtime's kernels.
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
EQUAL = 1.1  # a more exact type may take so many times as long as the fastest


@dataclass(frozen=True)
class FastestType:
    """The type that was chosen, and what it was chosen from: GFLOP/s of each candidate with its fastest kernel."""

    type_name: str
    rates: dict[str, tuple[float, str]]

    def __str__(self) -> str:
        """Which type and why, for a message."""
        listed = ", ".join(f"{kind} {rate:,.0f} ({kernel})" for kind, (rate, kernel) in self.rates.items())
        return f"vision type {self.type_name}: GFLOP/s of this CPU are {listed}"


def fastest_vision_type(n_threads: int | None = None, announce: Callable[[], None] | None = None) -> FastestType:
    """Measures on the first call on a machine, a few seconds; `announce` is called if it takes longer than one.

    Raises DeviceError for a number of threads that ggml does not take.
    """
    backend = Backend("cpu", n_threads)
    try:
        seconds = autotune.vision_seconds(backend, CANDIDATES, announce)
    finally:
        backend.close()
    best = min(taken for taken, _ in seconds.values())
    chosen = next(kind for kind in CANDIDATES if seconds[kind][0] <= best * EQUAL)
    gflop = 2 * N_IN * N_OUT * MANY / 1e9  # zeros that fill rows up are no work
    return FastestType(chosen, {kind: (gflop / taken, kernel) for kind, (taken, kernel) in seconds.items()})
