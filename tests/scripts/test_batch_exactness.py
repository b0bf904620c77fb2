"""What several sequences in one context do to values on the CPU: the facts that the engine relies on.

With a KV buffer per sequence and flash attention, the engine's setting, only the number of rows in a step changes a
sequence's bits. How they change depends on the CPU's kernels, so that is only bounded here; `docs/benchmarks.md` has
measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from granite4v.converter import Options, convert
from granite4v.runtime.llama.weight_copies import open_model
from scripts.batch_exactness import SPEC, Case, Setting, difference, differing, figures, kernels
from tests.toy.checkpoint import CheckpointSpec

TYPES = ("F32", "F16", "Q8_0", "Q4_K_M")
EQUAL = (  # settings that give the same bits on any CPU
    "alone in a context of 8",
    "alone in a context of 8: cache bytes",
    "alone, 3 others in the cache",
    "alone, 3 others in the cache: cache bytes",
    "first of 1 rows",
)
# For logits whose standard deviation is 6: activations are rounded to 8 bits, and another kernel sums in another order.
MOST = 1.5


@pytest.mark.parametrize("kind", TYPES)
def test_a_sequence_among_others(kind: str, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> None:
    convert(make_checkpoint(SPEC), tmp_path / "model", Options(kind, "F16"))
    path = tmp_path / "model" / f"text-{kind}.gguf"
    for kernel, placement in kernels(path):
        with open_model(path, placement) as model:
            found = figures(Case(model, Setting(kind, kernel, threads=1, flash=True, unified=False, length=40)))
        assert {name: found[name] for name in EQUAL} == dict.fromkeys(EQUAL, 0.0), kernel
        rows = {name: value for name, value in found.items() if "cache bytes" not in name}
        assert max(rows.values()) < MOST, (kernel, rows)


def test_differences_by_hand() -> None:
    assert difference(np.float32([[1, 2], [3, 4]]), np.float32([[1, 2.5], [3, 3]])) == 1.0
    assert differing(np.uint8([9, 1, 2, 3]), np.uint8([9, 1, 0, 0])) == 2
    assert differing(np.uint8([1, 2, 3]), np.uint8([7, 7, 1, 2, 3])) == 0  # more bytes before the same ones
