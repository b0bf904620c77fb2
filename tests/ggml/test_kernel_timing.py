"""What the measuring child prints, and what it measures: real products, correct in every kernel that runs here."""

from __future__ import annotations

import json
from collections.abc import Iterator

import gguf
import numpy as np
import pytest

from granite4v.ggml import kernel_timing
from granite4v.ggml import kernels as ggml_kernels
from granite4v.ggml.backend import Backend
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.kernel_timing import MANY, ROUNDS, Trial
from granite4v.ggml.kernels import (
    ATTENTION,
    BFLOAT16,
    FLOAT32,
    ONEDNN,
    ONEDNN_BF16,
    PLAIN,
    available_kernels,
    prompt_kernels,
)
from granite4v.ggml.quantize import quantize_rows


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend("cpu", 1)
    yield backend
    backend.close()


def test_a_line_when_a_trial_begins_and_one_when_it_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_timing, "measure", lambda trial, n_threads: trial.n_rows / n_threads)
    kernel_timing.main("2", json.dumps([Trial("F16", PLAIN, 8), Trial("F16", FLOAT32, 1)]))
    assert capsys.readouterr().out.splitlines() == ["[0]", "[0, 4.0]", "[1]", "[1, 0.5]"] * ROUNDS


def test_what_cannot_be_tried_does_not_keep_the_others_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    kernel_timing.main("1", json.dumps([Trial("F16", "no such kernel", MANY), Trial("F16", PLAIN, 1)]))
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.out.splitlines()]
    assert lines[:2] == [[0], [0, None]] and lines[3][0] == 1 and lines[3][1] > 0
    assert "no such kernel" in output.err


def test_every_kernel_computes_what_numpy_does(backend: Backend) -> None:
    kernels = available_kernels(backend, "F16")
    assert list(kernels)[:2] == [PLAIN, FLOAT32]
    rng = np.random.default_rng(3)
    weights, rows = rng.standard_normal((24, 64), dtype=np.float32), rng.standard_normal((5, 64), dtype=np.float32)
    halves = weights.astype(np.float16)
    # plain: the rows are rounded to half precision, too
    for name, tolerance in ((PLAIN, 1e-2), (FLOAT32, 1e-5), (ONEDNN, 1e-5), (ONEDNN_BF16, 2e-2)):
        if name not in kernels:
            continue
        graph = Graph(backend, 16)
        matrix, x = graph.input("matrix", "F16", 64, 24), graph.input("x", "F32", 64, 5)
        graph.output("y", kernels[name].product(graph, kernels[name].matrix(graph, Tensor(matrix.ptr)), x))
        found = graph.run(matrix=halves, x=rows)["y"]
        graph.close()
        assert np.abs(found - rows @ halves.astype(np.float32).T).max() < tolerance * 8, name


def test_widening_for_a_prompt_is_more_exact_than_what_ggml_does(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml_kernels, "cpu_features", lambda: frozenset({"avx512_bf16"}))
    assert BFLOAT16 in prompt_kernels("Q8_0") and not prompt_kernels("F16")
    rng = np.random.default_rng(4)
    packed = quantize_rows(rng.standard_normal((40, 256), dtype=np.float32), "Q8_0", 1)
    rows = rng.standard_normal((30, 256), dtype=np.float32)
    expected = rows.astype(np.float64) @ gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0).T
    errors = {}
    for kernel in (available_kernels(backend, "Q8_0")[PLAIN], prompt_kernels("Q8_0")[BFLOAT16]):
        graph = Graph(backend, 16)
        matrix, x = graph.input("matrix", "Q8_0", 256, 40), graph.input("x", "F32", 256, 30)
        graph.output("y", kernel.product(graph, kernel.matrix(graph, Tensor(matrix.ptr)), x))
        errors[kernel.name] = np.linalg.norm(graph.run(matrix=packed, x=rows)["y"] - expected)
        graph.close()
    assert 0 < errors[BFLOAT16] < errors[PLAIN] < 0.02 * np.linalg.norm(expected)


def test_attention_is_measured_for_each_kernel(backend: Backend) -> None:
    for name in available_kernels(backend, ATTENTION):
        assert 0 < kernel_timing.measure(Trial(ATTENTION, name, 64), 2) < 60
