"""Products of F16 weights with a few rows, for CPUs with AVX-512.

ggml multiplies the weights of the mapped file row by row. Here they are widened once for all activation rows, which
stay float32, where ggml rounds them to half precision. The values of a row are the same to the bit whatever is beside
it, and for every number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite4v.ggml.compiled.writer import LANES, Writer

KIND = "F16"
MOST_ROWS = 64
AT_ONCE = 4  # rows of weights that are multiplied with what is loaded of an activation row
STEP = 4 * LANES  # weights of a row that are widened together
REGISTER = 4 * LANES  # bytes
AHEAD = 12 << 10  # bytes, or the rows of weights after those that are multiplied: what is fetched from memory


class FloatProducts:
    """Writes the operation."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer

    def write(self) -> Any:
        """void (*ggml_custom_op_t)(struct ggml_tensor * dst, int ith, int nth, void * userdata)"""
        w = self.w
        function = w.begin("multiply_F16", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        self.target, ith, nth, _ = function.args
        b, n = w.b, AT_ONCE
        self.weights, self.x = (w.field(self.target, "src", i, w.bytes) for i in range(2))
        self.sums = w.on_stack(n * MOST_ROWS * REGISTER)
        n_out, self.n_rows = w.field(self.weights, "ne", 1), w.field(self.x, "ne", 1)
        self.n_steps = b.sdiv(w.field(self.x, "ne", 0), w.integer(STEP))
        groups = b.sdiv(b.add(n_out, w.integer(n - 1)), w.integer(n))

        def share(i: Any) -> Any:
            return b.mul(b.sdiv(b.mul(groups, b.sext(i, w.i64)), b.sext(nth, w.i64)), w.integer(n))

        first, end = share(ith), share(b.add(ith, w.integer(1, w.i32)))
        has_rest = b.icmp_signed("<", n_out, end)
        complete = b.select(has_rest, b.sub(end, w.integer(n)), end)
        with w.loop(w.integer(0), w.field(self.x, "ne", 2), w.integer(1)) as (batch, _turn):
            with w.loop(first, complete, w.integer(n)) as (i, _turn):
                self._multiply(batch, [b.add(i, w.integer(p)) for p in range(n)])
            with w.loop(complete, b.select(has_rest, n_out, complete), w.integer(1)) as (i, _turn):
                self._multiply(batch, [i])
        b.ret_void()
        return function

    def _multiply(self, batch: Any, numbers: Sequence[Any]) -> None:
        """Rows of weights, by their numbers, with all activation rows, whose sums stay in memory: with these in
        registers, there are too few to widen the next weights meanwhile."""
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        at = [w.at(self.weights, (1, number), (2, batch)) for number in numbers]
        group = b.mul(w.field(self.weights, "nb", 1), w.integer(AT_ONCE))
        next_ones = b.select(b.icmp_signed("<", group, w.integer(AHEAD)), w.integer(AHEAD), group)

        def places(row: Any) -> list[Any]:
            start = b.mul(row, w.integer(AT_ONCE * REGISTER))
            return [b.add(start, w.integer(p * REGISTER)) for p in range(len(at))]

        with w.loop(zero, self.n_rows, one) as (row, _turn):
            for place in places(row):
                w.store(w.all(0.0), self.sums, place, REGISTER)
        with w.loop(zero, self.n_steps, one) as (number, _turn):
            steps = [b.gep(start, [b.mul(number, w.integer(2 * STEP))]) for start in at]
            for each in steps:
                w.prefetch(b.gep(each, [next_ones]), 2 * STEP)
            widened = [[w.halves(each, w.integer(2 * LANES * j)) for j in range(STEP // LANES)] for each in steps]
            with w.loop(zero, self.n_rows, one) as (row, _turn):
                x = b.gep(w.at(self.x, (1, row), (2, batch)), [b.mul(number, w.integer(4 * STEP))])
                for place, vectors in zip(places(row), widened, strict=True):
                    value = w.load(self.sums, place, w.vector, REGISTER)
                    for j, vector in enumerate(vectors):
                        value = w.fma(vector, w.load(x, w.integer(REGISTER * j), w.vector), value)
                    w.store(value, self.sums, place, REGISTER)
        with w.loop(zero, self.n_rows, one) as (row, _turn):
            out = w.at(self.target, (1, row), (2, batch))
            for place, number in zip(places(row), numbers, strict=True):
                w.store(w.total(w.load(self.sums, place, w.vector, REGISTER)), out, b.mul(number, w.integer(4)))
