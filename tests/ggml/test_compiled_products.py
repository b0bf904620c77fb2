"""Products by the compiled kernels, by value, and the nodes that they leave to ggml."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from granite4v.ggml.backend import Arena, Backend, set_data
from granite4v.ggml.compiled.float_products import AT_ONCE
from granite4v.ggml.compiled.nodes import OP_MUL_MAT, NodeKernels, replace
from granite4v.ggml.compiled.products import KINDS, MOST_FLOAT_ROWS, QUANTIZED, step
from granite4v.ggml.compiled.quantized_products import LEAST_OUTPUTS
from granite4v.ggml.graph import Graph, Tensor
from tests.helpers.quantized_products import PRODUCTS, drawn_rows, extreme_weights, packed_weights, products, unpacked

needs_kernel = pytest.mark.skipif(not NodeKernels.available(kinds=KINDS), reason="needs llvmlite and AVX-512 VNNI")
GGML_DIFFERS = {"Q8_0": 3e-4, "Q4_0": 3e-4, "F16": 3e-4}  # it rounds the scales of rows, or the rows


@pytest.fixture(params=[1, 3])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = Backend("cpu", request.param)
    yield backend
    backend.close()


def rounded(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows as they are beside F16, otherwise as 8-bit integers times their scales, one for 32 numbers."""
    if kind == "F16":
        return rows.astype(np.float64)
    blocks = rows.astype(np.float64).reshape(len(rows), -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scales, scales, 1)) * scales).reshape(rows.shape)


def expected(kind: str, packed: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return rounded(rows, kind) @ unpacked(kind, packed).T


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n_in", "n_out", "n_rows"), [(256, 32, 1), (256, 40, 2), (1280, 39, 3), (768, 33, 17), (2560, 64, MOST_FLOAT_ROWS)]
)
def test_values_are_those_of_the_rounded_rows(backend: Backend, kind: str, n_in: int, n_out: int, n_rows: int) -> None:
    packed, rows = packed_weights(kind, n_out, n_in), drawn_rows(n_rows, n_in)
    found, wanted = products(backend, kind, packed, rows), expected(kind, packed, rows)
    terms = np.abs(rows) @ np.abs(unpacked(kind, packed)).T  # they may cancel out
    assert (np.abs(found - wanted) / terms).max() < 3e-7
    by_ggml = products(backend, kind, packed, rows, by_ggml=True)
    assert (np.abs(found - by_ggml) / terms).max() < GGML_DIFFERS.get(kind, 3e-7)


@needs_kernel
@pytest.mark.parametrize("kind", [kind for kind in KINDS if step(kind) < 256])
def test_a_row_may_end_with_half_a_step(backend: Backend, kind: str) -> None:
    packed = packed_weights(kind, 40, 384)
    for n_rows in (1, 4, 9):
        rows = np.ascontiguousarray(drawn_rows(n_rows, 512)[:, :384])
        found, wanted = products(backend, kind, packed, rows), expected(kind, packed, rows)
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-3)


@needs_kernel
@pytest.mark.parametrize("n_rows", [4, 40])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_integers_at_their_ends(kind: str, n_rows: int) -> None:
    """Sums of products reach neither end of the integers that hold them."""
    n_in, backend = 512, Backend("cpu", 1)
    packed = extreme_weights(kind, LEAST_OUTPUTS, n_in)
    rows = np.ones((n_rows, n_in), np.float32)
    rows[1], rows[2], rows[3] = -1, 0, np.tile([1.0, -1.0], n_in // 2)
    try:
        found, wanted = products(backend, kind, packed, rows), expected(kind, packed, rows)
    finally:
        backend.close()
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-3)
    assert np.abs(wanted).max() > 100 and (found[2] == 0).all()


@needs_kernel
def test_several_products_in_one_operation(backend: Backend) -> None:
    kind = "F16"
    packed = np.stack([packed_weights(kind, 9, 256, seed) for seed in range(3)])
    rows = drawn_rows(6, 256).reshape(3, 2, 256)
    graph, arena = Graph(backend, 16), Arena(1)
    try:
        weights = arena.tensor(kind, 256, 9, 3)
        arena.allocate(backend.buffer_type, weights=True)
        set_data(weights, packed)
        y = graph.matmul(Tensor(weights), graph.input("x", "F32", 256, 2, 3))
        assert replace(y.ptr, PRODUCTS)
        graph.output("y", graph.scale(y, 1.0))
        found = graph.run(x=rows)["y"].reshape(3, 2, 9)
    finally:
        graph.close()
        arena.close()
    for i in range(3):
        np.testing.assert_allclose(found[i], expected(kind, packed[i], rows[i]), rtol=1e-6, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_nothing_beside_it(kind: str) -> None:
    """Neither on other rows, whose number decides how they are computed, nor on the number of threads: to the bit."""
    most = MOST_FLOAT_ROWS if kind == "F16" else 400
    packed, rows = packed_weights(kind, 53, 1280), drawn_rows(most, 1280)
    found = []
    for n_threads in (1, 3):
        backend = Backend("cpu", n_threads)
        found.append(products(backend, kind, packed, rows))
        for n_rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 24, 64):
            first = min(7, most - n_rows)
            some = products(backend, kind, packed, np.ascontiguousarray(rows[first : first + n_rows]))
            assert (some == found[0][first : first + n_rows]).all(), n_rows
        backend.close()
    assert all((each == found[0]).all() for each in found) and np.abs(found[0]).max() > 0


@needs_kernel
@pytest.mark.parametrize(("kind", "least", "most"), [("Q4_K", 32, 50), ("Q8_0", 32, 50), ("F16", 1, 2 * AT_ONCE + 1)])
def test_any_number_of_rows_of_weights_and_threads(kind: str, least: int, most: int) -> None:
    for n_threads, n_rows in ((1, 2), (5, 2), (5, 9)):
        backend, rows = Backend("cpu", n_threads), drawn_rows(n_rows, 256)
        try:
            for n_out in range(least, most + 1):
                packed = packed_weights(kind, n_out, 256)
                found, wanted = products(backend, kind, packed, rows), expected(kind, packed, rows)
                np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-4)
        finally:
            backend.close()


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_what_they_cannot_compute_is_left_to_ggml(kind: str) -> None:
    def taken(n_in: int, n_rows: int, *, n_out: int = 32, batches: int = 1, weights: str = kind) -> bool:
        backend = Backend("cpu", 1)
        graph = Graph(backend, 16)
        try:
            y = graph.matmul(graph.input("w", weights, n_in, n_out), graph.input("x", "F32", n_in, n_rows, batches))
            is_taken = replace(y.ptr, PRODUCTS)
            assert is_taken != (y.ptr.contents.op == OP_MUL_MAT)
            return is_taken
        finally:
            graph.close()
            backend.close()

    assert taken(256, 1) and taken(256, MOST_FLOAT_ROWS)
    assert taken(256, MOST_FLOAT_ROWS + 1) == taken(256, 1000) == (kind in QUANTIZED)
    assert taken(256, 1, n_out=LEAST_OUTPUTS - 1) == (kind == "F16")
    assert not taken(256, 1, batches=2)  # of one matrix
    assert not taken(256, 1, weights="F32") and not taken(256, 1, weights="Q4_1")
    assert step(kind) == 256 or not taken(256 + 32, 1)


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_rearranged_weights_are_left_to_ggml(kind: str) -> None:
    backend = Backend("cpu", 1)
    graph, arena = Graph(backend, 16), Arena(1)
    try:
        weights = arena.tensor(kind, 256, LEAST_OUTPUTS)
        arena.allocate(backend.buffer_type, weights=True)
        y = graph.matmul(Tensor(weights), graph.input("x", "F32", 256, 1))
        weights.contents.extra = 1  # as special buffer types mark them
        assert not replace(y.ptr, PRODUCTS)
        weights.contents.extra = None
        assert replace(y.ptr, PRODUCTS)
    finally:
        graph.close()
        arena.close()
        backend.close()


@needs_kernel
def test_kernels_survive_their_way_to_a_child_process() -> None:
    for kernels in (NodeKernels(), PRODUCTS, NodeKernels((64, 5), ("Q4_K",)), NodeKernels(rotary=True)):
        assert NodeKernels.from_json(kernels.to_json()) == kernels
    assert not NodeKernels() and NodeKernels().description == ""
    assert PRODUCTS.description.startswith("products by LLVM ")
