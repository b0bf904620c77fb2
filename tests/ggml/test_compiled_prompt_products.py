"""Products of packed weights with the rows of a prompt, by value, and where they take a node's place."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest

from granite4v.ggml.backend import Arena, Backend, set_data
from granite4v.ggml.compiled.nodes import OP_MUL_MAT, NodeKernels, replace
from granite4v.ggml.compiled.prompt_products import AT_ONCE, PACKED_MARK, can_be_packed, packed
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.quantize import quantize_rows

KERNELS = NodeKernels.available(kinds=["Q8_0"])
needs_kernel = pytest.mark.skipif(not KERNELS, reason="needs llvmlite and AVX-512 VNNI")


@pytest.fixture(params=[1, 3])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = Backend("cpu", request.param)
    yield backend
    backend.close()


def weights(n_out: int, n_in: int) -> np.ndarray:
    return quantize_rows(np.random.default_rng(2).standard_normal((n_out, n_in), dtype=np.float32), "Q8_0", 1)


def drawn_rows(n_rows: int, n_in: int) -> np.ndarray:
    """No number is near the middle between two integers, which float32 and float64 may see on different sides."""
    rng = np.random.default_rng(3)
    values = rng.integers(-126, 127, (n_rows, n_in // 32, 32)) + rng.uniform(-0.4, 0.4, (n_rows, n_in // 32, 32))
    values[..., 9] = rng.choice([-127, 127], values.shape[:2])
    return (values * rng.uniform(0.0001, 0.03, (n_rows, n_in // 32, 1))).reshape(n_rows, n_in).astype(np.float32)


def expected(quantized: np.ndarray, rows: np.ndarray) -> np.ndarray:
    blocks = rows.astype(np.float64).reshape(len(rows), -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    rounded = (np.rint(blocks / np.where(scales, scales, 1)) * scales).reshape(rows.shape)
    return rounded @ gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0).astype(np.float64).T


def computed(backend: Backend, quantized: np.ndarray, rows: np.ndarray) -> np.ndarray:
    graph, arena = Graph(backend, 8), Arena(1)
    try:
        tensor = arena.tensor("Q8_0", rows.shape[1], len(quantized))
        arena.allocate(backend.buffer_type, weights=True)
        set_data(tensor, packed(quantized))
        tensor.contents.extra = PACKED_MARK
        y = graph.matmul(Tensor(tensor), graph.input("x", "F32", *reversed(rows.shape)))
        assert replace(y.ptr, KERNELS)
        graph.output("y", graph.scale(y, 1.0))
        return graph.run(x=rows)["y"]
    finally:
        graph.close()
        arena.close()


@needs_kernel
@pytest.mark.parametrize(
    ("n_in", "n_out", "n_rows"), [(32, 16, 1), (64, 48, 12), (896, 16, 17), (256, 80, AT_ONCE + 29), (2560, 64, 512)]
)
def test_values_are_those_of_the_rounded_rows(backend: Backend, n_in: int, n_out: int, n_rows: int) -> None:
    quantized, rows = weights(n_out, n_in), drawn_rows(n_rows, n_in)
    wanted = expected(quantized, rows)
    terms = np.abs(rows) @ np.abs(gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0)).T
    assert (np.abs(computed(backend, quantized, rows) - wanted) / terms).max() < 5e-7


@needs_kernel
def test_a_row_depends_on_nothing_beside_it(backend: Backend) -> None:
    quantized, rows = weights(48, 320), drawn_rows(200, 320)
    found = computed(backend, quantized, rows)
    assert (computed(backend, quantized, rows[150:153].copy()) == found[150:153]).all()
    assert (computed(backend, quantized, np.zeros_like(rows)) == 0).all()


@needs_kernel
def test_a_node_is_what_it_was_when_its_weights_are(backend: Backend) -> None:
    """A graph that is used again finds weights in another form."""
    graph, arena = Graph(backend, 8), Arena(1)
    try:
        tensor = arena.tensor("Q8_0", 256, 16)
        arena.allocate(backend.buffer_type, weights=True)
        few, many = (graph.matmul(Tensor(tensor), graph.input(f"x{n}", "F32", 256, n)) for n in (3, 300))
        for mark, taken in ((None, (True, False)), (PACKED_MARK, (True, True)), (None, (True, False))):
            tensor.contents.extra = mark
            assert (replace(few.ptr, KERNELS), replace(many.ptr, KERNELS)) == taken
        assert many.ptr.contents.op == OP_MUL_MAT and many.ptr.contents.op_params[0] == 0
    finally:
        graph.close()
        arena.close()


def test_what_can_be_packed() -> None:
    assert can_be_packed(896, 128) and not can_be_packed(896, 130) and not can_be_packed(40, 16)
