"""Products of weights with the rows of a prompt, for CPUs with AVX-512 VNNI.

32 rows of weights are unpacked together, some hundred numbers of each, and transposed: a register holds four adjacent
integers (a quad) of 16 rows of weights, so that products with a row of the prompt are sums in separate lanes. The
mapped file stays as it is. The weights are unpacked again for every few hundred rows of the prompt, which takes a
twentieth of the time of the products.

The register tile is 5 rows of the prompt by 32 rows of weights. For each quad it needs 7 loads (5 of the prompt, 2 of
weights) for 10 multiplications; a 10x16 tile would need 11. Loads and multiplications have the same throughput, so
loads would then be the limit.

Rows of the prompt are quantized to 8-bit integers with one scale per 32 numbers, more finely than ggml does for
K-quants (256), and products of integers are exact. A row's result has the same bits whatever other rows there are, and
for every number of threads. Threads take shares of the products one after another, so that a slower one takes fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite4v.ggml.compiled.meeting import Meeting
from granite4v.ggml.compiled.products import OFFSETS, step
from granite4v.ggml.compiled.weights import REGISTER, Unpacked, Unpackers
from granite4v.ggml.compiled.writer import LANES, Writer
from granite4v.ggml.types import TYPES

KINDS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0")
BLOCK = 32  # numbers of a row of the prompt that share a scale
QUADS = BLOCK // 4
LEAST_ROWS = 20  # of a prompt for which this is faster than `products` (Q4_K takes 0.8 of the time, Q8_0 0.6)
OUTPUTS = 2 * LANES  # rows of weights that are unpacked together
ROWS = 5  # rows of the prompt that are multiplied with these at once; with more, LLVM spills sums to memory
CHUNK = 512  # numbers of each row of weights that are unpacked at once, and stay in a core's L1 cache
CACHED = 512 << 10  # bytes of quantized rows of the prompt that stay in the L2 cache while all weights pass
LOW_ROWS, TOP_ROWS = 8 * ROWS, 64 * ROWS  # rows of the prompt per share, at least and at most
SHARES = 4  # per thread at least, if there are enough rows
# Byte offsets in the record of each block of a row of the prompt, kept in addition to its integers: its scale, the sum
# of its numbers, and what the weights' offset adds to the products of the block, or of each half. `ABOUT`: record size.
SCALE, SUM, STARTS, ABOUT = 0, 4, 8, 16
UNSIGNED = {**OFFSETS, "Q6_K": -32}  # as `OFFSETS`; the other types have an offset for each part of a block instead


class PromptProducts:
    """Writes the operations, one per type of weights. A share is a group of `OUTPUTS` rows of weights with some rows of
    the prompt."""

    def __init__(self, writer: Writer) -> None:
        self.w, self.unpackers = writer, Unpackers(writer)

    def write(self, kind: str) -> Any:
        """Writes a ggml_custom_op_t: void (struct ggml_tensor * dst, int ith, int nth, void * userdata)."""
        w = self.w
        self.kind, self.n_parts = kind, 2 if kind == "Q6_K" else 1  # parts of a block with a weight scale each
        self.has_least = kind not in UNSIGNED
        # registers per step of an unpacked row of weights: integers, scales and, for some types, offsets
        self.n_registers = step(kind) // REGISTER + 1 + self.has_least
        function = w.begin(f"multiply_prompt_{kind}", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        self.target, ith, nth, _ = function.args
        b, one = w.b, w.integer(1)
        self.weights, self.x = (w.field(self.target, "src", i, w.bytes) for i in range(2))
        n_in, n_out, n_rows = w.field(self.x, "ne", 0), w.field(self.weights, "ne", 1), w.field(self.x, "ne", 1)
        self.n_blocks, n_steps = b.sdiv(n_in, w.integer(BLOCK)), b.sdiv(n_in, w.integer(step(kind)))
        ith, nth = b.sext(ith, w.i64), b.sext(nth, w.i64)
        self.unpacked = w.on_stack(self.n_registers * LANES * REGISTER)
        self.columns = w.on_stack(2 * CHUNK // step(self.kind) * self.n_registers * LANES * REGISTER)
        self.sums = w.on_stack(TOP_ROWS * 2 * REGISTER)
        n_integers = b.mul(n_rows, n_in)
        meeting = Meeting(w, self.target, ith, nth)
        self.integers = meeting.room(b.add(n_integers, b.mul(b.mul(n_rows, self.n_blocks), w.integer(ABOUT))))
        self.about = b.gep(self.integers, [n_integers])
        with w.loop(ith, n_rows, nth) as (row, _turn):
            self._round_row(w.at(self.x, (1, row)), row)
        meeting.wait_for_all()
        groups = b.sdiv(n_out, w.integer(OUTPUTS))
        at_once = self._rows_at_once(n_in, n_rows, groups, nth)
        n_parts = b.sdiv(b.add(n_rows, b.sub(at_once, one)), at_once)
        with meeting.shares(b.mul(groups, n_parts)) as share:
            # the last share starts early enough for one full pass: 42 rows by 40 are rows 0 to 39 and 37 to 41
            start = self._least(b.mul(b.sdiv(share, groups), at_once), b.sub(n_rows, w.integer(ROWS)))
            self._multiply_group(b.srem(share, groups), start, self._least(b.sub(n_rows, start), at_once), n_steps)
        meeting.leave()
        b.ret_void()
        return function

    def _least(self, x: Any, y: Any) -> Any:
        return self.w.b.select(self.w.b.icmp_signed("<", x, y), x, y)

    def _rows_at_once(self, n_in: Any, n_rows: Any, groups: Any, n_threads: Any) -> Any:
        """Number of rows of the prompt per share, a multiple of `ROWS`: as many as stay in a core's cache, or fewer, so
        that every thread has some shares."""
        w, b = self.w, self.w.b
        most = self._least(b.sdiv(w.integer(CACHED), n_in), w.integer(TOP_ROWS))
        most = self._least(most, b.sdiv(b.mul(n_rows, groups), b.mul(n_threads, w.integer(SHARES))))
        whole = b.mul(b.sdiv(most, w.integer(ROWS)), w.integer(ROWS))
        return b.select(b.icmp_signed("<", whole, w.integer(LOW_ROWS)), w.integer(LOW_ROWS), whole)

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
            about = b.gep(self.about, [b.mul(place, w.integer(ABOUT))])
            w.store(scale, about, w.integer(SCALE))
            w.store(b.fmul(b.sitofp(total, w.f32), scale), about, w.integer(SUM))
            offset = w.integer(UNSIGNED.get(self.kind, 0), w.i32)
            totals = [w.whole_total(each) for each in integers] if self.n_parts == 2 else [total]
            for i, each in enumerate(totals):
                w.store(b.mul(each, offset), about, w.integer(STARTS + 4 * i))

    def _multiply_group(self, group: Any, start: Any, n_rows: Any, n_steps: Any) -> None:
        """Multiplies a group of rows of weights with `n_rows` rows of the prompt from `start` on. The sums stay in
        memory from chunk to chunk. The last pass overlaps the one before: 12 rows are passes from rows 0, 5 and 7."""
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        per_chunk = w.integer(CHUNK // step(self.kind))
        n_passes = b.sdiv(b.add(n_rows, w.integer(ROWS - 1)), w.integer(ROWS))

        def first_of(number: Any) -> Any:
            return self._least(b.mul(number, w.integer(ROWS)), b.sub(n_rows, w.integer(ROWS)))

        def sums_of(number: Any) -> Any:
            return b.gep(self.sums, [b.mul(number, w.integer(ROWS * 2 * REGISTER))])

        with w.loop(zero, n_steps, per_chunk) as (first_step, _turn):
            n = self._least(b.sub(n_steps, first_step), per_chunk)
            for half in range(2):
                with w.loop(zero, n, one) as (i, _turn):
                    self._unpack(group, half, b.add(first_step, i), i)
            is_first = b.icmp_signed("==", first_step, zero)
            with w.loop(zero, n_passes, one) as (number, _turn):
                self._multiply(b.add(start, first_of(number)), first_step, n, sums_of(number), is_first)
        with w.loop(zero, n_passes, one) as (number, _turn):
            for r in range(ROWS):
                out = w.at(self.target, (1, b.add(start, b.add(first_of(number), w.integer(r)))))
                for half in range(2):
                    value = w.load(sums_of(number), w.integer(REGISTER * (2 * r + half)), w.vector, REGISTER)
                    place = b.add(b.mul(group, w.integer(4 * OUTPUTS)), w.integer(REGISTER * half))
                    w.store(value, out, place)

    # --- weights ---

    def _unpack(self, group: Any, half: int, i: Any, to: Any) -> None:
        """Unpacks one step of sixteen rows of weights (`half` 0 or 1 of the group), then transposes its registers.

        The lanes of the resulting columns are rows of weights; columns are quads of integers, and the scales, and for
        some types the offsets, of sixteen numbers each. `i`, `to`: number of the step in the rows, and in the chunk.
        """
        w, b = self.w, self.w.b
        n_bytes = step(self.kind) // TYPES[self.kind].block * TYPES[self.kind].nbytes
        number = b.add(b.mul(group, w.integer(OUTPUTS)), w.integer(LANES * half))
        base = b.gep(w.at(self.weights, (1, number)), [b.mul(i, w.integer(n_bytes))])
        row_bytes, width = w.field(self.weights, "nb", 1), self.n_registers * REGISTER
        with w.loop(w.integer(0), w.integer(LANES), w.integer(1)) as (row, _turn):
            at = b.gep(base, [b.mul(row, row_bytes)])
            w.prefetch(b.gep(at, [b.mul(row_bytes, w.integer(OUTPUTS))]), n_bytes)
            found = self.unpackers.unpack(self.kind, at)
            least = [found.offset] if self.has_least else []
            for j, vector in enumerate([*found.numbers, self._scales(found), *least]):
                place = b.add(b.mul(row, w.integer(width)), w.integer(REGISTER * j))
                w.store(vector, self.unpacked, place, REGISTER)
        target = b.gep(self.columns, [b.mul(to, w.integer(2 * width * LANES))])
        with w.loop(w.integer(0), w.integer(self.n_registers), w.integer(1)) as (j, _turn):
            at = b.gep(self.unpacked, [b.mul(j, w.integer(REGISTER))])
            rows = [w.load(at, w.integer(width * r), w.vector, REGISTER) for r in range(LANES)]
            for lane, column in enumerate(w.transposed(rows)):
                place = b.mul(b.add(b.mul(j, w.integer(LANES)), w.integer(lane)), w.integer(2 * REGISTER))
                w.store(column, target, b.add(place, w.integer(REGISTER * half)), REGISTER)

    def _scales(self, found: Unpacked) -> Any:
        """Scales of a step of a row of weights as one vector, with an element for each sixteen numbers, in order."""
        w, b = self.w, self.w.b
        is_k = found.scale is not None
        fours = [w.picked(each, [0, 8, 16, 24] if is_k else [0, 0, 8, 8]) for each in found.scales]
        halves = [w.picked(fours[i], range(8), fours[i + 1]) for i in range(0, len(fours), 2)]
        both = w.picked(halves[0], range(16), halves[-1])
        return b.fmul(b.sitofp(b.sext(both, w.whole), w.vector), found.scale) if is_k else both

    # --- products ---

    def _multiply(self, first: Any, first_step: Any, n_steps: Any, sums_at: Any, is_first: Any) -> None:
        """Multiplies a chunk of `OUTPUTS` rows of weights with `ROWS` rows of the prompt."""
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        n_blocks = w.integer(step(self.kind) // BLOCK)
        begin = b.mul(first_step, n_blocks)
        places = [b.add(b.mul(b.add(first, w.integer(r)), self.n_blocks), begin) for r in range(ROWS)]
        rows = [b.gep(self.integers, [b.mul(place, w.integer(BLOCK))]) for place in places]
        abouts = [b.gep(self.about, [b.mul(place, w.integer(ABOUT))]) for place in places]
        before = [w.load(sums_at, w.integer(REGISTER * i), w.vector, REGISTER) for i in range(2 * ROWS)]
        before = [b.select(is_first, w.all(0.0), each) for each in before]
        scales_at = w.integer(2 * LANES * step(self.kind))
        with w.loop(zero, n_steps, one, before) as (i, sums):
            at_step = b.gep(self.columns, [b.mul(i, w.integer(2 * self.n_registers * LANES * REGISTER))])
            with w.loop(zero, n_blocks, one, sums) as (j, added):
                block = b.add(b.mul(i, n_blocks), j)
                at = b.gep(at_step, [b.mul(j, w.integer(2 * QUADS * REGISTER))])
                scales = b.gep(at_step, [b.add(b.mul(j, w.integer(4 * REGISTER)), scales_at)])
                numbers = [b.gep(row, [b.mul(block, w.integer(BLOCK))]) for row in rows]
                about = [b.gep(each, [b.mul(block, w.integer(ABOUT))]) for each in abouts]
                added[:] = self._added(added, at, scales, numbers, about)
            sums[:] = added
        for i, total in enumerate(sums):
            w.store(total, sums_at, w.integer(REGISTER * i), REGISTER)

    def _added(
        self, before: Sequence[Any], quads: Any, scales: Any, numbers: Sequence[Any], about: Sequence[Any]
    ) -> list[Any]:
        """Adds the products of one block to the sums of all rows; returns the new sums."""
        w, b = self.w, self.w.b
        n = QUADS // self.n_parts
        products: list[Any] = []
        for part in range(self.n_parts):
            found = [w.spread(w.load(each, w.integer(STARTS + 4 * part), w.i32)) for each in about for _ in range(2)]
            for quad in range(n * part, n * (part + 1)):
                weights = self._both(quads, 2 * quad, w.whole)
                for r, at in enumerate(numbers):
                    of_row = w.spread(w.load(at, w.integer(4 * quad), w.i32, 1))
                    for half in range(2):
                        found[2 * r + half] = w.fours_added(found[2 * r + half], weights[half], of_row)
            scale = self._both(scales, 2 * part, w.vector)
            values = [b.sitofp(each, w.vector) for each in found]
            if part == 0:
                products = [b.fmul(value, scale[i % 2]) for i, value in enumerate(values)]
            else:
                products = [w.fma(value, scale[i % 2], products[i]) for i, value in enumerate(values)]
        of_rows = [w.spread(w.load(each, w.integer(SCALE), w.f32)) for each in about]
        added = [w.fma(product, of_rows[i // 2], before[i]) for i, product in enumerate(products)]
        if self.has_least:
            least = self._both(scales, 2 * LANES, w.vector)
            totals = [w.spread(w.load(each, w.integer(SUM), w.f32)) for each in about]
            added = [w.fma(least[i % 2], totals[i // 2], each) for i, each in enumerate(added)]
        return added

    def _both(self, columns: Any, number: int, kind: Any) -> list[Any]:
        """Loads a column of the first sixteen rows of weights, and the same column of the other sixteen."""
        return [self.w.load(columns, self.w.integer(REGISTER * (number + half)), kind, REGISTER) for half in range(2)]
