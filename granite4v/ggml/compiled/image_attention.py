"""Attention of rows over an image's keys and values in eight bits, for CPUs with AVX-512 VNNI.

A cross-attention layer reads thousands of keys and values for every token. As Q8_0, ggml multiplies them row by row.
Here they are packed in the order that the instructions need, so that products are sums in separate lanes and each byte
is read once for all query heads that share it. The precision is that of Q8_0 products: keys have one scale per 32
numbers and values one per 32 positions, and so have the queries and the softmax weights of the positions, which are
quantized to eight bits, too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from granite4v.ggml.compiled.products import multiplies
from granite4v.ggml.compiled.writer import LANES, Writer, compiled

BLOCK = 32  # numbers, or positions, that share a scale
QUADS = BLOCK // 4  # per block; an instruction adds the products of four bytes (a quad) to each lane
REGISTER = 64  # bytes
MAX_HEAD, MAX_GROUP = 256, 16  # head size; query heads per KV head
AHEAD = 8 << 10  # prefetch distance of keys and values, in bytes
OFFSET = 128  # added to keys to make them unsigned
WEIGHT = 255.0  # integer weight of the likeliest of 32 positions
NOWHERE = -1e30  # score of a position past the last one
HEADS_AT_ONCE = 2  # query heads whose weights are in registers while values are added


def is_available(head: int, group: int) -> bool:
    """Whether this machine can compute heads of size `head`, with `group` query heads per KV head."""
    fits = head % BLOCK == 0 and head <= MAX_HEAD and 1 <= group <= MAX_GROUP
    return fits and multiplies("Q8_0")


def packed_keys(keys: np.ndarray) -> np.ndarray:
    """Packs keys, float32 `(heads, n, head)` with n a multiple of 32, into bytes `(heads, n / 16, 17 * head)`.

    Each 16 positions have their integers as `(head / 4, 16, 4)`, so that 64 bytes are four adjacent numbers of each
    position, then their scales, float16 `(head / 32, 16)`.
    """
    n_heads, n, head = keys.shape
    integers, scales = _rounded(keys.reshape(n_heads, n // LANES, LANES, head // BLOCK, BLOCK), axis=-1)
    integers = (integers + OFFSET).astype(np.uint8)
    quads = integers.reshape(n_heads, n // LANES, LANES, head // BLOCK, QUADS, 4).transpose(0, 1, 3, 4, 2, 5)
    scales = np.ascontiguousarray(scales[..., 0].transpose(0, 1, 3, 2))
    return _joined(quads, scales, (n_heads, n // LANES))


def packed_values(values: np.ndarray) -> np.ndarray:
    """Packs values, float32 `(heads, n, head)` with n a multiple of 32, into bytes `(heads, n / 32, 34 * head)`.

    Each 32 positions have their integers as `(head / 16, 8, 16, 4)`, so that 64 bytes are 16 adjacent numbers of four
    positions, then their scales, float16 `(head,)`.
    """
    n_heads, n, head = values.shape
    integers, scales = _rounded(values.reshape(n_heads, n // BLOCK, BLOCK, head), axis=2)
    quads = (
        integers.astype(np.int8)
        .reshape(n_heads, n // BLOCK, QUADS, 4, head // LANES, LANES)
        .transpose(0, 1, 4, 2, 5, 3)
    )
    return _joined(quads, scales, (n_heads, n // BLOCK))


def _rounded(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes along an axis of 32: returns integers from -127 to 127, as float32, and float16 scales."""
    scales = (np.abs(x).max(axis, keepdims=True) / 127).astype(np.float16)
    factors = scales.astype(np.float32)
    with np.errstate(divide="ignore"):
        factors = np.where(factors > 0, 1 / factors, 0)
    return np.clip(np.rint(x * factors), -127, 127), scales


def _joined(integers: np.ndarray, scales: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    parts = [np.ascontiguousarray(part).view(np.uint8).reshape(*shape, -1) for part in (integers, scales)]
    return np.concatenate(parts, axis=-1)


@functools.cache
def operation(head: int, group: int) -> int:
    """Returns the address of a `ggml_custom_op_t`, valid until the process ends. Its user data is the number of
    positions.

    Sources: queries float32 `[head, heads, rows]`, packed keys and packed values. Result: `[head * heads, rows]`.
    """
    return int(_engine(head, group).get_function_address("attend_image"))


@functools.cache
def _engine(head: int, group: int) -> Any:
    return compiled(lambda: _Operation(Writer(), head, group).text(), f"image attention {head} {group}")


class _Operation:
    """Writes the operation. For each row and KV head it computes the softmax weights of all positions, 32 at a time,
    then the weighted sums of the values.

    The weights of 32 positions are quantized relative to the largest of them. So no step has to wait for the scores of
    all positions, and memory is read without a pause.
    """

    def __init__(self, writer: Writer, head: int, group: int) -> None:
        self.w, self.head, self.group = writer, head, group
        self.n_blocks = head // BLOCK  # blocks of a query

    def text(self) -> str:
        """Writes a ggml_custom_op_t: void (struct ggml_tensor * dst, int ith, int nth, void * userdata)."""
        w = self.w
        function = w.begin("attend_image", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        target, ith, nth, data = function.args
        b = w.b
        q, keys, values = (w.field(target, "src", i, w.bytes) for i in range(3))
        self.n = b.ptrtoint(data, w.i64)
        n_blocks = b.sdiv(b.add(self.n, w.integer(BLOCK - 1)), w.integer(BLOCK))
        self.n_padded = b.mul(n_blocks, w.integer(BLOCK))
        n_heads, n_rows = w.field(keys, "ne", 2), w.field(q, "ne", 2)
        self.queries = w.on_stack(self.group * self.head)
        self.query_scales, self.query_sums = (w.on_stack(4 * self.group * self.n_blocks) for _ in "ab")
        self.sums = w.on_stack(4 * self.group * self.head)
        room = self._allocate()
        with w.loop(b.sext(ith, w.i64), b.mul(n_rows, n_heads), b.sext(nth, w.i64)) as (task, _turn):
            number, row = b.srem(task, n_heads), b.sdiv(task, n_heads)
            first = b.mul(number, w.integer(self.group))
            for g in range(self.group):
                self._round_query(g, w.at(q, (1, b.add(first, w.integer(g))), (2, row)))
            self._weigh(w.at(keys, (2, number)), n_blocks, w.field(keys, "nb", 1))
            totals = [self._scale(g) for g in range(self.group)]
            self._add_values(w.at(values, (2, number)), n_blocks, w.field(values, "nb", 1))
            for g, total in enumerate(totals):
                out = b.gep(w.at(target, (1, row)), [b.mul(b.add(first, w.integer(g)), w.integer(4 * self.head))])
                for j in range(self.head // LANES):
                    found = w.load(self.sums, self._sum_place(g, j), w.vector)
                    w.store(b.fmul(found, w.spread(b.fdiv(w.number(1.0), total))), out, w.integer(REGISTER * j))
        b.call(w.declare("free", w.ir.VoidType(), w.bytes), [room])
        b.ret_void()
        return str(w.module)

    def _allocate(self) -> Any:
        """Allocates memory for the weights of all positions for the query heads of one task, and their scales and sums
        by 32 positions."""
        w, b = self.w, self.w.b
        n_registers = b.sdiv(b.add(self.n_padded, w.integer(BLOCK * LANES - 1)), w.integer(BLOCK * LANES))
        self.head_scales = b.mul(n_registers, w.integer(REGISTER))  # bytes of a query head's scales
        places = [w.integer(0)]
        for size in (self.n_padded, self.head_scales, self.head_scales):
            places.append(b.add(places[-1], b.mul(size, w.integer(self.group))))
        room = b.call(w.declare("malloc", w.bytes, w.i64), [places[-1]])
        self.weights, self.scales, self.weight_sums = (b.gep(room, [place]) for place in places[:-1])
        return room

    def _sum_place(self, g: int, j: int) -> Any:
        return self.w.integer(4 * self.head * g + REGISTER * j)

    # --- queries ---

    def _round_query(self, g: int, query: Any) -> None:
        """Quantizes a query: integers, a scale per 32 numbers (times 1 / sqrt(head)), and what the keys' offset adds to
        their products. Sets the query's sums of values to zero."""
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

    def _weigh(self, keys: Any, n_blocks: Any, stride: Any) -> None:
        """Computes the weights of all positions as integers, and for each 32 positions the largest score, whose weight
        is 255, and the sum of the weights."""
        w, b = self.w, self.w.b
        for g in range(self.group):  # the last register of scales may be filled only in part
            last = b.sub(self.head_scales, w.integer(REGISTER))
            w.store(w.all(NOWHERE), self._of_head(self.scales, self.head_scales, g), last)
        lanes = [w.integers(range(LANES * k, LANES * (k + 1)), w.i32) for k in range(2)]
        with w.loop(w.integer(0), n_blocks, w.integer(1)) as (i, _turn):
            halves = [b.gep(keys, [b.mul(b.add(b.mul(i, w.integer(2)), w.integer(k)), stride)]) for k in range(2)]
            scores = self._scores(halves)
            left = b.trunc(b.sub(self.n, b.mul(i, w.integer(BLOCK))), w.i32)
            is_there = [b.icmp_signed("<", lane, w.spread(left)) for lane in lanes]
            place, start = b.mul(i, w.integer(4)), b.mul(i, w.integer(BLOCK))
            for g in range(self.group):
                found = [b.select(is_there[k], scores[g][k], w.all(NOWHERE)) for k in range(2)]
                largest = w.largest(w.larger(*found))
                w.store(largest, self._of_head(self.scales, self.head_scales, g), place)
                exponents = [b.fsub(each, w.spread(largest)) for each in found]
                integers = [b.fptosi(w.rounded(b.fmul(w.exponential(x), w.all(WEIGHT))), w.whole) for x in exponents]
                weights = b.gep(self._of_head(self.weights, self.n_padded, g), [start])
                for k, each in enumerate(integers):
                    w.store(b.trunc(each, w.ir.VectorType(w.i8, LANES)), weights, w.integer(LANES * k), 1)
                w.store(w.whole_total(b.add(*integers)), self._of_head(self.weight_sums, self.head_scales, g), place)

    def _scores(self, halves: Sequence[Any]) -> list[list[Any]]:
        """Scores of all queries with the keys of each half, 16 positions: a vector by query and half."""
        w, b = self.w, self.w.b
        scores = [[w.all(0.0) for _ in halves] for _ in range(self.group)]
        for block in range(self.n_blocks):
            key_scales = [w.halves(half, w.integer(LANES * self.head + 2 * LANES * block)) for half in halves]
            quads = [[self._quad(half, QUADS * block + j) for j in range(QUADS)] for half in halves]
            for g in range(self.group):
                place = w.integer(4 * (self.n_blocks * g + block))
                sums = [w.spread(w.load(self.query_sums, place, w.i32)) for _ in halves]
                for j in range(QUADS):
                    if g == j * self.group // QUADS:
                        self._fetch(halves, REGISTER * (QUADS * block + j))
                    query = w.integer(self.head * g + BLOCK * block + 4 * j)
                    signed = w.spread(w.load(self.queries, query, w.i32))
                    sums = [w.fours_added(found, quads[k][j], signed) for k, found in enumerate(sums)]
                scale = w.spread(w.load(self.query_scales, place, w.f32))
                for k, found in enumerate(sums):
                    scores[g][k] = w.fma(b.sitofp(found, w.vector), b.fmul(key_scales[k], scale), scores[g][k])
        return scores

    def _scale(self, g: int) -> Any:
        """Turns a query head's largest scores, one per 32 positions, into the scales of its weights. Returns the sum of
        all its weights."""
        w, b = self.w, self.w.b
        scales, sums = (self._of_head(each, self.head_scales, g) for each in (self.scales, self.weight_sums))
        zero, step = w.integer(0), w.integer(REGISTER)
        with w.loop(zero, self.head_scales, step, [w.all(NOWHERE)]) as (at, turn):
            turn[0] = w.larger(turn[0], w.load(scales, at, w.vector))
        top = w.spread(w.largest(turn[0]))
        with w.loop(zero, self.head_scales, step, [w.all(0.0)]) as (at, turn):
            found = w.exponential(b.fsub(w.load(scales, at, w.vector), top))
            w.store(found, scales, at)
            turn[0] = w.fma(b.sitofp(w.load(sums, at, w.whole), w.vector), found, turn[0])
        return w.total(turn[0])

    def _add_values(self, values: Any, n_blocks: Any, stride: Any) -> None:
        """Adds the values of all positions, times their weights, 32 positions by 16 numbers at a time."""
        w, b = self.w, self.w.b
        with w.loop(w.integer(0), n_blocks, w.integer(1)) as (i, _turn):
            base = b.gep(values, [b.mul(i, stride)])
            place, start = b.mul(i, w.integer(4)), b.mul(i, w.integer(BLOCK))
            turns = [range(self.group)[g : g + HEADS_AT_ONCE] for g in range(0, self.group, HEADS_AT_ONCE)]
            for turn, heads in enumerate(turns):
                scales = [
                    w.spread(w.load(self._of_head(self.scales, self.head_scales, h), place, w.f32)) for h in heads
                ]
                weights = [
                    self._spread_weights(b.gep(self._of_head(self.weights, self.n_padded, h), [start])) for h in heads
                ]
                for j in range(self.head // LANES):
                    value_scales = w.halves(base, w.integer(BLOCK * self.head + 2 * LANES * j))
                    sums = [w.integers([0] * LANES, w.i32) for _ in heads]
                    for k in range(QUADS):
                        if turn == k * len(turns) // QUADS:
                            self._fetch([base], REGISTER * (QUADS * j + k))
                        quad = self._quad(base, QUADS * j + k)
                        sums = [w.fours_added(found, weights[h][k], quad) for h, found in enumerate(sums)]
                    for h, found, scale in zip(heads, sums, scales, strict=True):
                        before = w.load(self.sums, self._sum_place(h, j), w.vector)
                        after = w.fma(b.sitofp(found, w.vector), b.fmul(value_scales, scale), before)
                        w.store(after, self.sums, self._sum_place(h, j))

    def _fetch(self, places: Sequence[Any], n_bytes: int) -> None:
        """Prefetches one cache line per place, of what is needed next. The requests are spread over the products: a CPU
        handles few at once, and if all came at the head of a loop, its products would wait for memory as long as
        without any."""
        for place in places:
            self.w.prefetch(self.w.b.gep(place, [self.w.integer(AHEAD + n_bytes)]), 1)

    def _spread_weights(self, weights: Any) -> list[Any]:
        return [self.w.spread(self.w.load(weights, self.w.integer(4 * k), self.w.i32, 1)) for k in range(QUADS)]

    def _of_head(self, base: Any, size: Any, g: int) -> Any:
        return self.w.b.gep(base, [self.w.b.mul(size, self.w.integer(g))])

    def _quad(self, base: Any, number: int) -> Any:
        return self.w.load(base, self.w.integer(REGISTER * number), self.w.whole, 1)
