"""Products of packed Q8_0 weights with the rows of a prompt, for CPUs with AVX-512 VNNI.

Sixteen rows of weights lie together, quads of their integers side by side, so that products with a row of the prompt
are sums in sixteen separate lanes, and weights that are loaded once serve a dozen rows. Rows are rounded to 8-bit
integers of one scale for 32, as ggml does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from granite4v.ggml.compiled.writer import LANES, Writer
from granite4v.ggml.types import TYPES

KIND = "Q8_0"
BLOCK = 32  # numbers that share a scale
QUADS = BLOCK // 4
REGISTER = 64  # bytes
PACKED = LANES * TYPES[KIND].nbytes  # bytes of a block of sixteen rows
ROWS, SOME = 12, 4  # that are multiplied with weights in registers
AT_ONCE = 96  # rows whose integers stay in a core's cache while all weights pass
OFFSET = 128  # makes weights unsigned
PACKED_MARK = 0x67347630  # the `extra` of a tensor whose weights are packed


def can_be_packed(n_in: int, n_out: int) -> bool:
    return n_in % BLOCK == 0 and n_out % LANES == 0


def packed(weights: np.ndarray) -> np.ndarray:
    """Rows of Q8_0, bytes `(n, row)` with n a multiple of 16, as packed bytes `(n, row)`."""
    n, n_bytes = weights.shape
    blocks = weights.reshape(n // LANES, LANES, -1, TYPES[KIND].nbytes)
    scales = blocks[..., :2].transpose(0, 2, 1, 3)
    integers = (blocks[..., 2:] ^ OFFSET).reshape(n // LANES, LANES, -1, QUADS, 4).transpose(0, 2, 3, 1, 4)
    parts = [np.ascontiguousarray(part).reshape(n // LANES, -1, size) for part, size in ((scales, 32), (integers, 512))]
    return np.concatenate(parts, axis=-1).reshape(n, n_bytes)


class PromptProducts:
    """Writes the operation."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer

    def write(self) -> Any:
        """void (*ggml_custom_op_t)(struct ggml_tensor * dst, int ith, int nth, void * userdata)"""
        w = self.w
        function = w.begin("multiply_packed", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        self.target, ith, nth, _ = function.args
        b, zero, one = w.b, w.integer(0), w.integer(1)
        self.weights, self.x = (w.field(self.target, "src", i, w.bytes) for i in range(2))
        n_in, n_out, n_rows = w.field(self.x, "ne", 0), w.field(self.weights, "ne", 1), w.field(self.x, "ne", 1)
        self.n_blocks, groups = b.sdiv(n_in, w.integer(BLOCK)), b.sdiv(n_out, w.integer(LANES))
        ith, nth = b.sext(ith, w.i64), b.sext(nth, w.i64)
        first, end = (b.sdiv(b.mul(groups, i), nth) for i in (ith, b.add(ith, one)))
        self.integers = b.call(w.declare("malloc", w.bytes, w.i64), [b.mul(n_in, w.integer(AT_ONCE))])
        self.scales = b.call(w.declare("malloc", w.bytes, w.i64), [b.mul(self.n_blocks, w.integer(8 * AT_ONCE))])
        with w.loop(zero, n_rows, w.integer(AT_ONCE)) as (start, _turn):
            left = b.sub(n_rows, start)
            n = b.select(b.icmp_signed("<", left, w.integer(AT_ONCE)), left, w.integer(AT_ONCE))
            with w.loop(zero, n, one) as (row, _turn):
                self._round_row(w.at(self.x, (1, b.add(start, row))), row)
            with w.loop(first, end, one) as (group, _turn):
                done = zero
                for size in (ROWS, SOME, 1):
                    until = b.add(done, b.mul(b.sdiv(b.sub(n, done), w.integer(size)), w.integer(size)))
                    with w.loop(done, until, w.integer(size)) as (row, _turn):
                        self._multiply(group, start, row, size)
                    done = until
        for room in (self.integers, self.scales):
            b.call(w.declare("free", w.ir.VoidType(), w.bytes), [room])
        b.ret_void()
        return function

    def _round_row(self, source: Any, row: Any) -> None:
        w, b = self.w, self.w.b
        with w.loop(w.integer(0), self.n_blocks, w.integer(1)) as (block, _turn):
            at = b.gep(source, [b.mul(block, w.integer(4 * BLOCK))])
            values = [w.load(at, w.integer(REGISTER * i), w.vector) for i in range(2)]
            integers, scale, total = w.as_integers(values)
            place = b.add(b.mul(row, self.n_blocks), block)
            for i, each in enumerate(integers):
                target = b.add(b.mul(place, w.integer(BLOCK)), w.integer(LANES * i))
                w.store(b.trunc(each, w.ir.VectorType(w.i8, LANES)), self.integers, target, 1)
            w.store(b.mul(total, w.integer(-OFFSET, w.i32)), self.scales, b.mul(place, w.integer(8)))
            w.store(scale, self.scales, b.add(b.mul(place, w.integer(8)), w.integer(4)))

    def _multiply(self, group: Any, start: Any, first: Any, size: int) -> None:
        """Sixteen rows of weights with `size` rows of the prompt."""
        w, b = self.w, self.w.b
        base = w.at(self.weights, (1, b.mul(group, w.integer(LANES))))
        places = [b.mul(b.add(first, w.integer(r)), self.n_blocks) for r in range(size)]
        rows = [b.gep(self.integers, [b.mul(place, w.integer(BLOCK))]) for place in places]
        scales = [b.gep(self.scales, [b.mul(place, w.integer(8))]) for place in places]
        with w.loop(w.integer(0), self.n_blocks, w.integer(1), [w.all(0.0)] * size) as (block, sums):
            at = b.gep(base, [b.mul(block, w.integer(PACKED))])
            weight_scales = w.halves(at, w.integer(0))
            quads = [w.load(at, w.integer(2 * LANES + REGISTER * i), w.whole, 1) for i in range(QUADS)]
            for r in range(size):
                numbers = b.gep(rows[r], [b.mul(block, w.integer(BLOCK))])
                of_row = b.gep(scales[r], [b.mul(block, w.integer(8))])
                found = w.quads_added(w.load(of_row, w.integer(0), w.i32), quads, numbers)
                scale = b.fmul(weight_scales, w.spread(w.load(of_row, w.integer(4), w.f32)))
                sums[r] = w.fma(b.sitofp(found, w.vector), scale, sums[r])
        for r, total in enumerate(sums):
            out = w.at(self.target, (1, b.add(start, b.add(first, w.integer(r)))))
            w.store(total, out, b.mul(group, w.integer(REGISTER)))
