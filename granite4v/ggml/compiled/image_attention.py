"""Attention of rows over an image's keys and values in eight bits, for CPUs with AVX-512 VNNI.

A layer of cross-attention reads thousands of keys and values for every token. As ggml's Q8_0 they are multiplied row by
row; here they lie as the instructions take them, so that their products are sums in separate lanes and each byte is
read once for all heads that share it. The precision is that of Q8_0 products: keys have a scale for 32 numbers, values
one for 32 positions, and queries and weights of positions are rounded to as many.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from granite4v.ggml.compiled.products import multiplies
from granite4v.ggml.compiled.writer import LANES, Writer, compiled

BLOCK = 32  # numbers, or positions, that share a scale
QUADS = BLOCK // 4  # four bytes are what an instruction adds up
REGISTER = 64  # bytes
MAX_HEAD, MAX_GROUP = 256, 16
AHEAD = 8 << 10  # bytes from which keys and values are fetched from memory
OFFSET = 128  # makes keys and values unsigned


def is_available(head: int, group: int) -> bool:
    """For heads of `head` numbers, `group` of which share their keys, on this machine."""
    fits = head % BLOCK == 0 and head <= MAX_HEAD and 1 <= group <= MAX_GROUP
    return fits and multiplies("Q8_0")


def packed_keys(keys: np.ndarray) -> np.ndarray:
    """Float32 `(heads, n, head)`, n a multiple of 32, as bytes `(heads, n / 16, 17 * head)`."""
    n_heads, n, head = keys.shape
    integers, scales = _rounded(keys.reshape(n_heads, n // LANES, LANES, head // BLOCK, BLOCK), axis=-1)
    quads = integers.reshape(n_heads, n // LANES, LANES, head // BLOCK, QUADS, 4).transpose(0, 1, 3, 4, 2, 5)
    scales = np.ascontiguousarray(scales[..., 0].transpose(0, 1, 3, 2))
    return _joined(quads, scales, (n_heads, n // LANES))


def packed_values(values: np.ndarray) -> np.ndarray:
    """Float32 `(heads, n, head)`, n a multiple of 32, as bytes `(heads, n / 32, 34 * head)`."""
    n_heads, n, head = values.shape
    integers, scales = _rounded(values.reshape(n_heads, n // BLOCK, BLOCK, head), axis=2)
    quads = integers.reshape(n_heads, n // BLOCK, QUADS, 4, head // LANES, LANES).transpose(0, 1, 4, 2, 5, 3)
    return _joined(quads, scales, (n_heads, n // BLOCK))


def _rounded(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned integers, and scales in half precision, along an axis of 32."""
    scales = (np.abs(x).max(axis, keepdims=True) / 127).astype(np.float16)
    factors = scales.astype(np.float32)
    with np.errstate(divide="ignore"):
        factors = np.where(factors > 0, 1 / factors, 0)
    return (np.clip(np.rint(x * factors), -127, 127) + OFFSET).astype(np.uint8), scales


def _joined(integers: np.ndarray, scales: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    parts = [np.ascontiguousarray(part).view(np.uint8).reshape(*shape, -1) for part in (integers, scales)]
    return np.concatenate(parts, axis=-1)


@functools.cache
def operation(head: int, group: int) -> int:
    """The address of a `ggml_custom_op_t`, whose data is the number of positions. It lives as long as the process.

    Sources: queries float32 `[head, heads, rows]`, packed keys and packed values. Result: `[head * heads, rows]`.
    """
    return int(_engine(head, group).get_function_address("attend_image"))


@functools.cache
def _engine(head: int, group: int) -> Any:
    return compiled(_Operation(Writer(), head, group).text())


class _Operation:
    """Writes it: scores of all positions, their weights, and sums of the values, for each row and head of keys."""

    def __init__(self, writer: Writer, head: int, group: int) -> None:
        self.w, self.head, self.group = writer, head, group
        self.n_blocks = head // BLOCK  # of a query

    def text(self) -> str:
        """void (*ggml_custom_op_t)(struct ggml_tensor * dst, int ith, int nth, void * userdata)"""
        w = self.w
        function = w.begin("attend_image", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        target, ith, nth, data = function.args
        b = w.b
        q, keys, values = (w.field(target, "src", i, w.bytes) for i in range(3))
        self.n, self.n_padded = b.ptrtoint(data, w.i64), b.mul(w.field(keys, "ne", 1), w.integer(LANES))
        n_heads, n_rows = w.field(keys, "ne", 2), w.field(q, "ne", 2)
        self.queries = b.alloca(w.i8, w.integer(self.group * self.head))
        self.query_scales, self.query_sums = (b.alloca(w.i8, w.integer(4 * self.group * self.n_blocks)) for _ in "ab")
        self.sums = b.alloca(w.i8, w.integer(4 * self.group * self.head))
        room = self._allocate()
        with w.loop(b.sext(ith, w.i64), b.mul(n_rows, n_heads), b.sext(nth, w.i64)) as (task, _turn):
            number, row = b.srem(task, n_heads), b.sdiv(task, n_heads)
            first = b.mul(number, w.integer(self.group))
            for g in range(self.group):
                self._round_query(g, w.at(q, (1, b.add(first, w.integer(g))), (2, row)))
            self._score(w.at(keys, (2, number)), w.field(keys, "ne", 1), w.field(keys, "nb", 1))
            totals = [self._weigh(g) for g in range(self.group)]
            self._add_values(w.at(values, (2, number)), w.field(values, "ne", 1), w.field(values, "nb", 1))
            for g, total in enumerate(totals):
                out = b.gep(w.at(target, (1, row)), [b.mul(b.add(first, w.integer(g)), w.integer(4 * self.head))])
                for j in range(self.head // LANES):
                    found = w.load(self.sums, self._sum_place(g, j), w.vector)
                    w.store(b.fmul(found, w.spread(b.fdiv(w.number(1.0), total))), out, w.integer(REGISTER * j))
        b.call(w.declare("free", w.ir.VoidType(), w.bytes), [room])
        b.ret_void()
        return str(w.module)

    def _allocate(self) -> Any:
        """Memory for scores, weights, their scales and sums, of all positions and the heads of one task."""
        w, b = self.w, self.w.b
        self.head_scores = b.mul(self.n_padded, w.integer(4))
        self.head_scales = b.sdiv(self.n_padded, w.integer(BLOCK // 4))  # bytes of a head's
        sizes = [self.head_scores, self.n_padded, self.head_scales, self.head_scales]
        places = [w.integer(0)]
        for size in sizes:
            places.append(b.add(places[-1], b.mul(size, w.integer(self.group))))
        room = b.call(w.declare("malloc", w.bytes, w.i64), [places[-1]])
        self.scores, self.weights, self.weight_scales, self.weight_sums = (b.gep(room, [p]) for p in places[:-1])
        return room

    def _sum_place(self, g: int, j: int) -> Any:
        return self.w.integer(4 * self.head * g + REGISTER * j)

    # --- queries ---

    def _round_query(self, g: int, query: Any) -> None:
        """As integers, with the scale of 32 numbers each, and what the keys' offset adds to their products."""
        w, b = self.w, self.w.b
        for block in range(self.n_blocks):
            values = [w.load(query, w.integer(4 * (BLOCK * block + LANES * i)), w.vector) for i in range(2)]
            integers, scale, total = w.as_integers(values)
            for i, each in enumerate(integers):
                at = w.integer(self.head * g + BLOCK * block + LANES * i)
                w.store(b.trunc(each, w.ir.VectorType(w.i8, LANES)), self.queries, at, 1)
            place = w.integer(4 * (self.n_blocks * g + block))
            w.store(b.fmul(scale, w.number(1 / math.sqrt(self.head))), self.query_scales, place)
            w.store(b.mul(total, w.integer(-OFFSET, w.i32)), self.query_sums, place)
        for j in range(self.head // LANES):
            w.store(w.all(0.0), self.sums, self._sum_place(g, j))

    # --- positions ---

    def _score(self, keys: Any, n_blocks: Any, stride: Any) -> None:
        """Products of all queries with the keys, 16 positions at once."""
        w, b = self.w, self.w.b
        with w.loop(w.integer(0), n_blocks, w.integer(1)) as (i, _turn):
            base = b.gep(keys, [b.mul(i, stride)])
            w.prefetch(b.gep(base, [w.integer(AHEAD)]), 17 * self.head)
            scores = [w.all(0.0)] * self.group
            for block in range(self.n_blocks):
                at = w.integer(LANES * self.head + 2 * LANES * block)
                key_scales = w.halves(base, at)
                quads = [self._quad(base, QUADS * block + j) for j in range(QUADS)]
                for g in range(self.group):
                    place = w.integer(4 * (self.n_blocks * g + block))
                    start = w.load(self.query_sums, place, w.i32)
                    found = w.quads_added(start, quads, b.gep(self.queries, [w.integer(self.head * g + BLOCK * block)]))
                    scale = b.fmul(key_scales, w.spread(w.load(self.query_scales, place, w.f32)))
                    scores[g] = w.fma(b.sitofp(found, w.vector), scale, scores[g])
            for g, score in enumerate(scores):
                w.store(score, self._of_head(self.scores, self.head_scores, g), b.mul(i, w.integer(REGISTER)))
        for g in range(self.group):
            with w.loop(self.n, self.n_padded, w.integer(1)) as (i, _turn):
                place = b.mul(i, w.integer(4))
                w.store(w.number(float("-inf")), self._of_head(self.scores, self.head_scores, g), place)

    def _weigh(self, g: int) -> Any:
        """Turns a head's scores into weights, integers with a scale for 32 of them; the sum of all weights."""
        w, b, zero = self.w, self.w.b, self.w.integer(0)
        scores = self._of_head(self.scores, self.head_scores, g)
        weights = self._of_head(self.weights, self.n_padded, g)
        scales, sums = (self._of_head(each, self.head_scales, g) for each in (self.weight_scales, self.weight_sums))
        with w.loop(zero, self.head_scores, w.integer(REGISTER), [w.all(-1e30)]) as (at, turn):
            turn[0] = w.larger(turn[0], w.load(scores, at, w.vector))
        top = w.spread(w.largest(turn[0]))
        with w.loop(zero, self.n_padded, w.integer(BLOCK), [w.all(0.0)]) as (i, turn):
            at = [b.mul(b.add(i, w.integer(LANES * k)), w.integer(4)) for k in range(2)]
            values = [w.exponential(b.fsub(w.load(scores, each, w.vector), top)) for each in at]
            for value in values:
                turn[0] = b.fadd(turn[0], value)
            integers, scale, total = w.as_integers(values)
            for k, each in enumerate(integers):
                place = b.add(i, w.integer(LANES * k))
                w.store(b.trunc(each, w.ir.VectorType(w.i8, LANES)), weights, place, 1)
            place = b.sdiv(i, w.integer(BLOCK // 4))
            w.store(scale, scales, place)
            w.store(b.mul(total, w.integer(-OFFSET, w.i32)), sums, place)
        return w.total(turn[0])

    def _add_values(self, values: Any, n_blocks: Any, stride: Any) -> None:
        """The values of all positions times their weights, 32 positions and 16 numbers at once."""
        w, b = self.w, self.w.b
        with w.loop(w.integer(0), n_blocks, w.integer(1)) as (i, _turn):
            base = b.gep(values, [b.mul(i, stride)])
            w.prefetch(b.gep(base, [w.integer(AHEAD)]), 34 * self.head)
            place, start = b.mul(i, w.integer(4)), b.mul(i, w.integer(BLOCK))
            scales, sums, weights = [], [], []
            for g in range(self.group):
                scales.append(w.load(self._of_head(self.weight_scales, self.head_scales, g), place, w.f32))
                sums.append(w.load(self._of_head(self.weight_sums, self.head_scales, g), place, w.i32))
                weights.append(b.gep(self._of_head(self.weights, self.n_padded, g), [start]))
            for j in range(self.head // LANES):
                quads = [self._quad(base, QUADS * j + k) for k in range(QUADS)]
                value_scales = w.halves(base, w.integer(BLOCK * self.head + 2 * LANES * j))
                for g in range(self.group):
                    found = b.sitofp(w.quads_added(sums[g], quads, weights[g]), w.vector)
                    scale = b.fmul(value_scales, w.spread(scales[g]))
                    before = w.load(self.sums, self._sum_place(g, j), w.vector)
                    w.store(w.fma(found, scale, before), self.sums, self._sum_place(g, j))

    def _of_head(self, base: Any, size: Any, g: int) -> Any:
        return self.w.b.gep(base, [self.w.b.mul(size, self.w.integer(g))])

    def _quad(self, base: Any, number: int) -> Any:
        return self.w.load(base, self.w.integer(REGISTER * number), self.w.whole, 1)
