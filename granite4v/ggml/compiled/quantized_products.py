"""Products of quantized weights with any number of activation rows, for CPUs with AVX-512 VNNI.

Activation rows are rounded to 8-bit integers with one scale for 32 numbers, which is finer than what ggml does for
K-quants (256), and products of integers are exact. Weights stay in the mapped file, and are unpacked for as many
activation rows as fit into the second cache. A product is the sum of two partial sums, over the even and over the odd
steps of a row, each added up block by block in float32. That order is the same for every number of rows and threads, so
the values of a row have the same bits whatever is computed beside it.
"""

from __future__ import annotations

from typing import Any

from granite4v.ggml.compiled.column_tiles import ABOUT, RECORD, REGISTER, SCALE, STARTS, SUM, Call, Direct, Tiles
from granite4v.ggml.compiled.columns import BLOCK, KINDS, OFFSETS, larger, n_parts, places, step
from granite4v.ggml.compiled.meeting import Meeting
from granite4v.ggml.compiled.writer import LANES, Writer

__all__ = ["KINDS", "LEAST_OUTPUTS", "QuantizedProducts"]

# the most activation rows for which multiplying weights as they are unpacked is faster
MOST_DIRECT = {"Q4_K": 4, "Q5_K": 4, "Q6_K": 2, "Q8_0": 6, "Q4_0": 6}
MOST_OWN = 8  # up to this many activation rows, each thread rounds all of them
WIDTH, ROWS = 2, 5  # registers and activation rows of a tile: with more, LLVM spills the sums
LEAST_OUTPUTS = 32  # rows of weights; fewer are left to ggml
CACHED = 512 << 10  # 8-bit activations that stay in the L2 cache while all weights pass
TOP_ROWS = 320  # the most activation rows of one pass
LOW_ROWS = 40  # the fewest, if there are as many
SHARES = 8  # minimum shares per thread, if there is enough work


class QuantizedProducts:
    """Writes the operations, one for each type of weights."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer

    def write(self, kind: str) -> Any:
        """void (*ggml_custom_op_t)(struct ggml_tensor * dst, int ith, int nth, void * userdata)"""
        w = self.w
        self.kind = kind
        function = w.begin(f"multiply_{kind}", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        target, ith, nth, _ = function.args
        b = w.b
        weights, self.x = (w.field(target, "src", i, w.bytes) for i in range(2))
        self.n_in, n_rows = w.field(self.x, "ne", 0), w.field(self.x, "ne", 1)
        n_steps = b.sdiv(self.n_in, w.integer(step(kind)))
        n_pairs = b.sdiv(b.add(n_steps, w.integer(1)), w.integer(2))
        # one extra record, so that rows are never whole pages apart: they would compete for the same cache sets
        row_size = b.mul(b.add(b.mul(n_pairs, w.integer(step(kind) // BLOCK)), w.integer(1)), w.integer(RECORD))
        ith, nth = b.sext(ith, w.i64), b.sext(nth, w.i64)
        meeting = Meeting(w, target, ith, nth)
        self.call = Call(
            target=target,
            weights=weights,
            row_bytes=w.field(weights, "nb", 1),
            n_out=w.field(weights, "ne", 1),
            n_steps=n_steps,
            n_pairs=n_pairs,
            row_size=row_size,
            sums=w.on_stack(TOP_ROWS * WIDTH * REGISTER),
        )
        own_room = self._round_rows(meeting, n_rows, b.mul(n_rows, row_size), ith, nth)
        few = Direct(w, kind, self.call, 1, MOST_DIRECT[kind])
        many = Tiles(w, kind, self.call, WIDTH, ROWS)
        with b.if_else(b.icmp_signed("<=", n_rows, w.integer(few.most_rows))) as (are_few, are_many):
            with are_few:
                self._share(meeting, few, n_rows, nth)
            with are_many:
                self._share(meeting, many, n_rows, nth)
        meeting.free(own_room)
        meeting.leave()
        w.b.ret_void()
        return function

    def _round_rows(self, meeting: Meeting, n_rows: Any, n_bytes: Any, ith: Any, nth: Any) -> Any:
        """Rounds the activation rows. Each thread rounds a few rows for itself: waiting for the others would take
        longer, especially if one of them is not running. Returns the memory to free."""
        w, b = self.w, self.w.b
        is_own = b.icmp_signed("<=", n_rows, w.integer(MOST_OWN))
        rooms = []
        with b.if_else(is_own) as (own, shared):
            with own:
                rooms.append((*meeting.own_room(n_bytes), b.block))
            with shared:
                rooms.append((meeting.room(n_bytes), w.ir.Constant(w.bytes, None), b.block))
        self.call.rounded, own_room = b.phi(w.bytes), b.phi(w.bytes)
        for room, to_free, block in rooms:
            self.call.rounded.add_incoming(room, block)
            own_room.add_incoming(to_free, block)
        first, distance = (b.select(is_own, w.integer(one), other) for one, other in ((0, ith), (1, nth)))
        with w.loop(first, n_rows, distance) as (row, _turn):
            self._round_row(row)
        with b.if_then(b.not_(is_own)):
            meeting.wait_for_all()
        return own_room

    def _share(self, meeting: Meeting, tiles: Direct | Tiles, n_rows: Any, n_threads: Any) -> None:
        """A share is a run of neighbouring rows of weights, which memory delivers fastest, and some activation rows."""
        w, b, one = self.w, self.w.b, self.w.integer(1)
        n_groups = b.sdiv(b.add(self.call.n_out, w.integer(tiles.n_outputs - 1)), w.integer(tiles.n_outputs))
        at_once = self._rows_at_once(n_rows, n_groups, n_threads, tiles.most_rows)
        n_passes = b.sdiv(b.add(n_rows, b.sub(at_once, one)), at_once)
        n_runs = w.least(n_groups, b.mul(n_threads, w.integer(SHARES)))

        def first_group(share: Any) -> Any:
            return b.sdiv(b.mul(n_groups, b.srem(share, n_runs)), n_runs)

        with meeting.shares(b.mul(n_runs, n_passes)) as (share, following):
            first_row = b.mul(b.sdiv(share, n_runs), at_once)
            end = b.sdiv(b.mul(n_groups, b.add(b.srem(share, n_runs), one)), n_runs)
            with w.loop(first_group(share), end, one) as (group, _turn):
                is_last = b.icmp_signed("==", b.add(group, one), end)
                next_group = b.select(is_last, first_group(following), b.add(group, one))
                n = w.least(b.sub(n_rows, first_row), at_once)
                tiles.multiply(tiles.first_output(group), first_row, n, tiles.first_output(next_group))

    def _rows_at_once(self, n_rows: Any, n_groups: Any, n_threads: Any, of_tile: int) -> Any:
        """As many as stay in a core's cache, or fewer, so that every thread has some shares."""
        w, b = self.w, self.w.b
        most = w.least(b.sdiv(w.integer(CACHED), self.n_in), w.integer(TOP_ROWS))
        most = w.least(most, b.sdiv(b.mul(n_rows, n_groups), b.mul(n_threads, w.integer(SHARES))))
        whole = b.mul(b.sdiv(most, w.integer(of_tile)), w.integer(of_tile))
        return b.select(b.icmp_signed("<", whole, w.integer(LOW_ROWS)), w.integer(LOW_ROWS), whole)

    # --- activations ---

    def _round_row(self, row: Any) -> None:
        """Records of two blocks each, one of an even step and one of the next step, or zeros after the last one."""
        w, b, one = self.w, self.w.b, self.w.integer(1)
        n_blocks, n_bytes = w.integer(step(self.kind) // BLOCK), w.integer(4 * BLOCK)
        source, target = w.at(self.x, (1, row)), b.gep(self.call.rounded, [b.mul(row, self.call.row_size)])
        with w.loop(w.integer(0), self.call.n_pairs, one) as (pair, _turn):
            even = b.mul(pair, w.integer(2))
            has_odd = b.icmp_signed("<", b.add(even, one), self.call.n_steps)
            odd = b.select(has_odd, b.add(even, one), even)
            with w.loop(w.integer(0), n_blocks, one) as (i, _turn):
                starts = [b.mul(b.add(b.mul(number, n_blocks), i), n_bytes) for number in (even, odd)]
                blocks = [
                    [w.load(source, b.add(start, w.integer(REGISTER * half)), w.vector) for half in range(2)]
                    for start in starts
                ]
                blocks[1] = [b.select(has_odd, value, w.all(0.0)) for value in blocks[1]]
                place, offset = self._place_and_offset(i)
                record = b.mul(b.add(b.mul(pair, n_blocks), place), w.integer(RECORD))
                self._write_record(b.gep(target, [record]), blocks, offset)

    def _place_and_offset(self, block: Any) -> tuple[Any, Any]:
        """Of a block of a step: which one it is among the unpacked ones, and the offset of its weights."""
        w, b = self.w, self.w.b
        found = w.integer(0), w.integer(OFFSETS.get(self.kind, 0), w.i32)
        if all(place == i and larger(self.kind, i) == 1 for i, place in enumerate(places(self.kind))):
            return block, found[1]
        for i, place in enumerate(places(self.kind)):
            offset = OFFSETS.get(self.kind, 0) * larger(self.kind, place)
            is_it = b.icmp_signed("==", block, w.integer(place))
            found = b.select(is_it, w.integer(i), found[0]), b.select(is_it, w.integer(offset, w.i32), found[1])
        return found

    def _write_record(self, record: Any, blocks: list[list[Any]], offset: Any) -> None:
        w, b = self.w, self.w.b
        quads = []
        for i, values in enumerate(blocks):
            integers, scale, total = w.as_integers(values)
            as_bytes = [b.trunc(each, w.ir.VectorType(w.i8, LANES)) for each in integers]
            quads.append(
                b.bitcast(w.picked(as_bytes[0], range(BLOCK), as_bytes[1]), w.ir.VectorType(w.i32, BLOCK // 4))
            )
            w.store(scale, record, w.integer(ABOUT + SCALE + 4 * i))
            w.store(b.fmul(b.sitofp(total, w.f32), scale), record, w.integer(ABOUT + SUM + 4 * i))
            totals = [w.whole_total(each) for each in integers] if n_parts(self.kind) == 2 else [total]
            for part, each in enumerate(totals):
                w.store(b.mul(each, offset), record, w.integer(ABOUT + STARTS + 8 * part + 4 * i))
        by_turns = [n for i in range(BLOCK // 4) for n in (i, BLOCK // 4 + i)]
        w.store(w.picked(quads[0], by_turns, quads[1]), record, w.integer(0), 32)
