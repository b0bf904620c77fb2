"""Products of quantized weights with any number of activation rows, for CPUs with AVX-512 VNNI.

Weights stay in the mapped file. 32 rows of them are unpacked at a time (`columns`), as two registers of 16 lanes, one
lane for each row of weights. Activation rows are rounded to 8-bit integers with one scale for 32 numbers, which is finer
than what ggml does for K-quants (256), and products of integers are exact.

- Few rows: 32 weights of 32 rows are held in 16 registers, and all activation rows are multiplied with them in turn.
  Threads take runs of neighbouring weights, which memory delivers fastest.
- Many rows: some hundred weights are unpacked to the first cache and multiplied with tiles of 5 activation rows, which
  need half the loads of single ones. A core can do no more loads than multiplications.

Both do the same arithmetic in the same order, so the values of a row are the same to the bit however many rows there
are, whatever they hold, and for every number of threads.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from granite4v.ggml.compiled.columns import (
    BLOCK,
    KINDS,
    OFFSETS,
    QUADS,
    ColumnUnpacker,
    has_least,
    n_columns,
    n_parts,
    step,
    step_bytes,
)
from granite4v.ggml.compiled.meeting import Meeting
from granite4v.ggml.compiled.writer import LANES, Writer

__all__ = ["KINDS", "OUTPUTS", "QuantizedProducts"]

REGISTER = 4 * LANES  # bytes
W = int(os.environ.get('W', '1'))
OUTPUTS = W * LANES  # rows of weights that are unpacked together
ROWS = int(os.environ.get('ROWS', '8'))  # of a tile: with more, LLVM keeps sums in memory
CHUNK = int(os.environ.get('CHUNK', '512'))  # weights of a row that are unpacked at once, and stay in the first cache of a core
CACHED = 512 << 10  # bytes of rows as integers that stay in the second one while all weights pass
LOW_ROWS, TOP_ROWS = 8 * ROWS, 64 * ROWS  # that are taken at once
SHARES = int(os.environ.get('SHARES', '8'))  # of each thread, at least, where there is work enough
# What is kept of a block of a row next to its integers: its scale, its sum, and the sums of its parts times the offset
# of the weights.
SCALE, SUM, STARTS, ABOUT = 0, 4, 8, 16


@dataclass(frozen=True)
class Weights:
    """Of a block of `OUTPUTS` rows of weights, two registers each: quads by their number, scales by their part."""

    quads: Callable[[int], list[Any]]
    scales: Callable[[int], list[Any]]
    least: Callable[[int], list[Any]]


class QuantizedProducts:
    """Writes the operations, one for each type of weights."""

    def __init__(self, writer: Writer) -> None:
        self.w, self.unpacker = writer, ColumnUnpacker(writer)

    def write(self, kind: str) -> Any:
        """void (*ggml_custom_op_t)(struct ggml_tensor * dst, int ith, int nth, void * userdata)"""
        w = self.w
        self.kind, self.step_size = kind, n_columns(kind) * W * REGISTER
        function = w.begin(f"multiply_{kind}", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        self.target, ith, nth, _ = function.args
        b = w.b
        self.weights, self.x = (w.field(self.target, "src", i, w.bytes) for i in range(2))
        n_in, self.n_out, n_rows = w.field(self.x, "ne", 0), w.field(self.weights, "ne", 1), w.field(self.x, "ne", 1)
        self.n_blocks, self.n_steps = b.sdiv(n_in, w.integer(BLOCK)), b.sdiv(n_in, w.integer(step(kind)))
        self.row_bytes = w.field(self.weights, "nb", 1)
        ith, nth = b.sext(ith, w.i64), b.sext(nth, w.i64)
        self.columns = w.on_stack(CHUNK // step(kind) * self.step_size)
        self.sums = w.on_stack(TOP_ROWS * W * REGISTER)
        n_integers = b.mul(n_rows, n_in)
        meeting = Meeting(w, self.target, ith, nth)
        self.integers = meeting.room(b.add(n_integers, b.mul(b.mul(n_rows, self.n_blocks), w.integer(ABOUT))))
        self.about = b.gep(self.integers, [n_integers])
        with w.loop(ith, n_rows, nth) as (row, _turn):
            self._round_row(w.at(self.x, (1, row)), row)
        meeting.wait_for_all()
        self.groups = b.sdiv(b.add(self.n_out, w.integer(OUTPUTS - 1)), w.integer(OUTPUTS))
        at_once = self._rows_at_once(n_in, n_rows, nth)
        n_passes = b.sdiv(b.add(n_rows, b.sub(at_once, w.integer(1))), at_once)
        n_runs = self._least(self.groups, b.mul(nth, w.integer(SHARES)))

        def first_group(share: Any) -> Any:
            return b.sdiv(b.mul(self.groups, b.srem(share, n_runs)), n_runs)

        with meeting.shares(b.mul(n_runs, n_passes)) as (share, following):
            run = b.srem(share, n_runs)
            start = b.mul(b.sdiv(share, n_runs), at_once)
            n = self._least(b.sub(n_rows, start), at_once)
            end = b.sdiv(b.mul(self.groups, b.add(run, w.integer(1))), n_runs)
            with w.loop(first_group(share), end, w.integer(1)) as (group, _turn):
                after = b.add(group, w.integer(1))
                after = b.select(b.icmp_signed("<", after, end), after, first_group(following))
                self.ahead = self._weights_of(after)
                self._multiply(self._first_output(group), start, n)
        meeting.leave()
        w.b.ret_void()
        return function

    def _weights_of(self, group: Any) -> Any:
        return self.w.at(self.weights, (1, self._first_output(group)))

    def _first_output(self, group: Any) -> Any:
        """The first row of weights of a share; the last ones begin earlier where they would not be complete."""
        w, b = self.w, self.w.b
        return self._least(b.mul(group, w.integer(OUTPUTS)), b.sub(self.n_out, w.integer(OUTPUTS)))

    def _least(self, x: Any, y: Any) -> Any:
        return self.w.b.select(self.w.b.icmp_signed("<", x, y), x, y)

    def _rows_at_once(self, n_in: Any, n_rows: Any, n_threads: Any) -> Any:
        """As many as stay in a core's cache, or fewer, so that every thread has some shares."""
        w, b = self.w, self.w.b
        most = self._least(b.sdiv(w.integer(CACHED), n_in), w.integer(TOP_ROWS))
        most = self._least(most, b.sdiv(b.mul(n_rows, self.groups), b.mul(n_threads, w.integer(SHARES))))
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
            offset = w.integer(OFFSETS.get(self.kind, 0), w.i32)
            totals = [w.whole_total(each) for each in integers] if n_parts(self.kind) == 2 else [total]
            for i, each in enumerate(totals):
                w.store(b.mul(each, offset), about, w.integer(STARTS + 4 * i))

    # --- weights ---

    def _unpack(self, first_output: Any, number: Any, slot: Any) -> None:
        """A step of `OUTPUTS` rows of weights, by its number in the rows, to a slot of the columns: those of the first
        sixteen rows and of the others by turns."""
        w, b = self.w, self.w.b
        n_bytes = step_bytes(self.kind)
        base = b.gep(w.at(self.weights, (1, first_output)), [b.mul(number, w.integer(n_bytes))])
        target = b.gep(self.columns, [b.mul(slot, w.integer(self.step_size))])
        with w.loop(w.integer(0), w.integer(W), w.integer(1)) as (half, _turn):
            start = b.gep(base, [b.mul(b.mul(half, w.integer(LANES)), self.row_bytes)])
            rows = [b.gep(start, [b.mul(self.row_bytes, w.integer(i))]) for i in range(LANES)]
            part = b.add(b.mul(number, w.integer(W)), half)
            ahead = b.gep(self.ahead, [b.mul(part, w.integer(LANES * n_bytes))])
            to = b.gep(target, [b.mul(half, w.integer(REGISTER))])

            done = itertools.count()

            def keep(i: int, column: Any) -> None:
                w.store(column, to, w.integer(W * REGISTER * i), REGISTER)
                n = next(done)
                K = int(os.environ.get("NEAR", "0"))
                if K:
                    if n == 0:
                        pos = b.add(number, w.integer(K))
                        wraps = b.icmp_signed(">=", pos, self.n_steps)
                        pos2 = b.select(wraps, b.sub(pos, self.n_steps), pos)
                        base2 = b.select(wraps, self.ahead, w.at(self.weights, (1, first_output)))
                        self.near = b.gep(base2, [b.add(b.mul(pos2, w.integer(n_bytes)), b.mul(b.mul(half, w.integer(LANES)), self.row_bytes))])
                    per = -(-n_bytes // 64) + (1 if os.environ.get("NEARX") else 0)
                    lines, columns = per * LANES, n_columns(self.kind)
                    for line in range(n * lines // columns, (n + 1) * lines // columns):
                        r, l = divmod(line, per)
                        w.prefetch(b.gep(self.near, [b.add(b.mul(self.row_bytes, w.integer(r)), w.integer(min(64 * l, n_bytes - 1)))]), 64, int(os.environ.get("PFL", "3")))
                    return
                lines, columns = -(-LANES * n_bytes // 64), n_columns(self.kind)
                for line in range(n * lines // columns, (n + 1) * lines // columns):
                    E = os.environ.get
                    D = int(E("PFD", "0"))
                    if E("PFL") != "-1":
                        w.prefetch(b.gep(ahead, [w.integer(64 * line + D)]), 64, int(E("PFL", "3")))
                    if E("TOUCH"):
                        touched = w.load(ahead, w.integer(64 * line), w.i64, 1)
                        b.asm(w.ir.FunctionType(w.ir.VoidType(), [w.i64]), "", "r,~{memory}", [touched], side_effect=True)

            self.unpacker.unpack(self.kind, rows, keep)

    def _block(self, slot: Any, block: Any) -> tuple[Any, Any, Any]:
        """Where the quads, the scales, and what is added are of a block of an unpacked step."""
        w, b = self.w, self.w.b
        n_quads, n_scales = step(self.kind) // 4, step(self.kind) // BLOCK * n_parts(self.kind)
        start = b.gep(self.columns, [b.mul(slot, w.integer(self.step_size))])

        def place(first: int, n: int) -> Any:
            return b.gep(start, [b.add(b.mul(block, w.integer(n * W * REGISTER)), w.integer(first * W * REGISTER))])

        return place(0, QUADS), place(n_quads, n_parts(self.kind)), place(n_quads + n_scales, 1)

    # --- rows ---

    def _multiply(self, first_output: Any, start: Any, n_rows: Any) -> None:
        """`OUTPUTS` rows of weights with some activation rows, whose sums stay in memory from chunk to chunk."""
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        per_chunk = w.integer(CHUNK // step(self.kind))
        n_tiles = b.sdiv(b.add(n_rows, w.integer(ROWS - 1)), w.integer(ROWS))
        size = b.sdiv(n_rows, n_tiles)
        n_larger = b.sub(n_rows, b.mul(size, n_tiles))  # of one row more
        with w.loop(zero, n_rows, one) as (row, _turn):
            for half in range(W):
                w.store(w.all(0.0), self._sums_of(row), w.integer(REGISTER * half), REGISTER)
        with w.loop(zero, self.n_steps, per_chunk) as (first_step, _turn):
            n = self._least(b.sub(self.n_steps, first_step), per_chunk)
            with w.loop(zero, n, one) as (i, _turn):
                if not os.environ.get('SKIPU'): self._unpack(first_output, b.add(first_step, i), i)
            w.b.asm(w.ir.FunctionType(w.ir.VoidType(), [w.bytes]), '', 'r,~{memory}', [self.columns], side_effect=True)
            with w.loop(zero, zero if os.environ.get('SKIPT') else n_tiles, one) as (tile, _turn):
                first = b.add(b.mul(tile, size), self._least(tile, n_larger))
                has_more = b.zext(b.icmp_signed("<", tile, n_larger), w.i64)
                self._multiply_tile(b.add(size, has_more), b.add(start, first), first_step, n, self._sums_of(first))
        with w.loop(zero, n_rows, one) as (row, _turn):
            self._give(b.add(start, row), first_output, self._sums_of(row))

    def _sums_of(self, row: Any) -> Any:
        return self.w.b.gep(self.sums, [self.w.b.mul(row, self.w.integer(W * REGISTER))])

    def _multiply_tile(self, n_rows: Any, first: Any, first_step: Any, n_steps: Any, sums_at: Any) -> None:
        """A chunk of `OUTPUTS` rows of weights with up to `ROWS` activation rows."""
        w, b = self.w, self.w.b
        after = b.function.append_basic_block()
        blocks = [b.function.append_basic_block() for _ in range(ROWS)]
        which = b.switch(n_rows, blocks[-1])
        for i, block in enumerate(blocks[:-1]):
            which.add_case(w.integer(i + 1), block)
        for i, block in enumerate(blocks):
            b.position_at_end(block)
            self._multiply_rows(i + 1, first, first_step, n_steps, sums_at)
            b.branch(after)
        b.position_at_end(after)

    def _multiply_rows(self, n_rows: int, first: Any, first_step: Any, n_steps: Any, sums_at: Any) -> None:
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        n_blocks = w.integer(step(self.kind) // BLOCK)
        begin = b.mul(first_step, n_blocks)
        places = [b.add(b.mul(b.add(first, w.integer(r)), self.n_blocks), begin) for r in range(n_rows)]
        rows = [b.gep(self.integers, [b.mul(place, w.integer(BLOCK))]) for place in places]
        abouts = [b.gep(self.about, [b.mul(place, w.integer(ABOUT))]) for place in places]
        before = [w.load(sums_at, w.integer(REGISTER * i), w.vector, REGISTER) for i in range(W * n_rows)]
        with w.loop(zero, n_steps, one, before) as (i, sums):
            with w.loop(zero, n_blocks, one, sums) as (j, added):
                block = b.add(b.mul(i, n_blocks), j)
                numbers = [b.gep(row, [b.mul(block, w.integer(BLOCK))]) for row in rows]
                about = [b.gep(each, [b.mul(block, w.integer(ABOUT))]) for each in abouts]
                added[:] = self._added(added, self._at(*self._block(i, j)), numbers, about)
            sums[:] = added
        for i, total in enumerate(sums):
            w.store(total, sums_at, w.integer(REGISTER * i), REGISTER)

    # --- arithmetic ---

    def _at(self, quads: Any, scales: Any, least: Any) -> Weights:
        """Weights of a block that are loaded when they are used."""

        def both(columns: Any, kind: Any) -> Callable[[int], list[Any]]:
            return lambda i: [
                self.w.load(columns, self.w.integer(REGISTER * (W * i + half)), kind, REGISTER) for half in range(W)
            ]

        return Weights(both(quads, self.w.whole), both(scales, self.w.vector), both(least, self.w.vector))

    def _added(
        self, before: Sequence[Any], weights: Weights, numbers: Sequence[Any], about: Sequence[Any]
    ) -> list[Any]:
        """The sums of some rows, two vectors each, after a block. `numbers`, `about`: where each row's are."""
        w, b = self.w, self.w.b
        n = QUADS // n_parts(self.kind)
        n_parts_here = n_parts(self.kind)
        found = [self._part(i, weights, numbers, about) for i in range(n_parts_here)]
        least = weights.least(0) if has_least(self.kind) else None
        after = []
        for i, value in enumerate(before):
            row, half = divmod(i, W)
            product = None
            for part in range(n_parts_here):
                number, scale = b.sitofp(found[part][i], w.vector), weights.scales(part)[half]
                product = b.fmul(number, scale) if product is None else w.fma(number, scale, product)
            value = w.fma(product, w.spread(w.load(about[row], w.integer(SCALE), w.f32)), value)
            if least is not None:
                value = w.fma(least[half], w.spread(w.load(about[row], w.integer(SUM), w.f32)), value)
            after.append(value)
        return after

    def _part(self, part: int, weights: Weights, numbers: Sequence[Any], about: Sequence[Any]) -> list[Any]:
        w = self.w
        n = QUADS // n_parts(self.kind)
        if self.kind in OFFSETS:
            found = [w.spread(w.load(each, w.integer(STARTS + 4 * part), w.i32)) for each in about for _ in range(W)]
        else:
            found = [w.integers([0] * LANES, w.i32)] * (W * len(about))
        for quad in range(n * part, n * (part + 1)):
            of_weights = weights.quads(quad)
            for r, at in enumerate(numbers):
                of_row = w.spread(w.load(at, w.integer(4 * quad), w.i32, 1))
                for half in range(W):
                    found[W * r + half] = w.fours_added(found[W * r + half], of_weights[half], of_row)
        return found

    def _give(self, row: Any, first_output: Any, sums: Any) -> None:
        """Stores the products of an activation row with `OUTPUTS` rows of weights."""
        w, b = self.w, self.w.b
        out = b.gep(w.at(self.target, (1, row)), [b.mul(first_output, w.integer(4))])
        for half in range(W):
            w.store(w.load(sums, w.integer(REGISTER * half), w.vector, REGISTER), out, w.integer(REGISTER * half))
