"""Products of quantized weights with rows, computed in graphs and by value."""

from __future__ import annotations

import gguf
import numpy as np

from granite4v.ggml.backend import Arena, Backend, set_data
from granite4v.ggml.compiled.nodes import NodeKernels, replace
from granite4v.ggml.compiled.products import KINDS
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.quantize import quantize_rows
from granite4v.ggml.types import TYPES

PRODUCTS = NodeKernels(products=KINDS)


def packed_weights(kind: str, n_out: int, n_in: int, seed: int = 0) -> np.ndarray:
    """Quantizes random weights so that every bit of a block is used: the full range of integers, and scales of both
    signs where a type has them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n_out, n_in), dtype=np.float32) * rng.uniform(0.1, 4, (n_out, n_in // 32, 1)).repeat(
        32, axis=2
    ).reshape(n_out, n_in).astype(np.float32)
    return quantize_rows(values + rng.standard_normal((n_out, 1), dtype=np.float32), kind, 1)


def extreme_weights(kind: str, n_out: int, n_in: int) -> np.ndarray:
    """Packs weights with every bit set except in the block scales, which are 0.5; rows 1 and 2 of types with signed
    numbers get the largest and the smallest ones."""
    packed = np.full((n_out, n_in // TYPES[kind].block * TYPES[kind].nbytes), 0xFF, dtype=np.uint8)
    blocks = packed.reshape(n_out, -1, TYPES[kind].nbytes)
    for place in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,)}[kind]:
        blocks[..., place : place + 2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    if kind == "Q6_K":
        blocks[1, :, 192:208], blocks[2, :, 192:208] = 0x7F, 0x80  # its signed scales
    if kind == "Q8_0":
        blocks[1, :, 2:], blocks[2, :, 2:] = 0x7F, 0x80
    return packed


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
    """Draws rows in which no quantized value is near the middle between two integers, where float32 and float64 could
    round differently."""
    rng = np.random.default_rng(1)
    values = rng.integers(-126, 127, (n_rows, n_in // 32, 32)) + rng.uniform(-0.4, 0.4, (n_rows, n_in // 32, 32))
    values[..., 5] = rng.choice([-127, 127], values.shape[:2])
    scales = rng.uniform(0.0001, 0.03, (n_rows, n_in // 256, 1))
    return (values.reshape(n_rows, -1, 256) * scales).reshape(n_rows, n_in).astype(np.float32)
