"""Single values of configurations, and what the page reader's process may import for them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from granite4v.families.fields import short, single


def test_the_shortest_decimal_is_numpys() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 31, 20_000, dtype=np.int64)
    values = bits.astype(np.uint32).view(np.float32)
    some = [0.0, 1e-6, 1e-5, 1e-12, 0.5, 1 / 255, 0.48145466, -0.26862954, 1.0, 1e6, 1e-45]
    for value in [*some, *values[values < 1e38].tolist()]:
        assert short(value) == float(str(np.float32(value))), value


def test_single_precision_is_numpys() -> None:
    rng = np.random.default_rng(1)
    x, y = np.float32(10.0) ** rng.uniform(-20, 20, (2, 1000)).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        assert [single(a / b) for a, b in zip(x.tolist(), y.tolist(), strict=True)] == (x / y).tolist()
    assert single(1e39) == float("inf") and single(1e-50) == 0


def test_the_tiling_of_pages_can_be_known_without_arrays_or_models() -> None:
    code = "import sys; import granite4v.families.base, granite4v.clip_projector.grid_anyres; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "granite4v.clip_projector.grid_anyres" in loaded
    assert not {"numpy", "PIL", "llama_cpp", "granite4v.ggml", "granite4v.runtime.model"} & set(loaded)
