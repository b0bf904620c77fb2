"""Tests of products of quantized weights with many rows, and of what threads and graphs share for them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from granite4v.ggml.backend import Arena, Backend, set_data
from granite4v.ggml.compiled.meeting import NEXT, ROOM
from granite4v.ggml.compiled.nodes import OP_MUL_MAT, NodeKernels, replace
from granite4v.ggml.compiled.quantized_products import KINDS, MOST_OWN, TOP_ROWS
from granite4v.ggml.graph import Graph, Tensor
from tests.helpers.quantized_products import PRODUCTS, drawn_rows, packed_weights, products, unpacked

needs_kernel = pytest.mark.skipif(not NodeKernels.available(kinds=KINDS), reason="needs llvmlite and AVX-512 VNNI")


@pytest.fixture(params=[1, 3])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = Backend("cpu", request.param)
    yield backend
    backend.close()


def expected(kind: str, packed: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the products of rows rounded to 8-bit integers with one scale per 32 numbers."""
    blocks = rows.astype(np.float64).reshape(len(rows), -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scales, scales, 1)) * scales).reshape(rows.shape) @ unpacked(kind, packed).T


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n_in", "n_out", "n_rows"),
    [(256, 32, 65), (768, 96, 72), (2560, 128, TOP_ROWS), (512, 32, 2 * TOP_ROWS + 1), (9728, 64, 100)],
)
def test_values_are_those_of_the_rounded_rows(backend: Backend, kind: str, n_in: int, n_out: int, n_rows: int) -> None:
    packed, rows = packed_weights(kind, n_out, n_in), drawn_rows(n_rows, n_in)
    found, wanted = products(backend, kind, packed, rows), expected(kind, packed, rows)
    terms = np.abs(rows) @ np.abs(unpacked(kind, packed)).T  # they may cancel out
    assert (np.abs(found - wanted) / terms).max() < 5e-7


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_nothing_beside_it(backend: Backend, kind: str) -> None:
    """Nor on the number of other rows, which decides what is computed together."""
    packed, rows = packed_weights(kind, 96, 1280), drawn_rows(TOP_ROWS + 7, 1280)
    found = products(backend, kind, packed, rows)
    for part in (slice(100, 165), slice(TOP_ROWS + 7 - 71, None)):
        assert (products(backend, kind, packed, rows[part].copy()) == found[part]).all()
    assert (products(backend, kind, packed, np.zeros_like(rows)) == 0).all()


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_cannot_compute_is_left_to_ggml(kind: str) -> None:
    backend = Backend("cpu", 1)
    graph, arena = Graph(backend, 32), Arena(4)
    try:
        shapes = [(512, 32, 1), (512, 31, 1), (512, 32, 2)]
        tensors = [Tensor(arena.tensor(kind, *shape)) for shape in shapes]
        arena.allocate(backend.buffer_type, weights=True)
        for number, (tensor, (n_in, _, n)) in enumerate(zip(tensors, shapes, strict=True)):
            y = graph.matmul(tensor, graph.input(f"x{number}", "F32", n_in, 65, n))
            assert replace(y.ptr, PRODUCTS) == (number == 0)
    finally:
        graph.close()
        arena.close()
        backend.close()


@needs_kernel
def test_a_node_is_what_it_was_when_its_weights_are(backend: Backend) -> None:
    """A graph that is used again may find its weights rearranged."""
    graph, arena = Graph(backend, 8), Arena(1)
    try:
        tensor = arena.tensor("Q8_0", 256, 32)
        arena.allocate(backend.buffer_type, weights=True)
        few, many = (graph.matmul(Tensor(tensor), graph.input(f"x{n}", "F32", 256, n)) for n in (3, 300))
        for rearranged, taken in ((None, True), (1, False), (None, True), (1, False)):
            tensor.contents.extra = rearranged
            assert {replace(few.ptr, PRODUCTS), replace(many.ptr, PRODUCTS)} == {taken}
        assert many.ptr.contents.op == OP_MUL_MAT and many.ptr.contents.op_params[0] == 0
    finally:
        graph.close()
        arena.close()


@needs_kernel
def test_graphs_at_the_same_time_do_not_disturb_each_other() -> None:
    """More threads than cores take memory for rows from the same place."""

    def repeated(kind: str, n_rows: int) -> None:
        backend = Backend("cpu", 4)
        try:
            packed, rows = packed_weights(kind, 64, 512), drawn_rows(n_rows, 512)
            wanted = products(backend, kind, packed, rows)
            for _ in range(20):
                assert (products(backend, kind, packed, rows) == wanted).all()
        finally:
            backend.close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(repeated, ("Q4_K", "Q8_0", "Q4_K"), (MOST_OWN, 400, 300)))


@needs_kernel
@pytest.mark.parametrize("n_rows", [1, MOST_OWN, MOST_OWN + 1, 65])
def test_a_node_is_computed_again_and_again(backend: Backend, n_rows: int) -> None:
    """What the threads share is cleared after each run."""
    packed, rows = packed_weights("Q4_K", 64, 512), drawn_rows(n_rows, 512)
    graph, arena = Graph(backend, 8), Arena(1)
    try:
        weights = arena.tensor("Q4_K", 512, 64)
        arena.allocate(backend.buffer_type, weights=True)
        set_data(weights, packed)
        y = graph.matmul(Tensor(weights), graph.input("x", "F32", 512, n_rows))
        assert replace(y.ptr, PRODUCTS)
        graph.output("y", graph.scale(y, 1.0))
        found = [graph.run(x=rows)["y"] for _ in range(5)]
        assert all((one == found[0]).all() for one in found) and np.abs(found[0]).max() > 0
        assert not any(bytes(y.ptr.contents.op_params)[ROOM : NEXT + 4])
    finally:
        graph.close()
        arena.close()
