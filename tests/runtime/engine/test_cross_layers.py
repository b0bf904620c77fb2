"""Tests of cross-attention layers: which copies of their weights are made, and that these change values only by
rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from granite4v.errors import ModelFileError
from granite4v.families.registry import read_vision
from granite4v.ggml import autotune
from granite4v.ggml.backend import Backend, buffer_type_name
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.kernels import PLAIN, Kernel
from granite4v.runtime.engine import cross_layers
from granite4v.runtime.engine.cross_layers import CrossLayers, choose_copies
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import PRESETS

SPEC = PRESETS["tiny-mllama-wide"]
REPACK = "CPU_REPACK"
RNG = np.random.default_rng(0)
STATES = RNG.standard_normal((70, SPEC.text_hidden), np.float32)
ROWS = {n: RNG.standard_normal((n, SPEC.text_hidden), np.float32) for n in (1, 3, 70)}


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    opened = Backend("cpu", 2)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def repack(backend: Backend) -> Kernel:
    for buffer_type in backend.extra_buffer_types():
        if buffer_type_name(buffer_type) == REPACK and backend.multiplies(buffer_type, "Q4_0", 256, 512):
            return Kernel(REPACK, buffer_type=buffer_type)
    pytest.skip("this ggml repacks no Q4_0")


def computed(path: Path, backend: Backend, *, exact: bool = False) -> list[np.ndarray]:
    with GgufFile.open(path) as file:
        config = read_vision(file)[1].cross_attention
        assert config is not None
        layers = CrossLayers(file, config, backend, exact=exact)
    try:
        layers.look_at(STATES)
        return [layers.run((i,), rows, 2) for i in config.layers for rows in ROWS.values()]
    finally:
        layers.close()


@pytest.fixture
def path(make_model: Callable[..., Path]) -> Path:
    return make_model(SPEC, "Q4_0", "Q8_0") / "mmproj-Q8_0.gguf"


def test_copies_change_no_value(path: Path, backend: Backend, repack: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies for both, for a few rows, for many rows, or unchanged ones, in large pages where there are any."""
    expected = computed(path, backend)
    monkeypatch.setattr(autotune, "SMALL", 0)
    plain = Kernel(PLAIN)
    for pair in ((repack, repack), (plain, repack), (repack, plain), None):
        chosen = {"Q4_0": pair} if pair else {}
        monkeypatch.setattr(autotune, "text_kernels", lambda *_, chosen=chosen, **__: chosen)
        for large in (True, False):
            monkeypatch.setattr(cross_layers, "has_large_pages", lambda large=large: large)
            for found, values in zip(computed(path, backend), expected, strict=True):
                assert relative_l2(found, values) < 0.01, pair  # activations are rounded, and sums have another order
                assert pair or np.array_equal(found, values)


def test_what_is_copied(path: Path, backend: Backend, repack: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    with GgufFile.open(path) as file:
        assert choose_copies(file, backend) == ({}, {})  # a small file stays mapped
        monkeypatch.setattr(autotune, "SMALL", 0)
        monkeypatch.setattr(cross_layers, "has_large_pages", lambda: True)
        monkeypatch.setattr(autotune, "text_kernels", lambda *_, **__: {"Q4_0": (Kernel(PLAIN), repack)})
        assert choose_copies(file, backend) == ({}, {"Q4_0": repack})
        monkeypatch.setattr(autotune, "text_kernels", lambda *_, **__: {})
        many, few = choose_copies(file, backend)
        assert many == few and many.keys() == {"Q4_0"} and many["Q4_0"].name == buffer_type_name(backend.buffer_type)
        monkeypatch.setattr(cross_layers, "available_bytes", lambda: cross_layers.SPARE_BYTES)
        assert choose_copies(file, backend) == ({}, {})  # no memory


def test_keys_and_values_of_quantized_layers_have_eight_bits(path: Path, backend: Backend) -> None:
    """Their error is far below that of the weights."""
    found, exact = computed(path, backend), computed(path, backend, exact=True)
    errors = [relative_l2(a, b) for a, b in zip(found, exact, strict=True)]
    assert 1e-4 < max(errors) < 0.02


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e36])
def test_keys_that_eight_bits_cannot_hold_are_refused(path: Path, backend: Backend, value: float) -> None:
    """One such value among finite ones: once quantized to integers, it could not be recognized."""
    states = STATES.copy()
    states[1, 3] = value
    with GgufFile.open(path) as file:
        config = read_vision(file)[1].cross_attention
        assert config is not None
        layers = CrossLayers(file, config, backend, exact=False)
    try:
        with pytest.raises(ModelFileError, match="not finite"):
            layers.look_at(states)
        layers.look_at(STATES)
        assert np.isfinite(layers.run(config.layers[:1], ROWS[1], 2)).all()
    finally:
        layers.close()


def test_what_is_copied_where_prompts_gain_by_another_form(
    path: Path, backend: Backend, repack: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps of a few rows then read a second, plain copy in large pages, if there is memory for both."""
    monkeypatch.setattr(autotune, "SMALL", 0)
    monkeypatch.setattr(cross_layers, "has_large_pages", lambda: True)
    monkeypatch.setattr(autotune, "text_kernels", lambda *_, **__: {"Q4_0": (repack, Kernel(PLAIN))})
    with GgufFile.open(path) as file:
        many, few = choose_copies(file, backend)
        assert many == {"Q4_0": repack} and few["Q4_0"].name == buffer_type_name(backend.buffer_type)
        n_bytes = sum(
            info.nbytes for name, info in file.tensors.items() if name.startswith("xattn.") and len(info.shape) > 1
        )
        for available, has_second in ((2 * n_bytes, True), (2 * n_bytes - 1, False)):
            monkeypatch.setattr(cross_layers, "available_bytes", lambda n=available: cross_layers.SPARE_BYTES + n)
            many, few = choose_copies(file, backend)
            assert many == {"Q4_0": repack} and ("Q4_0" in few) == has_second


def test_rows_that_come_again_and_others_between(path: Path, backend: Backend) -> None:
    """A few rows are computed by a graph that is kept; results that it returned before are not overwritten."""
    rows, others = ROWS[3], -2 * ROWS[3]
    with GgufFile.open(path) as file:
        config = read_vision(file)[1].cross_attention
        assert config is not None
        layers = CrossLayers(file, config, backend, exact=False)
    try:
        layers.look_at(STATES)
        i = config.layers[0]
        first, between, again = (layers.run((i,), x, 2) for x in (rows, others, rows))
        layers.look_at(STATES)  # makes new graphs
        anew = layers.run((i,), others, 2)
    finally:
        layers.close()
    assert np.array_equal(again, first) and np.array_equal(between, anew)
    assert first.shape == rows.shape and not np.array_equal(first, between)
