"""Attention over packed keys and values, checked numerically."""

from __future__ import annotations

import numpy as np
import pytest

from granite4v.ggml.backend import Arena, Backend, set_data
from granite4v.ggml.compiled.image_attention import is_available, operation, packed_keys, packed_values
from granite4v.ggml.graph import Graph, Tensor

needs_kernel = pytest.mark.skipif(not is_available(128, 4), reason="needs llvmlite and AVX-512 VNNI")
# head size, heads that share keys, key heads, positions, rows
SIZES = [(32, 2, 2, 40, 1), (64, 1, 3, 96, 3), (128, 4, 2, 999, 2), (96, 16, 1, 33, 1), (256, 3, 1, 1, 2)]
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def drawn(head: int, group: int, n_heads: int, n: int, n_rows: int, *, factor: float = 1.0) -> Arrays:
    """Draws queries `(rows, heads, group, head)`, keys and values `(heads, n, head)`."""
    rng = np.random.default_rng(n)
    q = rng.standard_normal((n_rows, n_heads, group, head), dtype=np.float32) * factor
    k, v = (rng.standard_normal((n_heads, n, head), dtype=np.float32) for _ in range(2))
    return q, k, v + rng.standard_normal((n_heads, 1, head), dtype=np.float32)


def computed(arrays: Arrays, n_threads: int = 2) -> np.ndarray:
    q, k, v = arrays
    n_rows, n_heads, group, head = q.shape
    n = k.shape[1]
    n_padded = -(-n // 32) * 32
    backend = Backend("cpu", n_threads)
    graph, arena = Graph(backend, 8), Arena(2)
    try:
        packed = [
            pack(np.pad(x, ((0, 0), (0, n_padded - n), (0, 0)))) for pack, x in ((packed_keys, k), (packed_values, v))
        ]
        places = [Tensor(arena.tensor("I8", *reversed(each.shape))) for each in packed]
        arena.allocate(backend.buffer_type, weights=False)
        for place, each in zip(places, packed, strict=True):
            set_data(place.ptr, each)
        queries = graph.input("q", "F32", head, n_heads * group, n_rows)
        mixed = graph.custom(operation(head, group), n, (n_heads * group * head, n_rows), queries, *places)
        graph.output("y", graph.scale(mixed, 1.0))
        return graph.run(q=q.reshape(n_rows, -1, head))["y"].reshape(q.shape)
    finally:
        graph.close()
        arena.close()
        backend.close()


def rounded(x: np.ndarray, axis: int, *, half: bool) -> np.ndarray:
    """Rounds to 8-bit integers with a scale for 32 numbers along an axis; the scale may be in half precision."""
    x = np.moveaxis(x.astype(np.float64), axis, -1)
    n = x.shape[-1]
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % 32)]).reshape(*x.shape[:-1], -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    scales = scales.astype(np.float16).astype(np.float64) if half else scales
    found = np.clip(np.rint(blocks / np.where(scales, scales, 1)), -127, 127) * scales
    return np.moveaxis(found.reshape(*x.shape[:-1], -1)[..., :n], -1, axis)


def rounded_weights(weights: np.ndarray) -> np.ndarray:
    """Rounds to integers up to 255; the largest of 32 positions becomes 255."""
    n = weights.shape[-1]
    blocks = np.pad(weights, [(0, 0)] * 3 + [(0, -n % 32)]).reshape(*weights.shape[:-1], -1, 32)
    units = np.maximum(blocks.max(-1, keepdims=True), 1e-300) / 255
    return (np.rint(blocks / units) * units).reshape(*weights.shape[:-1], -1)[..., :n]


def expected(arrays: Arrays, *, is_rounded: bool) -> np.ndarray:
    q, k, v = arrays
    if is_rounded:
        q, k, v = rounded(q, -1, half=False), rounded(k, -1, half=True), rounded(v, 1, half=True)
    scores = np.einsum("rhgd,hnd->rhgn", q.astype(np.float64), k.astype(np.float64)) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = rounded_weights(weights) if is_rounded else weights
    return np.einsum("rhgn,hnd->rhgd", weights / weights.sum(-1, keepdims=True), v.astype(np.float64))


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@needs_kernel
@pytest.mark.parametrize("sizes", SIZES)
def test_values_are_those_of_rounded_attention(sizes: tuple[int, ...]) -> None:
    arrays = drawn(*sizes)
    found = computed(arrays)
    assert apart(found, expected(arrays, is_rounded=True)) < 1e-4
    assert apart(found, expected(arrays, is_rounded=False)) < 0.02


@needs_kernel
def test_one_position_that_takes_all_the_weight() -> None:
    arrays = drawn(128, 4, 2, 500, 2, factor=100)
    found = computed(arrays)
    assert np.isfinite(found).all() and apart(found, expected(arrays, is_rounded=True)) < 1e-3


@needs_kernel
def test_zeros() -> None:
    q, k, v = drawn(64, 2, 2, 70, 1)
    assert (computed((q, k, 0 * v)) == 0).all()
    found = computed((0 * q, k, v))
    assert apart(found, expected((0 * q, k, v), is_rounded=True)) < 1e-4


@needs_kernel
def test_a_row_depends_on_nothing_beside_it() -> None:
    q, k, v = drawn(128, 4, 2, 300, 5)
    found = [computed((q, k, v), n_threads) for n_threads in (1, 3)]
    assert (found[0] == found[1]).all()
    assert (computed((q[3:4], k, v)) == found[0][3:4]).all()


def test_heads_of_other_sizes_have_none() -> None:
    assert not is_available(48, 2) and not is_available(288, 1) and not is_available(64, 17)
