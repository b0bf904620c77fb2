"""Multiplies quantized weights, unpacked as columns, with tiles of activation rows.

A register holds quads (4 numbers) of eight rows of weights, alternating between an even step of a row and the next
step. Activation rows are stored in the same order, so one load brings both quads. Eight rows of weights rather than
sixteen stay closer together in memory, so that prefetched lines stay in L1. CPUs drop prefetches when too many are
outstanding, so each line is prefetched two or three times.

A tile of five activation rows and two registers of weights needs half the loads of single rows; a core can issue no
more loads than multiplications. For very few activation rows, each register is multiplied as soon as it is unpacked,
which saves storing and reloading it.
"""

from __future__ import annotations

import itertools
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

REGISTER = 4 * LANES  # bytes
LINE = 64  # bytes
OF_REGISTER = LANES // 2  # rows of weights
CHUNK = 512  # weights of a row that are unpacked at once, and stay in the first cache
# A record of an activation row, for two blocks: quads of integers by turns, and two each of: the scale, the sum, and
# the sums of the parts of the block times the offset of the weights.
ABOUT = 2 * BLOCK
SCALE, SUM, STARTS = 0, 8, 16
RECORD = ABOUT + 32


@dataclass
class Call:
    """Values of one call of an operation. `sums`: memory of the thread; `rounded`: the activation rows, of `row_size`
    bytes each."""

    target: Any
    weights: Any
    row_bytes: Any
    n_out: Any
    n_steps: Any
    n_pairs: Any
    row_size: Any
    sums: Any
    rounded: Any = None


class Group:
    """Writes the instructions for a group of weight rows. `width`: registers side by side; `most_rows`: the most
    activation rows of a tile, whose sums stay in registers; `distances`: prefetch offsets in bytes from the start of
    the next group."""

    distances: Sequence[int] = ()

    def __init__(self, writer: Writer, kind: str, call: Call, width: int, most_rows: int) -> None:
        self.w, self.kind, self.call, self.width, self.most_rows = writer, kind, call, width, most_rows
        self.n_outputs = OF_REGISTER * width
        self.n_blocks = step(kind) // BLOCK

    def first_output(self, group: Any) -> Any:
        """The first row of weights of a group; the last group begins earlier where it would not be complete."""
        w, b = self.w, self.w.b
        return w.least(b.mul(group, w.integer(self.n_outputs)), b.sub(self.call.n_out, w.integer(self.n_outputs)))

    # --- weights ---

    def _unpack(self, weights: Any, pair: Any, i: Any, keep: Callable[[int, Any], None]) -> None:
        """Unpacks the i-th register's part of a pair of steps. If a row ends with an even step, that step is read
        twice, and its copy is multiplied with zeros."""
        w, b, n_bytes = self.w, self.w.b, step_bytes(self.kind)
        even = b.mul(pair, w.integer(2))
        has_odd = b.icmp_signed("<", b.add(even, w.integer(1)), self.call.n_steps)
        base = b.gep(
            weights,
            [b.add(b.mul(even, w.integer(n_bytes)), b.mul(b.mul(i, w.integer(OF_REGISTER)), self.call.row_bytes))],
        )
        odd = b.gep(base, [b.select(has_odd, w.integer(n_bytes), w.integer(0))])
        places = [b.mul(self.call.row_bytes, w.integer(row)) for row in range(OF_REGISTER)]
        ColumnUnpacker(w).unpack(self.kind, [b.gep(start, [place]) for place in places for start in (base, odd)], keep)

    def _fetch(self, start: Any, n_done: int) -> None:
        """Prefetches the next group's share of lines after column `n_done`."""
        w, b = self.w, self.w.b
        n_lines = -(-LANES * step_bytes(self.kind) // LINE)
        first, end = (n * n_lines // n_columns(self.kind) for n in (n_done - 1, n_done))
        for line in range(first, end):
            for distance in self.distances:
                w.prefetch(b.gep(start, [w.integer(LINE * line + distance)]), LINE)

    # --- products ---

    def _start(self, record: Any, part: int) -> Any:
        if self.kind not in OFFSETS:
            return self.w.integers([0] * LANES, self.w.i32)
        return self._twice(record, ABOUT + STARTS + 8 * part, self.w.i32)

    def _added(self, before: Any, record: Any, numbers: Sequence[Any], scales: Sequence[Any], least: Any) -> Any:
        """Returns a sum after adding a block. `numbers`, `scales`: of its parts."""
        w, b = self.w, self.w.b
        product = b.fmul(b.sitofp(numbers[0], w.vector), scales[0])
        for number, scale in zip(numbers[1:], scales[1:], strict=True):
            product = w.fma(b.sitofp(number, w.vector), scale, product)
        value = w.fma(product, self._twice(record, ABOUT + SCALE, w.f32), before)
        return value if least is None else w.fma(least, self._twice(record, ABOUT + SUM, w.f32), value)

    def _twice(self, record: Any, at: int, kind: Any) -> Any:
        """Loads two numbers and repeats them alternately in all lanes."""
        both = self.w.load(record, self.w.integer(at), self.w.ir.VectorType(kind, 2), 8)
        return self.w.picked(both, [0, 1] * (LANES // 2))

    def _give(self, row: Any, first_output: Any, sums: Sequence[Any]) -> None:
        """Stores the products of an activation row."""
        w, b = self.w, self.w.b
        out = b.gep(w.at(self.call.target, (1, row)), [b.mul(first_output, w.integer(4))])
        for i, both in enumerate(sums):
            even, odd = (w.picked(both, range(first, LANES, 2)) for first in (0, 1))
            w.store(b.fadd(even, odd), out, w.integer(4 * OF_REGISTER * i))


def switch(w: Writer, value: Any, most: int, write: Callable[[int], None]) -> None:
    """Writes a switch with one branch for each value from 1 to `most`."""
    after = w.b.function.append_basic_block()
    blocks = [w.b.function.append_basic_block() for _ in range(most)]
    which = w.b.switch(value, blocks[-1])
    for i, block in enumerate(blocks):
        if i < most - 1:
            which.add_case(w.integer(i + 1), block)
        w.b.position_at_end(block)
        write(i + 1)
        w.b.branch(after)
    w.b.position_at_end(after)


class Direct(Group):
    """For very few rows: multiplies weights as they are unpacked, at the speed of memory."""

    distances = (0, 4 << 10, 8 << 10)

    def multiply(self, first_output: Any, first_row: Any, n_rows: Any, next_output: Any) -> None:
        w = self.w
        self.places = [w.at(self.call.weights, (1, output)) for output in (first_output, next_output)]
        switch(w, n_rows, self.most_rows, lambda n: self._multiply(n, first_output))

    def _multiply(self, n_rows: int, first_output: Any) -> None:
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        weights, ahead = self.places
        rows = [b.gep(self.call.rounded, [b.mul(self.call.row_size, w.integer(r))]) for r in range(n_rows)]
        with w.loop(zero, self.call.n_pairs, one, [w.all(0.0)] * n_rows) as (pair, sums):
            place = b.mul(pair, w.integer(self.n_blocks * RECORD))
            block = _Block(self, [b.gep(row, [place]) for row in rows], sums)
            fetched = b.gep(ahead, [b.mul(pair, w.integer(LANES * step_bytes(self.kind)))])
            done = itertools.count(1)

            def keep(number: int, column: Any) -> None:
                block.keep(number, column)
                self._fetch(fetched, next(done))

            self._unpack(weights, pair, zero, keep)
        for r, value in enumerate(sums):
            self._give(w.integer(r), first_output, [value])


class _Block:
    """The state of a block while its columns arrive: integer products so far, and scales."""

    def __init__(self, group: Group, records: Sequence[Any], sums: list[Any]) -> None:
        self.group, self.records, self.sums = group, records, sums
        self.n_quads = step(group.kind) // 4
        self.first_least = self.n_quads + group.n_blocks * n_parts(group.kind)
        self.found: list[list[Any]] = []
        self.scales: list[Any] = []

    def keep(self, number: int, column: Any) -> None:
        if number < self.n_quads:
            self._multiply(number // QUADS, number % QUADS, column)
        elif number < self.first_least:
            self.scales.append(column)
            if len(self.scales) == n_parts(self.group.kind) and not has_least(self.group.kind):
                self._finish((number - self.n_quads) // n_parts(self.group.kind), None)
        else:
            self._finish(number - self.first_least, column)

    def _multiply(self, block: int, quad: int, column: Any) -> None:
        group = self.group
        part, place = divmod(quad, QUADS // n_parts(group.kind))
        records = [group.w.b.gep(record, [group.w.integer(RECORD * block)]) for record in self.records]
        if place == 0:
            self.found.append([group._start(record, part) for record in records])
        for r, record in enumerate(records):
            numbers = group._twice(record, 8 * quad, group.w.i32)
            self.found[part][r] = group.w.fours_added(self.found[part][r], column, numbers)

    def _finish(self, block: int, least: Any) -> None:
        group = self.group
        for r, record in enumerate(self.records):
            at = group.w.b.gep(record, [group.w.integer(RECORD * block)])
            self.sums[r] = group._added(self.sums[r], at, [found[r] for found in self.found], self.scales, least)
        self.found, self.scales = [], []


class Tiles(Group):
    """For more rows: unpacks `CHUNK` weights of each row to L1 and multiplies them with one tile after another."""

    distances = (0, 8 << 10)

    def __init__(self, writer: Writer, kind: str, call: Call, width: int, most_rows: int) -> None:
        super().__init__(writer, kind, call, width, most_rows)
        self.per_chunk = CHUNK // (2 * step(kind))  # pairs of steps
        self.columns = writer.on_stack(self.per_chunk * n_columns(kind) * width * REGISTER)

    def multiply(self, first_output: Any, first_row: Any, n_rows: Any, next_output: Any) -> None:
        """Multiplies a group of weight rows with some activation rows, whose sums stay in memory from chunk to chunk.
        `next_output`: the first of the weight rows to prefetch."""
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
                self._unpack_pair(weights, ahead, b.add(first_pair, i), i)
            with w.loop(zero, n_tiles, one) as (tile, _turn):
                first = b.add(b.mul(tile, size), w.least(tile, n_larger))
                n = b.add(size, b.zext(b.icmp_signed("<", tile, n_larger), w.i64))
                self._multiply_tile(n, b.add(first_row, first), first_pair, n_pairs, self._sums_of(first))
        with w.loop(zero, n_rows, one) as (row, _turn):
            sums = [w.load(self._sums_of(row), w.integer(REGISTER * i), w.vector, REGISTER) for i in range(self.width)]
            self._give(b.add(first_row, row), first_output, sums)

    def _unpack_pair(self, weights: Any, ahead: Any, pair: Any, slot: Any) -> None:
        """Unpacks a pair of steps into a slot of the columns. `pair`: its number in the rows."""
        w, b = self.w, self.w.b
        target = b.gep(self.columns, [b.mul(slot, w.integer(n_columns(self.kind) * self.width * REGISTER))])
        with w.loop(w.integer(0), w.integer(self.width), w.integer(1)) as (i, _turn):
            part = b.add(b.mul(pair, w.integer(self.width)), i)
            fetched = b.gep(ahead, [b.mul(part, w.integer(LANES * step_bytes(self.kind)))])
            to = b.gep(target, [b.mul(i, w.integer(REGISTER))])
            done = itertools.count(1)

            def keep(number: int, column: Any, fetched: Any = fetched, to: Any = to, done: Any = done) -> None:
                w.store(column, to, w.integer(self.width * REGISTER * number), REGISTER)
                self._fetch(fetched, next(done))

            self._unpack(weights, pair, i, keep)

    def _sums_of(self, row: Any) -> Any:
        return self.w.b.gep(self.call.sums, [self.w.b.mul(row, self.w.integer(self.width * REGISTER))])

    def _multiply_tile(self, n_rows: Any, first_row: Any, first_pair: Any, n_pairs: Any, sums_at: Any) -> None:
        """Multiplies a chunk with up to `most_rows` activation rows."""
        w, b = self.w, self.w.b
        record = b.mul(first_pair, w.integer(self.n_blocks * RECORD))
        start = b.gep(self.call.rounded, [b.add(b.mul(first_row, self.call.row_size), record)])

        def write(n: int) -> None:
            rows = [b.gep(start, [b.mul(self.call.row_size, w.integer(r))]) for r in range(n)]
            self._multiply_rows(rows, n_pairs, sums_at)

        switch(w, n_rows, self.most_rows, write)

    def _multiply_rows(self, rows: Sequence[Any], n_pairs: Any, sums_at: Any) -> None:
        """Multiplies a chunk with a tile. `rows`: the first record of each activation row."""
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
                parts = [self._products(records, quads, part) for part in range(n_parts(self.kind))]
                factors = [scales(part) for part in range(n_parts(self.kind))]
                minima = least(0) if has_least(self.kind) else [None] * self.width
                for place, value in enumerate(added):
                    row, k = divmod(place, self.width)
                    numbers, of_weights = [found[place] for found in parts], [factor[k] for factor in factors]
                    added[place] = self._added(value, records[row], numbers, of_weights, minima[k])
            sums[:] = added
        for i, total in enumerate(sums):
            w.store(total, sums_at, w.integer(REGISTER * i), REGISTER)

    def _columns(self, columns: Any, block: Any, first: int, n: int, kind: Any) -> Callable[[int], list[Any]]:
        """Returns a function that loads the registers of the i-th of the `n` columns of one kind that a block has.
        `first`: the number of the first column of that kind."""
        w, b, size = self.w, self.w.b, self.width * REGISTER
        start = b.gep(columns, [b.add(b.mul(block, w.integer(n * size)), w.integer(first * size))])
        return lambda i: [w.load(start, w.integer(size * i + REGISTER * k), kind, REGISTER) for k in range(self.width)]

    def _products(self, records: Sequence[Any], quads: Any, part: int) -> list[Any]:
        """Returns the integer products of one part of a block, for each row and register."""
        w, n = self.w, QUADS // n_parts(self.kind)
        found = [start for record in records for start in [self._start(record, part)] * self.width]
        for number in range(n * part, n * (part + 1)):
            weights = quads(number)
            for row, record in enumerate(records):
                numbers = self._twice(record, 8 * number, w.i32)
                for k in range(self.width):
                    i = self.width * row + k
                    found[i] = w.fours_added(found[i], weights[k], numbers)
        return found
