"""Flash attention of a few rows, for CPUs with AVX-512.

ggml's own kernel computes the rows of a decode step head by head, converts every key and value again for each head, and
accumulates values in half precision. That takes 15 ms per answer of a 4B model after 1,400 tokens, half the time of a
step of 16 answers. Here the query heads that share a KV head are computed together, in float32, with all sums in
registers. 64 rows and more are taken to be a prompt's (`prompt_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite4v.ggml.compiled.writer import LANES, SCALE_PLACE, Writer
from granite4v.ggml.cpu_features import cpu_features
from granite4v.ggml.declarations import TensorStruct

FEW = 64  # from this number of rows on, `prompt_attention` is used
MAX_HEAD, MAX_GROUP = 128, 16  # head size; query heads per KV head
SUMS = 20  # registers for sums of values; the others hold keys, values and weights
CELLS = 64  # cells of a block: its scores are computed, then its values added; llama.cpp's caches have multiples of 256
_NEVER = 0xFC00  # minus infinity in half precision: the mask of a cell that a row does not see
LOWEST = -1e30  # less than any score


def is_available(head: int, group: int) -> bool:
    """Whether this CPU can compute heads of size `head`, with `group` query heads per KV head."""
    fits = head % LANES == 0 and LANES <= head <= MAX_HEAD and 1 <= group <= MAX_GROUP
    return fits and "avx512" in cpu_features()


def n_seen(w: Writer, seen: Any, n_cells: Any) -> Any:
    """Number of cells up to the last one that a row of the mask shows, rounded up to a multiple of `CELLS`."""
    b, kind = w.b, w.ir.VectorType(w.i16, CELLS)
    never = w.ir.Constant(kind, [_NEVER] * CELLS)
    with w.loop(w.integer(0), n_cells, w.integer(CELLS), [w.integer(0)]) as (i, turn):
        some = b.icmp_unsigned("!=", w.load(seen, b.mul(i, w.integer(2)), kind, 2), never)
        is_seen = b.icmp_unsigned("!=", b.bitcast(some, w.ir.IntType(CELLS)), w.integer(0, w.ir.IntType(CELLS)))
        turn[0] = b.select(is_seen, b.add(i, w.integer(CELLS)), turn[0])
    return turn[0]


def weigh(w: Writer, seen: Any, scores: Any, places: Sequence[Any], top: Any, total: Any) -> tuple[Any, Any, Any]:
    """Turns a row's scores of one block of cells into softmax weights, in place.

    `seen`: the row's mask for these cells. `places`: byte offsets of the vectors of scores. `top`, `total`: the row's
    largest score and its sum of weights so far. Returns both with this block included, and the factor for earlier sums
    of values, exp(old top - new top), as a vector.
    """
    b, found = w.b, []
    for i, place in enumerate(places):
        mask = w.halves(seen, w.integer(2 * LANES * i))
        is_hidden = b.fcmp_ordered("<", mask, w.all(LOWEST))
        found.append(b.select(is_hidden, w.all(float("-inf")), b.fadd(w.load(scores, place, w.vector), mask)))
    largest = found[0]
    for one in found[1:]:
        largest = w.larger(largest, one)
    new_top = w.larger(top, w.largest(largest))
    spread_top, added = w.spread(new_top), w.all(0.0)
    for place, one in zip(places, found, strict=True):
        weight = w.exponential(b.fsub(one, spread_top))
        w.store(weight, scores, place)
        added = b.fadd(added, weight)
    scaled = w.exponential(w.spread(b.fsub(top, new_top)))
    one_scaled = b.extract_element(scaled, w.integer(0, w.i32))
    return new_top, b.fadd(b.fmul(total, one_scaled), w.total(added)), scaled


class FewRowsAttention:
    """Writes the operation. A thread's task is one row and one KV head, with the query heads that share it."""

    def __init__(self, writer: Writer, head: int, group: int) -> None:
        self.w, self.head, self.group = writer, head, group
        self.n_vectors = head // LANES

    def write(self) -> Any:
        """Writes a ggml_custom_op_t: void (struct ggml_tensor * dst, int ith, int nth, void * userdata)."""
        w = self.w
        function = w.begin("attend", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        target, ith, nth, _ = function.args
        b = w.b
        per_pass = max(1, min(self.group, SUMS // self.n_vectors))
        scores = w.on_stack(4 * per_pass * CELLS)
        q, k, v, mask = (w.field(target, "src", i, w.bytes) for i in range(4))
        scale = w.spread(w.load(target, w.integer(TensorStruct.op_params.offset + SCALE_PLACE), w.f32))
        n_rows, n_heads = w.field(q, "ne", 1), w.field(k, "ne", 2)
        n_tasks = b.mul(b.mul(n_rows, n_heads), w.field(q, "ne", 3))
        with w.loop(b.sext(ith, w.i64), n_tasks, b.sext(nth, w.i64)) as (task, _turn):
            head, rest = b.srem(task, n_heads), b.sdiv(task, n_heads)
            row, stream = b.srem(rest, n_rows), b.sdiv(rest, n_rows)
            stream_of_mask = b.srem(stream, w.field(mask, "ne", 3))
            seen = w.at(mask, (1, row), (3, stream_of_mask))
            keys, values = (w.at(tensor, (2, head), (3, stream)) for tensor in (k, v))
            n_cells = n_seen(w, seen, w.field(k, "ne", 1))
            strides = w.field(k, "nb", 1), w.field(v, "nb", 1)
            for first in range(0, self.group, per_pass):
                heads = [
                    b.add(b.mul(head, w.integer(self.group)), w.integer(i))
                    for i in range(first, min(first + per_pass, self.group))
                ]
                queries = [w.at(q, (1, row), (2, one), (3, stream)) for one in heads]
                targets = [w.at(target, (1, one), (2, row), (3, stream)) for one in heads]
                self._heads(queries, keys, values, strides, seen, n_cells, scale, targets, scores)
        b.ret_void()
        return function

    def _heads(
        self,
        queries: Sequence[Any],
        keys: Any,
        values: Any,
        strides: tuple[Any, Any],
        seen: Any,
        n_cells: Any,
        scale: Any,
        targets: Sequence[Any],
        scores: Any,
    ) -> None:
        """Computes some query heads of a task with an online softmax, block by block, as in flash attention: earlier
        sums are rescaled when a larger score comes."""
        w, b, n, vectors = self.w, self.w.b, len(queries), range(self.n_vectors)
        query = [[b.fmul(w.load(one, w.integer(64 * j), w.vector), scale) for j in vectors] for one in queries]
        state = [*n * [w.number(LOWEST)], *n * [w.number(0.0)], *n * self.n_vectors * [w.all(0.0)]]
        with w.loop(w.integer(0), n_cells, w.integer(CELLS), state) as (first, turn):
            tops, totals, sums = turn[:n], turn[n : 2 * n], turn[2 * n :]
            with w.loop(w.integer(0), w.integer(CELLS), w.integer(1)) as (i, _turn):
                at = b.mul(b.add(first, i), strides[0])
                key = [w.halves(keys, b.add(at, w.integer(32 * j))) for j in vectors]
                for g in range(n):
                    product = b.fmul(query[g][0], key[0])
                    for j in vectors[1:]:
                        product = w.fma(query[g][j], key[j], product)
                    place = b.add(b.mul(i, w.integer(4)), w.integer(4 * CELLS * g))
                    w.store(w.total(product), scores, place)
            for g in range(n):
                places = [w.integer(4 * (CELLS * g + LANES * i)) for i in range(CELLS // LANES)]
                mask = b.gep(seen, [b.mul(first, w.integer(2))])
                tops[g], totals[g], scaled = weigh(w, mask, scores, places, tops[g], totals[g])
                for j in vectors:
                    sums[g * self.n_vectors + j] = b.fmul(sums[g * self.n_vectors + j], scaled)
            with w.loop(w.integer(0), w.integer(CELLS), w.integer(1), sums) as (i, added):
                at = b.mul(b.add(first, i), strides[1])
                value = [w.halves(values, b.add(at, w.integer(32 * j))) for j in vectors]
                for g in range(n):
                    place = b.add(b.mul(i, w.integer(4)), w.integer(4 * CELLS * g))
                    weight = w.spread(w.load(scores, place, w.f32))
                    for j in vectors:
                        k = g * self.n_vectors + j
                        added[k] = w.fma(weight, value[j], added[k])
            turn[:] = [*tops, *totals, *added]
        for g in range(n):
            total = turn[n + g]
            is_empty = b.fcmp_ordered("==", total, w.number(0.0))
            factor = w.spread(b.select(is_empty, w.number(0.0), b.fdiv(w.number(1.0), total)))
            for j in vectors:
                w.store(b.fmul(turn[2 * n + g * self.n_vectors + j], factor), targets[g], w.integer(64 * j))
