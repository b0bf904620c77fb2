"""Products of quantized weights with rows, in graphs and by value."""

from __future__ import annotations

import gguf
import numpy as np

from granite4v.ggml.backend import Arena, Backend, set_data
from granite4v.ggml.compiled.nodes import NodeKernels, replace
from granite4v.ggml.compiled.products import KINDS
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.quantize import quantize_rows

PRODUCTS = NodeKernels(products=KINDS)


def packed_weights(kind: str, n_out: int, n_in: int, seed: int = 0) -> np.ndarray:
    """Every bit of a block occurs: integers from end to end, scales of both signs where a type has them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n_out, n_in), dtype=np.float32) * rng.uniform(0.1, 4, (n_out, n_in // 32, 1)).repeat(
        32, axis=2
    ).reshape(n_out, n_in).astype(np.float32)
    return quantize_rows(values + rng.standard_normal((n_out, 1), dtype=np.float32), kind, 1)


def products(backend: Backend, kind: str, packed: np.ndarray, rows: np.ndarray, *, by_ggml: bool = False) -> np.ndarray:
    graph, arena = Graph(backend, 16), Arena(1)
    try:
        weights = arena.tensor(kind, rows.shape[1], len(packed))
        arena.allocate(backend.buffer_type, weights=True)
        set_data(weights, packed)
        y = graph.matmul(Tensor(weights), graph.input("x", "F32", *reversed(rows.shape)))
        assert by_ggml or replace(y.ptr, PRODUCTS)
        graph.output("y", graph.scale(y, 1.0))
        return graph.run(x=rows)["y"]
    finally:
        graph.close()
        arena.close()


def unpacked(kind: str, packed: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]).astype(np.float64)


def drawn_rows(n_rows: int, n_in: int) -> np.ndarray:
    """No number is near the middle between two integers, which float32 and float64 may see on different sides."""
    rng = np.random.default_rng(1)
    values = rng.integers(-126, 127, (n_rows, n_in // 32, 32)) + rng.uniform(-0.4, 0.4, (n_rows, n_in // 32, 32))
    values[..., 5] = rng.choice([-127, 127], values.shape[:2])
    scales = rng.uniform(0.0001, 0.03, (n_rows, n_in // 256, 1))
    return (values.reshape(n_rows, -1, 256) * scales).reshape(n_rows, n_in).astype(np.float32)
