"""Choosing kernels: from measured times by the two sides' rules, and times that are kept and survive crashes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from granite4v.child import Ended
from granite4v.ggml import autotune, kernel_timing
from granite4v.ggml.autotune import WORTH, cache_key, fastest_kernel, seconds, worthwhile
from granite4v.ggml.backend import Backend
from granite4v.ggml.kernel_timing import FLOAT32, PLAIN
from granite4v.ggml.types import NO_WEIGHTS, TYPES, block_size

REPACK = "CPU_REPACK"


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend("cpu", 2)
    yield backend
    backend.close()


def test_the_image_side_prefers_the_exact_kernel_among_equals() -> None:
    assert fastest_kernel({PLAIN: 1.00, FLOAT32: 1.03}) == FLOAT32
    assert fastest_kernel({PLAIN: 1.5, FLOAT32: 1.2, REPACK: 1.0, "AMX": math.inf}) == REPACK
    assert fastest_kernel({PLAIN: 0.5, FLOAT32: 1.0}) == PLAIN
    assert fastest_kernel({"AMX": math.inf}) == PLAIN
    assert fastest_kernel({}) == PLAIN


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({PLAIN: 1.0, REPACK: 0.5}, REPACK),
        ({PLAIN: 1.0, REPACK: WORTH + 0.01}, PLAIN),  # not worth the memory
        ({PLAIN: 1.0, REPACK: 1.5}, PLAIN),
        ({PLAIN: 1.0, REPACK: math.inf}, PLAIN),  # it crashed
        ({PLAIN: 1.0, REPACK: 0.6, "AMX": 0.3}, "AMX"),
        ({PLAIN: 1.0, REPACK: 0.6, "AMX": math.inf}, REPACK),
        ({PLAIN: 1.0, FLOAT32: 0.2}, PLAIN),  # a kernel of the encoder's, not of llama.cpp's
        ({}, PLAIN),
    ],
)
def test_the_text_side_takes_a_buffer_type_if_it_is_worth_it(measured: dict[str, float], expected: str) -> None:
    assert worthwhile(measured, {REPACK, "AMX"}) == expected


def test_both_sides_choose_from_the_same_times(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = autotune.extra_buffer_types(backend)
    if REPACK not in extra:
        pytest.skip("this ggml has no repack buffer type")
    measured = {
        "Q4_0": {PLAIN: 1.0, FLOAT32: 1.0, REPACK: 0.5},
        "F16": {PLAIN: 1.0, FLOAT32: 0.5},
        "Q8_0": {PLAIN: 1.0, FLOAT32: 2.0, REPACK: 0.95},
    }
    monkeypatch.setattr(autotune, "seconds", lambda backend, kind: measured[kind])
    types = {*measured, "F32"}
    vision, text = autotune.vision_kernels(backend, types), autotune.text_kernels(backend, types)
    assert {kind: kernel.name for kind, kernel in vision.items()} == {"Q4_0": REPACK, "F16": FLOAT32, "Q8_0": REPACK}
    assert {kind: kernel.name for kind, kernel in text.items()} == {"Q4_0": REPACK}
    assert vision["F16"].as_float32 and vision["F16"].buffer_type is None
    assert text["Q4_0"].buffer_type.value == extra[REPACK].value


def test_a_kernel_that_ends_its_process_counts_as_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    for ended in (
        Ended(-6, "", "GGML_ASSERT(false) failed"),
        Ended(None, "1.0", ""),
        Ended(0, "", ""),
        Ended(0, "no time", ""),
        Ended(0, "-1", ""),
    ):
        monkeypatch.setattr(autotune, "run_main", lambda *arguments, ended=ended: ended)
        assert autotune.measure_in_child("Q4_0", "AMX", 1) == math.inf


def test_a_child_that_cannot_be_started_counts_as_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Ended:
        raise OSError("no memory")

    monkeypatch.setattr(autotune, "run_main", refuse)
    assert autotune.measure_in_child("Q4_0", PLAIN, 1) == math.inf


def test_a_child_measures(backend: Backend) -> None:
    assert 0 < autotune.measure_in_child("Q4_0", PLAIN, 1) < math.inf


def test_measurements_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(
        autotune, "measure_in_child", lambda kind, name, threads: asked.append(name) or 1.0 + len(asked)
    )
    first = seconds(backend, "Q4_0")
    assert set(first) == set(asked) and {PLAIN, FLOAT32} <= set(first)
    asked.clear()
    assert seconds(backend, "Q4_0") == first and not asked
    (tmp_path / autotune.CACHE).write_text("{ damaged")
    assert seconds(backend, "Q4_0").keys() == first.keys() and asked


def test_measurements_that_are_no_times_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "measure_in_child", lambda kind, name, threads: 1.0)
    key = cache_key("Q4_0", backend.n_threads)
    for damaged in ({key: 5}, {key: {PLAIN: "fast", FLOAT32: [1], "x": None}}, {key: {PLAIN: float("nan")}}):
        (tmp_path / autotune.CACHE).write_text(json.dumps(damaged))
        found = seconds(backend, "Q4_0")
        assert {PLAIN, FLOAT32} <= set(found) and set(found.values()) == {1.0}
        assert json.loads((tmp_path / autotune.CACHE).read_text())[key][PLAIN] == 1.0


def test_rows_are_whole_blocks_of_every_type() -> None:
    for name in TYPES.keys() - NO_WEIGHTS:
        assert kernel_timing.n_in(name) % block_size(name) == 0, name
