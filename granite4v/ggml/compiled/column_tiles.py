"""Some rows of quantized weights, as columns, times tiles of activation rows.

A register holds quads of eight rows of weights twice: of an even step of the rows and of the next one, by turns. An
activation row has their counterparts side by side, so that it is loaded by pairs of quads. With two such registers a
tile of five rows needs half the loads of single rows: a core can do no more loads than multiplications. With one, less
memory is read and unpacked at a time, and what is fetched ahead of it stays in the first cache.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from granite4v.ggml.compiled.columns import (
    BLOCK,
    OFFSETS,
    QUADS,
    ColumnUnpacker,
    has_least,
    n_columns,
    n_parts,
    step,
    step_bytes,
)
from granite4v.ggml.compiled.writer import LANES, Writer

E = os.environ.get
REGISTER = 4 * LANES  # bytes
LINE = 64  # bytes
OF_REGISTER = LANES // 2  # rows of weights
CHUNK = int(E("CHUNK", "1024"))  # weights of a row that are unpacked at once, and stay in the first cache
# A record of an activation row, for two blocks: quads of integers by turns, and two each of: the scale, the sum, and
# the sums of the parts of the block times the offset of the weights.
ABOUT = 2 * BLOCK
SCALE, SUM, STARTS = 0, 8, 16
RECORD = ABOUT + 32


@dataclass(frozen=True)
class Call:
    """Tensors, numbers and places. `rounded`: the activation rows, of `row_size` bytes each; `sums`: memory of the
    thread."""

    target: Any
    weights: Any
    row_bytes: Any
    n_out: Any
    n_steps: Any
    n_pairs: Any
    rounded: Any
    row_size: Any
    sums: Any


class Tiles:
    """Writes the instructions. `width`: registers side by side; `most_rows`: activation rows of a tile, which keeps its
    sums in registers."""

    def __init__(self, writer: Writer, kind: str, call: Call, width: int, most_rows: int) -> None:
        self.w, self.kind, self.call, self.width, self.most_rows = writer, kind, call, width, most_rows
        self.n_outputs = OF_REGISTER * width
        self.n_blocks = step(kind) // BLOCK
        self.per_chunk = CHUNK // (2 * step(kind))  # pairs of steps
        self.columns = writer.on_stack(self.per_chunk * n_columns(kind) * width * REGISTER)

    def first_output(self, group: Any) -> Any:
        """The first row of weights of a group; the last group begins earlier where it would not be complete."""
        w, b = self.w, self.w.b
        return w.least(b.mul(group, w.integer(self.n_outputs)), b.sub(self.call.n_out, w.integer(self.n_outputs)))

    def multiply(self, first_output: Any, first_row: Any, n_rows: Any, next_output: Any) -> None:
        """A group of rows of weights with some activation rows, whose sums stay in memory from chunk to chunk.
        `next_output`: where the weights begin that are fetched from memory meanwhile."""
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        n_tiles = b.sdiv(b.add(n_rows, w.integer(self.most_rows - 1)), w.integer(self.most_rows))
        size = b.sdiv(n_rows, n_tiles)
        n_larger = b.sub(n_rows, b.mul(size, n_tiles))  # of one row more
        weights, ahead = (w.at(self.call.weights, (1, output)) for output in (first_output, next_output))
        with w.loop(zero, n_rows, one) as (row, _turn):
            for i in range(self.width):
                w.store(w.all(0.0), self._sums_of(row), w.integer(REGISTER * i), REGISTER)
        with w.loop(zero, self.call.n_pairs, w.integer(self.per_chunk)) as (first_pair, _turn):
            n_pairs = w.least(b.sub(self.call.n_pairs, first_pair), w.integer(self.per_chunk))
            with w.loop(zero, n_pairs, one) as (i, _turn):
                self._unpack(weights, ahead, b.add(first_pair, i), i)
            with w.loop(zero, n_tiles, one) as (tile, _turn):
                first = b.add(b.mul(tile, size), w.least(tile, n_larger))
                n = b.add(size, b.zext(b.icmp_signed("<", tile, n_larger), w.i64))
                self._multiply_tile(n, b.add(first_row, first), first_pair, n_pairs, self._sums_of(first))
        with w.loop(zero, n_rows, one) as (row, _turn):
            self._give(b.add(first_row, row), first_output, self._sums_of(row))

    # --- weights ---

    def _unpack(self, weights: Any, ahead: Any, pair: Any, slot: Any) -> None:
        """A pair of steps, by its number in the rows, to a slot of the columns. Where there is no second step, the first
        one takes its place, beside activations of zero."""
        w, b, n_bytes = self.w, self.w.b, step_bytes(self.kind)
        even = b.mul(pair, w.integer(2))
        has_odd = b.icmp_signed("<", b.add(even, w.integer(1)), self.call.n_steps)
        base = b.gep(weights, [b.mul(even, w.integer(n_bytes))])
        odd = b.gep(base, [b.select(has_odd, w.integer(n_bytes), w.integer(0))])
        target = b.gep(self.columns, [b.mul(slot, w.integer(n_columns(self.kind) * self.width * REGISTER))])
        with w.loop(w.integer(0), w.integer(self.width), w.integer(1)) as (i, _turn):
            first = b.mul(b.mul(i, w.integer(OF_REGISTER)), self.call.row_bytes)
            places = [b.add(first, b.mul(self.call.row_bytes, w.integer(row))) for row in range(OF_REGISTER)]
            rows = [b.gep(start, [place]) for place in places for start in (base, odd)]
            part = b.add(b.mul(pair, w.integer(self.width)), i)
            fetched = b.gep(ahead, [b.mul(part, w.integer(LANES * n_bytes))])
            to = b.gep(target, [b.mul(i, w.integer(REGISTER))])
            done = itertools.count(1)

            def keep(number: int, column: Any, fetched: Any = fetched, to: Any = to, done: Any = done) -> None:
                w.store(column, to, w.integer(self.width * REGISTER * number), REGISTER)
                self._fetch(fetched, next(done))

            self.unpacker.unpack(self.kind, rows, keep)

    @property
    def unpacker(self) -> ColumnUnpacker:
        return ColumnUnpacker(self.w)

    def _fetch(self, start: Any, n_done: int) -> None:
        """Some lines of the next weights, which are as many as these, after each column."""
        n_lines = -(-LANES * step_bytes(self.kind) // LINE)
        first, end = (n * n_lines // n_columns(self.kind) for n in (n_done - 1, n_done))
        for line in range(first, end):
            self.w.prefetch(self.w.b.gep(start, [self.w.integer(LINE * line + int(E("PFD", "0")))]), LINE, int(E("PFL", "3")))

    # --- products ---

    def _sums_of(self, row: Any) -> Any:
        return self.w.b.gep(self.call.sums, [self.w.b.mul(row, self.w.integer(self.width * REGISTER))])

    def _multiply_tile(self, n_rows: Any, first_row: Any, first_pair: Any, n_pairs: Any, sums_at: Any) -> None:
        """A chunk with up to `most_rows` activation rows."""
        w, b = self.w, self.w.b
        record = b.mul(first_pair, w.integer(self.n_blocks * RECORD))
        start = b.gep(self.call.rounded, [b.add(b.mul(first_row, self.call.row_size), record)])
        after = b.function.append_basic_block()
        blocks = [b.function.append_basic_block() for _ in range(self.most_rows)]
        which = b.switch(n_rows, blocks[-1])
        for i, block in enumerate(blocks[:-1]):
            which.add_case(w.integer(i + 1), block)
        for i, block in enumerate(blocks):
            b.position_at_end(block)
            rows = [b.gep(start, [b.mul(self.call.row_size, w.integer(r))]) for r in range(i + 1)]
            self._multiply_rows(rows, n_pairs, sums_at)
            b.branch(after)
        b.position_at_end(after)

    def _multiply_rows(self, rows: Sequence[Any], n_pairs: Any, sums_at: Any) -> None:
        """`rows`: their first records."""
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        n = self.width * len(rows)
        n_quads, n_scales = step(self.kind) // 4, self.n_blocks * n_parts(self.kind)
        before = [w.load(sums_at, w.integer(REGISTER * i), w.vector, REGISTER) for i in range(n)]
        with w.loop(zero, n_pairs, one, before) as (pair, sums):
            size = w.integer(n_columns(self.kind) * self.width * REGISTER)
            columns = b.gep(self.columns, [b.mul(pair, size)])
            with w.loop(zero, w.integer(self.n_blocks), one, sums) as (i, added):
                block = b.add(b.mul(pair, w.integer(self.n_blocks)), i)
                records = [b.gep(row, [b.mul(block, w.integer(RECORD))]) for row in rows]
                quads = self._columns(columns, i, 0, QUADS, w.whole)
                scales = self._columns(columns, i, n_quads, n_parts(self.kind), w.vector)
                least = self._columns(columns, i, n_quads + n_scales, 1, w.vector)
                added[:] = self._added(added, records, quads, scales, least)
            sums[:] = added
        for i, total in enumerate(sums):
            w.store(total, sums_at, w.integer(REGISTER * i), REGISTER)

    def _columns(self, columns: Any, block: Any, first: int, n: int, kind: Any) -> Callable[[int], list[Any]]:
        """The registers of the i-th column of a block, which has `n` such ones, those of all blocks from `first` on."""
        w, b, size = self.w, self.w.b, self.width * REGISTER
        start = b.gep(columns, [b.add(b.mul(block, w.integer(n * size)), w.integer(first * size))])
        return lambda i: [w.load(start, w.integer(size * i + REGISTER * k), kind, REGISTER) for k in range(self.width)]

    def _added(self, before: Sequence[Any], records: Sequence[Any], quads: Any, scales: Any, least: Any) -> list[Any]:
        """The sums of some rows after a block."""
        w, b = self.w, self.w.b
        parts = [self._products(records, quads, part) for part in range(n_parts(self.kind))]
        factors = [scales(part) for part in range(n_parts(self.kind))]
        minima = least(0) if has_least(self.kind) else []
        after = []
        for i, value in enumerate(before):
            row, k = divmod(i, self.width)
            numbers = [b.sitofp(found[i], w.vector) for found in parts]
            product = b.fmul(numbers[0], factors[0][k])
            for number, factor in zip(numbers[1:], factors[1:], strict=True):
                product = w.fma(number, factor[k], product)
            value = w.fma(product, self._twice(records[row], ABOUT + SCALE, w.f32), value)
            if minima:
                value = w.fma(minima[k], self._twice(records[row], ABOUT + SUM, w.f32), value)
            after.append(value)
        return after

    def _products(self, records: Sequence[Any], quads: Any, part: int) -> list[Any]:
        """Of integers of a part of a block."""
        w, n = self.w, QUADS // n_parts(self.kind)
        zero = w.integers([0] * LANES, w.i32)
        found = []
        for record in records:
            start = self._twice(record, ABOUT + STARTS + 8 * part, w.i32) if self.kind in OFFSETS else zero
            found += [start] * self.width
        for number in range(n * part, n * (part + 1)):
            weights = quads(number)
            for row, record in enumerate(records):
                numbers = self._twice(record, 8 * number, w.i32)
                for k in range(self.width):
                    i = self.width * row + k
                    found[i] = w.fours_added(found[i], weights[k], numbers)
        return found

    def _twice(self, record: Any, at: int, kind: Any) -> Any:
        """Two numbers by turns."""
        both = self.w.load(record, self.w.integer(at), self.w.ir.VectorType(kind, 2), 8)
        return self.w.picked(both, [0, 1] * (LANES // 2))

    def _give(self, row: Any, first_output: Any, sums: Any) -> None:
        """Stores the products of an activation row."""
        w, b = self.w, self.w.b
        out = b.gep(w.at(self.call.target, (1, row)), [b.mul(first_output, w.integer(4))])
        for i in range(self.width):
            both = w.load(sums, w.integer(REGISTER * i), w.vector, REGISTER)
            even, odd = (w.picked(both, range(first, LANES, 2)) for first in (0, 1))
            w.store(b.fadd(even, odd), out, w.integer(4 * OF_REGISTER * i))
