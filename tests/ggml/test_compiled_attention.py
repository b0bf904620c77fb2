"""Attention for a few rows and for a prompt's rows by compiled kernels, checked numerically, and the nodes that they
leave to ggml."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from granite4v.errors import SpeedWarning
from granite4v.ggml.backend import Arena, Backend
from granite4v.ggml.compiled import nodes
from granite4v.ggml.compiled.attention import FEW, is_available
from granite4v.ggml.compiled.nodes import OP_CUSTOM, OP_FLASH_ATTN_EXT, OP_MUL_MAT, NodeKernels, callback
from granite4v.ggml.compiled.writer import llvm, version
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.library import lib

needs_kernel = pytest.mark.skipif(not NodeKernels.available((64, 5)).attention, reason="needs llvmlite and AVX-512")
SEE = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
Arrays = dict[str, np.ndarray]


@pytest.fixture(params=[1, 2])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = Backend("cpu", request.param)
    yield backend
    backend.close()


def drawn(head: int, group: int, n_heads: int, n_rows: int, n_cells: int, n_streams: int, seed: int = 0) -> Arrays:
    """Draws queries in llama.cpp's layout, row by row, and masks in which rows see some of the cells."""
    rng = np.random.default_rng(seed)
    seen = rng.random((n_streams, 1, n_rows, n_cells)) < 0.8
    for stream in range(n_streams):
        seen[stream, :, :, int(rng.integers(1, n_cells)) :] = False
    seen[..., 0] = True
    return {
        "q": rng.standard_normal((n_streams, n_rows, n_heads * group, head), dtype=np.float32) * 3,
        "k": rng.standard_normal((n_streams, n_cells, n_heads, head)).astype(np.float16),
        "v": rng.standard_normal((n_streams, n_cells, n_heads, head)).astype(np.float16),
        "mask": np.where(seen, 0, -np.inf).astype(np.float16),
    }


def node_of(
    graph: Graph, arena: Arena, arrays: Arrays, *, scale: float, softcap: float = 0.0, kind: str = "F16"
) -> Any:
    kinds = {"q": "F32", "k": kind, "v": kind, "mask": "F16"}
    inputs = {name: graph.input(name, kinds[name], *reversed(value.shape)) for name, value in arrays.items()}
    q, k, v = (graph.permute(inputs[name], 0, 2, 1, 3).ptr for name in "qkv")
    mask = inputs["mask"].ptr if "mask" in inputs else None
    return lib().ggml_flash_attn_ext(arena.context, q, k, v, mask, scale, 0.0, softcap)


def is_taken(node: Any, head: int, group: int) -> bool:
    """Shows a node to the callback, which must never ask for its result; returns whether the kernel took it."""
    see = SEE(callback(NodeKernels((head, group))))
    assert see(ctypes.addressof(node.contents), True, None) is False
    assert see(ctypes.addressof(node.contents), False, None) is True
    return bool(node.contents.op == OP_CUSTOM)


def computed(backend: Backend, arrays: Arrays, head: int, group: int, *, scale: float) -> np.ndarray:
    graph, arena = Graph(backend, 32), Arena(1)
    try:
        node = node_of(graph, arena, arrays, scale=scale)
        assert is_taken(node, head, group)
        graph.output("y", graph.scale(Tensor(node), 1.0))
        return graph.run(**arrays)["y"]
    finally:
        graph.close()
        arena.close()


def expected(arrays: Arrays, group: int, scale: float) -> np.ndarray:
    """Returns `(streams, rows, heads, head)` in float64."""
    q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    k, v = (np.repeat(values, group, axis=2) for values in (k, v))
    scores = np.einsum("snhd,schd->shnc", q, k) * scale + arrays["mask"].astype(np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("shnc,schd->snhd", weights / weights.sum(-1, keepdims=True), v)


def test_the_numbers_of_the_operations_are_those_of_the_library() -> None:
    assert lib().ggml_op_name(OP_FLASH_ATTN_EXT) == b"FLASH_ATTN_EXT"
    assert lib().ggml_op_name(OP_MUL_MAT) == b"MUL_MAT"
    assert lib().ggml_op_name(OP_CUSTOM) == b"CUSTOM"


@needs_kernel
@pytest.mark.parametrize(
    ("head", "group", "n_heads", "n_rows", "n_cells", "n_streams"),
    [
        (64, 5, 2, 1, 256, 3),
        (16, 2, 2, 1, 256, 2),
        (48, 1, 4, 2, 256, 2),
        (64, 1, 3, 1, 64, 1),
        (64, 7, 2, 3, 512, 2),
        (64, 16, 1, 2, 128, 2),
        (128, 4, 2, 1, 1280, 2),
        (128, 1, 2, 5, 256, 1),
        (128, 5, 3, 63, 256, 1),
        (64, 5, 2, 64, 256, 2),
        (16, 3, 1, 131, 128, 1),
        (48, 1, 2, 385, 512, 1),
        (80, 7, 1, 70, 192, 2),
        (128, 16, 2, 65, 320, 1),
    ],
)
def test_its_values_are_those_of_attention(
    backend: Backend, head: int, group: int, n_heads: int, n_rows: int, n_cells: int, n_streams: int
) -> None:
    arrays = drawn(head, group, n_heads, n_rows, n_cells, n_streams)
    found = computed(backend, arrays, head, group, scale=head**-0.5)
    assert np.abs(found - expected(arrays, group, head**-0.5)).max() < 5e-6  # ggml's own: up to 8e-3


@needs_kernel
@pytest.mark.parametrize("n_rows", [3, 100])
def test_large_scores_and_rows_that_see_one_cell_or_none(backend: Backend, n_rows: int) -> None:
    arrays = drawn(64, 2, 2, n_rows, 256, 2)
    arrays["q"] *= 100  # the exponential of most differences is zero
    arrays["mask"][0, 0, 1] = -np.inf
    arrays["mask"][1, 0, 1] = -np.inf
    arrays["mask"][1, 0, 1, 200] = 0
    found = computed(backend, arrays, 64, 2, scale=0.125)
    arrays["mask"][0, 0, 1] = 0
    wanted = expected(arrays, 2, 0.125)
    wanted[0, 1] = 0  # like ggml
    assert np.abs(found - wanted).max() < 2e-4 and np.isfinite(found).all()


@needs_kernel
@pytest.mark.parametrize("n_rows", [1, 66])
def test_hidden_cells_may_hold_anything(backend: Backend, n_rows: int) -> None:
    arrays = drawn(64, 5, 2, n_rows, 256, 2)
    arrays["mask"][:] = arrays["mask"][:, :, :1]
    before = computed(backend, arrays, 64, 5, scale=0.125)
    hidden = np.isneginf(arrays["mask"][:, 0, 0])
    arrays["k"][hidden] = np.nan
    arrays["v"][hidden] = 7
    assert (computed(backend, arrays, 64, 5, scale=0.125) == before).all()


@needs_kernel
def test_a_row_depends_on_nothing_beside_it() -> None:
    """Neither on other streams and rows nor on the number of threads, bit for bit."""
    arrays = drawn(64, 5, 2, 4, 256, 3)
    found = []
    for n_threads in (1, 2, 3):
        backend = Backend("cpu", n_threads)
        found.append(computed(backend, arrays, 64, 5, scale=0.125))
        alone = {name: values[1:2] for name, values in arrays.items()}
        alone["q"], alone["mask"] = alone["q"][:, 2:3], alone["mask"][:, :, 2:3]
        one = computed(backend, {name: values.copy() for name, values in alone.items()}, 64, 5, scale=0.125)
        assert (one.reshape(10, 64) == found[0][1, 2]).all()
        backend.close()
    assert all((each == found[0]).all() for each in found)


@needs_kernel
def test_a_row_of_a_prompt_depends_on_no_other() -> None:
    """Wherever it is in the prompt, and although other rows see more cells."""
    arrays = drawn(64, 7, 2, 200, 512, 1)
    arrays["mask"][0, 0, 90, 100:] = -np.inf
    backends = [Backend("cpu", n_threads) for n_threads in (1, 2)]
    found = [computed(backend, arrays, 64, 7, scale=0.125) for backend in backends]
    part = {**arrays, "q": arrays["q"][:, 29:100].copy(), "mask": arrays["mask"][:, :, 29:100].copy()}
    alone = computed(backends[0], part, 64, 7, scale=0.125)
    for backend in backends:
        backend.close()
    assert (found[0] == found[1]).all()
    assert (alone.reshape(71, -1) == found[0].reshape(200, -1)[29:100]).all()


@needs_kernel
def test_what_it_cannot_compute_is_left_to_ggml(backend: Backend) -> None:
    def taken(**changes: Any) -> bool:
        sizes = {"head": 64, "group": 5, "n_heads": 2, "n_rows": 1, "n_cells": 256, "n_streams": 1}
        options = {name: value for name, value in changes.items() if name not in sizes and name != "without"}
        arrays = drawn(**{**sizes, **{name: value for name, value in changes.items() if name in sizes}})
        graph, arena = Graph(backend, 32), Arena(1)
        try:
            kept = {name: values for name, values in arrays.items() if name != changes.get("without")}
            return is_taken(node_of(graph, arena, kept, scale=0.125, **options), 64, 5)
        finally:
            graph.close()
            arena.close()

    assert taken() and taken(n_rows=FEW - 1) and taken(n_rows=FEW)
    assert not taken(n_cells=250) and not taken(head=128) and not taken(group=4)
    for n_rows in (1, FEW):
        assert not taken(softcap=30.0, n_rows=n_rows) and not taken(kind="F32", n_rows=n_rows)
    assert not taken(without="mask")


def test_without_llvmlite_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nodes", "writer"):
        monkeypatch.setattr(f"granite4v.ggml.compiled.{module}.llvm", lambda: None)
    assert not NodeKernels.available((64, 5))
    version.cache_clear()
    assert version() == ""
    version.cache_clear()


def test_an_llvmlite_without_what_is_needed_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    llvm.cache_clear()
    monkeypatch.setitem(sys.modules, "llvmlite", types.SimpleNamespace(binding=types.SimpleNamespace()))
    assert llvm() is None
    llvm.cache_clear()


@needs_kernel
def test_where_llvm_fails_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("expected type\nvec")

    monkeypatch.setattr(nodes, "compiled", fail)
    heads = (112, 3)  # not used by another test, because compiled kernels stay in memory
    with pytest.warns(SpeedWarning, match=r"LLVM \d.* cannot compile kernels \(expected type\), so"):
        assert not NodeKernels.available(heads, ["Q4_K"])
    assert not NodeKernels.available(heads, ["Q4_K"])  # without another warning


def test_heads_of_other_sizes_have_none() -> None:
    assert not is_available(72, 5) and not is_available(144, 1)
    assert not is_available(64, 0) and not is_available(64, 17)
