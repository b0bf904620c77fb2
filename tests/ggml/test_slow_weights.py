"""Which weights count as slow on a CPU, the warning about them, and that it is given once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from granite4v.errors import SpeedWarning
from granite4v.ggml import slow_weights
from granite4v.ggml.autotune import SMALL, gflop
from granite4v.ggml.backend import Backend
from granite4v.ggml.kernel_timing import MANY
from granite4v.ggml.kernels import COMPILED, FLOAT32, PLAIN, Kernel
from granite4v.ggml.slow_weights import Slow, judge, message, warn_if_slow


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend("cpu", 1)
    yield backend
    backend.close()


def times(**rates: Mapping[str, float]) -> dict[str, dict[str, dict[int, float]]]:
    """Converts GFLOP/s by type and kernel to times; 0: it crashed."""
    return {
        kind: {name: {MANY: gflop(kind) / rate if rate else math.inf} for name, rate in by_kernel.items()}
        for kind, by_kernel in rates.items()
    }


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        # AMX works: 486 for Q8_0, 170 for F16
        ({"F16": {PLAIN: 110, FLOAT32: 170}, "Q8_0": {PLAIN: 100, "AMX": 486}, "Q6_K": {PLAIN: 326}}, ("Q8_0", None)),
        # AMX crashes; with it Q8_0 would be four times as fast as plain
        ({"F16": {PLAIN: 110, FLOAT32: 170}, "Q8_0": {PLAIN: 100, "AMX": 0}, "Q6_K": {PLAIN: 326}}, ("Q8_0", "AMX")),
        # the same build, with a file that does not need AMX
        ({"Q6_K": {PLAIN: 326}, "Q8_0": {PLAIN: 100, "AMX": 0}}, None),
        # AVX-512 without AMX: just above half
        ({"F16": {PLAIN: 385}, "Q8_0": {PLAIN: 280}, "Q6_K": {PLAIN: 750}}, None),
        ({"F16": {PLAIN: 365}, "Q8_0": {PLAIN: 280}, "Q6_K": {PLAIN: 750}}, ("Q6_K", None)),
        ({"Q8_0": {PLAIN: 280}, "Q6_K": {PLAIN: 750}}, ("Q6_K", None)),
        ({"F16": {PLAIN: 300}, "Q8_0": {}, "Q6_K": {}}, None),  # nothing to compare it with
        ({"F16": {}, "Q8_0": {PLAIN: 100}}, None),
        ({"F16": {PLAIN: 0, FLOAT32: 0}, "Q8_0": {PLAIN: 100}}, None),
    ],
)
def test_slow_is_less_than_half(rates: dict[str, dict[str, float]], expected: tuple[str, str | None] | None) -> None:
    found = judge(next(iter(rates)), times(**rates))
    assert (found and (found.type_name, found.crashed)) == expected


def test_the_share_by_hand() -> None:
    found = judge("F16", times(F16={PLAIN: 100.0}, Q8_0={PLAIN: 50.0, "AMX": 400.0}))
    assert found == (pytest.approx(0.25), "Q8_0", None)


def test_messages_name_file_reason_and_remedy() -> None:
    path = Path("/models/page/mmproj-F16.gguf")
    assert message(path, "vision", "F16", Slow(0.352, "Q8_0")) == (
        "'mmproj-F16.gguf' has weights in F16, which this CPU multiplies at 35% of the speed of Q8_0; "
        "'granite4v requantize /models/page --vision-type auto' makes a faster file."
    )
    text = message(Path("text-F16.gguf"), "text", "F16", Slow(0.352, "Q8_0"))
    assert text.endswith("of Q8_0; convert the model again with '--text-type Q8_0', or another quantized type.")
    assert message(path, "vision", "F16", Slow(0.352, "Q8_0", "AMX")) == (
        "'mmproj-F16.gguf' runs at less than half of what this CPU can do: the 'AMX' kernels of the installed "
        "llama-cpp-python end the process, so they are not used; 'granite4v doctor' tells how to mend that."
    )


def test_a_file_is_warned_about_once(backend: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = times(F16={PLAIN: 100.0}, Q8_0={PLAIN: 50.0, "AMX": 400.0}, Q6_K={PLAIN: 80.0})
    monkeypatch.setattr(slow_weights, "times", lambda *_: measured)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            warn_if_slow(tmp_path / "mmproj-F16.gguf", "vision", {"F16": SMALL, "F32": 10}, backend)
        warn_if_slow(tmp_path / "small.gguf", "vision", {"F16": SMALL - 1}, backend)
        warn_if_slow(tmp_path / "text-F16.gguf", "text", {"F16": SMALL}, backend)
    assert [each.category for each in said] == [SpeedWarning, SpeedWarning]
    assert ["mmproj-F16.gguf" in str(said[0].message), "text-F16.gguf" in str(said[1].message)] == [True, True]


def test_what_is_compared(backend: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """llama.cpp has no kernels with widened weights; and the types to compare with are those that lose hardly
    anything."""
    asked: list[Any] = []
    monkeypatch.setattr(slow_weights, "times", lambda backend, wanted, budget: asked.append(wanted) or times(F16={}))
    warn_if_slow(tmp_path / "x.gguf", "text", {"F16": SMALL, "Q4_K": 5}, backend)
    warn_if_slow(tmp_path / "x.gguf", "vision", {"F16": SMALL}, backend)
    assert {trial.type_name for trial in asked[0]} == {"F16", "Q8_0", "Q6_K"}
    assert ("F16", FLOAT32, MANY) in asked[1] and FLOAT32 not in {trial.kernel for trial in asked[0]}


def test_compiled_kernels_are_what_is_compared_where_they_are(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ggml's speed with a type does not matter for a text model whose products ggml does not compute."""
    asked: list[Any] = []
    monkeypatch.setattr(slow_weights, "times", lambda backend, wanted, budget: asked.append(wanted) or times(Q8_0={}))
    monkeypatch.setattr(slow_weights, "compiled_kernels", lambda kind, n_rows: {COMPILED: Kernel(COMPILED)})
    for side in ("text", "vision"):
        warn_if_slow(tmp_path / "x.gguf", side, {"Q8_0": SMALL}, backend)
    text, vision = ({trial.kernel for trial in each if trial.type_name == "Q8_0"} for each in asked)
    assert COMPILED in text and PLAIN not in text
    assert PLAIN in vision and COMPILED not in vision
