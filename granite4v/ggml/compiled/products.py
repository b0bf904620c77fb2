"""Products of weights with a few rows, for CPUs with AVX-512 VNNI.

ggml multiplies the weights of the mapped file row by row, or in tiles of sixteen rows however few there are: a decode
step of four answers of a 4B model takes it 3.4 times as long as a step of one. Here weights are unpacked once for all
rows, and prefetched, so that four rows take little longer than one.

As in ggml, with quantized weights the rows are first quantized to 8-bit integers, with one scale per 256 numbers or per
32, and products of integers are exact; only the order in which their scaled sums are added, in float32, differs. With
F16 weights the rows stay float32, whereas ggml rounds them to half precision. A row's result has the same bits whatever
other rows there are, and for every number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from granite4v.ggml.compiled.weights import KINDS, REGISTER, WIDENED, Unpacked, Unpackers
from granite4v.ggml.compiled.writer import LANES, Writer, llvm
from granite4v.ggml.cpu_features import cpu_features
from granite4v.ggml.types import TYPES

__all__ = ["KINDS", "MOST_ROWS", "Products", "at_once", "is_available", "multiplies", "step"]

MOST_ROWS = 64  # rows at most; a multiple of `LANES`
AHEAD = 12 << 10  # prefetch distance in bytes; farther if the next rows of weights are farther away
OFFSETS = {"Q8_0": -128, "Q4_0": -8}  # added to a weight's unsigned integer to get the signed one
BLOCK = 256  # numbers of a row that share a scale, with K-quants
PAIR = 2 * 32  # numbers in two blocks of the other quantized types
K_BYTES = BLOCK + REGISTER  # a row's integers, and the scaled sum of each sixteen of them
PAIR_BYTES = 3 * REGISTER  # a row's integers, what the weights' offset adds to their products, and the scales


@dataclass
class _Task:
    """State of one call, as IR values.

    `target`, `weights`, `x`: the tensors. `batch`: index of the current product along axis 2. `n_blocks`: blocks of a
    row, of `step` numbers each. `n_rows`: rows of x. Addresses: `rounded`, the rows as integers; `scales`, their scales
    with K-quants; `sums`, a register for each row and each row of weights; `factors`, weight scales times row scales.
    """

    kind: str
    target: Any
    weights: Any
    x: Any
    batch: Any = None
    n_blocks: Any = None
    n_rows: Any = None
    rounded: Any = None
    scales: Any = None
    sums: Any = None
    factors: Any = None

    @property
    def is_k(self) -> bool:
        return self.kind.endswith("_K")

    @property
    def is_float(self) -> bool:
        return self.kind == "F16"

    @property
    def row_bytes(self) -> int:
        """Bytes of one block of a quantized row."""
        return K_BYTES if self.is_k else step(self.kind) // PAIR * PAIR_BYTES


def is_available() -> bool:
    """Whether this CPU has the instructions: AVX-512 and its VNNI."""
    return {"avx512", "avx512_vnni"} <= {*cpu_features()}


def multiplies(kind: str) -> bool:
    """Whether products with weights of a type can be compiled here, as far as is known before compiling."""
    return kind in KINDS and is_available() and llvm() is not None


def step(kind: str) -> int:
    """Number of weights of a row that are unpacked together, for a type."""
    return BLOCK if kind.endswith("_K") else WIDENED if kind == "F16" else 2 * PAIR


def at_once(kind: str) -> int:
    """Number of rows of weights, for a type, that are held in registers and multiplied with each load of a row."""
    return 4 if kind == "F16" else 2


class Products:
    """Writes the operations, one per type of weights. Each thread computes a contiguous range of rows of weights."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer
        self.words = writer.ir.VectorType(writer.i16, 2 * LANES)
        self.unpackers = Unpackers(writer)

    def write(self, kind: str) -> Any:
        """Writes a ggml_custom_op_t: void (struct ggml_tensor * dst, int ith, int nth, void * userdata)."""
        w = self.w
        function = w.begin(f"multiply_{kind}", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        target, ith, nth, _ = function.args
        b, task = w.b, _Task(kind, target, w.field(target, "src", 0, w.bytes), w.field(target, "src", 1, w.bytes))
        n = at_once(kind)
        task.sums, task.factors = w.on_stack(n * MOST_ROWS * REGISTER), w.on_stack(n * MOST_ROWS * 4)
        n_out, task.n_rows = w.field(task.weights, "ne", 1), w.field(task.x, "ne", 1)
        task.n_blocks = b.sdiv(w.field(task.x, "ne", 0), w.integer(step(kind)))
        if not task.is_float:
            room = self._allocate(task)
        groups = b.sdiv(b.add(n_out, w.integer(n - 1)), w.integer(n))

        def share(i: Any) -> Any:
            return b.mul(b.sdiv(b.mul(groups, b.sext(i, w.i64)), b.sext(nth, w.i64)), w.integer(n))

        first, end = share(ith), share(b.add(ith, w.integer(1, w.i32)))
        has_rest = b.icmp_signed("<", n_out, end)
        complete = b.select(has_rest, b.sub(end, w.integer(n)), end)
        with w.loop(w.integer(0), w.field(task.x, "ne", 2), w.integer(1)) as (task.batch, _turn):
            if not task.is_float:
                self._round_rows(task)
            with w.loop(first, complete, w.integer(n)) as (i, _turn):
                self._multiply(task, [b.add(i, w.integer(p)) for p in range(n)])
            with w.loop(complete, b.select(has_rest, n_out, complete), w.integer(1)) as (i, _turn):
                self._multiply(task, [i])
        if not task.is_float:
            b.call(w.declare("free", w.ir.VoidType(), w.bytes), [room])
        b.ret_void()
        return function

    def _allocate(self, task: _Task) -> Any:
        """Allocates memory for the quantized rows: up to some megabytes, more than a thread's stack may have."""
        w, b = self.w, self.w.b
        n = b.mul(task.n_blocks, task.n_rows)
        n_bytes = b.mul(n, w.integer(task.row_bytes))
        n_scales = b.add(b.mul(n, w.integer(4)), w.integer(REGISTER))  # read in whole registers
        room = b.call(w.declare("malloc", w.bytes, w.i64), [b.add(b.add(n_bytes, n_scales), w.integer(REGISTER))])
        past = b.and_(b.ptrtoint(room, w.i64), w.integer(REGISTER - 1))
        task.rounded = b.gep(room, [b.sub(w.integer(REGISTER), past)])
        task.scales = b.gep(task.rounded, [n_bytes])
        return room

    def _multiply(self, task: _Task, numbers: Sequence[Any]) -> None:
        """Multiplies some rows of weights, by number, with all rows of x. The sums stay in memory: if they were in
        registers, too few would be left to unpack the next weights meanwhile."""
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        at = [w.at(task.weights, (1, number), (2, task.batch)) for number in numbers]
        n_bytes = step(task.kind) // TYPES[task.kind].block * TYPES[task.kind].nbytes

        group = b.mul(w.field(task.weights, "nb", 1), w.integer(at_once(task.kind)))
        next_ones = b.select(b.icmp_signed("<", group, w.integer(AHEAD)), w.integer(AHEAD), group)

        def places(row: Any) -> list[Any]:
            start = b.mul(row, w.integer(at_once(task.kind) * REGISTER))
            return [b.add(start, w.integer(p * REGISTER)) for p in range(len(at))]

        with w.loop(zero, task.n_rows, one) as (row, _turn):
            for place in places(row):
                w.store(w.all(0.0), task.sums, place, REGISTER)
        with w.loop(zero, task.n_blocks, one) as (block, _turn):
            blocks = [b.gep(start, [b.mul(block, w.integer(n_bytes))]) for start in at]
            for each in blocks:
                w.prefetch(b.gep(each, [next_ones]), n_bytes)
            found = [self.unpackers.unpack(task.kind, each) for each in blocks]
            if task.is_k:
                self._write_factors(task, block, found)
            with w.loop(zero, task.n_rows, one) as (row, _turn):
                x = self._row_block(task, row, block)
                for p, (at_sum, weights) in enumerate(zip(places(row), found, strict=True)):
                    before = w.load(task.sums, at_sum, w.vector, REGISTER)
                    if task.is_k:
                        factor = w.load(task.factors, self._factor_place(row, p), w.f32)
                        after = self._added_k(before, weights, x, factor)
                    else:
                        added = self._added_floats if task.is_float else self._added
                        after = added(before, weights, x)
                    w.store(after, task.sums, at_sum, REGISTER)
        with w.loop(zero, task.n_rows, one) as (row, _turn):
            out = w.at(task.target, (1, row), (2, task.batch))
            for place, number in zip(places(row), numbers, strict=True):
                total = w.total(w.load(task.sums, place, w.vector, REGISTER))
                w.store(total, out, b.mul(number, w.integer(4)))

    def _row_block(self, task: _Task, row: Any, block: Any) -> Any:
        """Address of the numbers of a row for one block of weights. Quantized rows are stored by block: block 0 of all
        rows, then block 1 of all rows, ..."""
        w, b = self.w, self.w.b
        if task.is_float:
            return b.gep(w.at(task.x, (1, row), (2, task.batch)), [b.mul(block, w.integer(4 * step(task.kind)))])
        place = b.add(b.mul(block, task.n_rows), row)
        return b.gep(task.rounded, [b.mul(place, w.integer(task.row_bytes))])

    def _factor_place(self, row: Any, p: int) -> Any:
        return self.w.b.add(self.w.b.mul(row, self.w.integer(4)), self.w.integer(4 * MOST_ROWS * p))

    def _write_factors(self, task: _Task, block: Any, weights: Sequence[Unpacked]) -> None:
        """Multiplies the scale of the current block of each row of weights with the scales of all rows of x."""
        w, b = self.w, self.w.b
        with w.loop(w.integer(0), task.n_rows, w.integer(LANES)) as (row, _turn):
            place = b.mul(b.add(b.mul(block, task.n_rows), row), w.integer(4))
            scales = w.load(task.scales, place, w.vector)
            for p, each in enumerate(weights):
                w.store(b.fmul(scales, each.scale), task.factors, self._factor_place(row, p))

    def _added_k(self, before: Any, weights: Unpacked, rounded: Any, factor: Any) -> Any:
        w, b = self.w, self.w.b
        found = w.integers([0] * LANES, w.i32)
        for j, (integers, scales) in enumerate(zip(weights.numbers, weights.scales, strict=True)):
            row = w.load(rounded, w.integer(REGISTER * j), integers.type, REGISTER)
            found = self._pairs_added(found, self._pairs(integers, row), scales)
        sums = w.load(rounded, w.integer(BLOCK), w.vector, REGISTER)
        values = w.fma(b.sitofp(found, w.vector), w.spread(factor), before)
        return w.fma(weights.offset, sums, values)

    def _added(self, before: Any, weights: Unpacked, rounded: Any) -> Any:
        w, b = self.w, self.w.b
        for j, (integers, scales) in enumerate(zip(weights.numbers, weights.scales, strict=True)):
            row, offset = (w.load(rounded, w.integer(PAIR_BYTES * j + REGISTER * i), w.whole, REGISTER) for i in (0, 1))
            row_scales = w.load(rounded, w.integer(PAIR_BYTES * j + 2 * REGISTER), w.vector, REGISTER)
            values = b.sitofp(w.fours_added(offset, integers, row), w.vector)
            before = w.fma(b.fmul(values, scales), row_scales, before)
        return before

    def _added_floats(self, before: Any, weights: Unpacked, x: Any) -> Any:
        for j, vector in enumerate(weights.numbers):
            before = self.w.fma(vector, self.w.load(x, self.w.integer(REGISTER * j), self.w.vector), before)
        return before

    def _pairs(self, unsigned: Any, signed: Any) -> Any:
        """vpmaddubsw: products of 8-bit integers, added in adjacent pairs to 16 bits. These cannot overflow, since the
        weights have at most 6 bits: 2 * 63 * 127 < 2**15."""
        w = self.w
        function = w.declare("llvm.x86.avx512.pmaddubs.w.512", self.words, unsigned.type, unsigned.type)
        return w.b.call(function, [unsigned, signed])

    def _pairs_added(self, to: Any, x: Any, y: Any) -> Any:
        """vpdpwssd: adds products of 16-bit integers, in adjacent pairs, to 32-bit lanes."""
        w = self.w
        function = w.declare("llvm.x86.avx512.vpdpwssd.512", w.whole, w.whole, w.whole, w.whole)
        return w.b.call(function, [to, w.b.bitcast(x, w.whole), w.b.bitcast(y, w.whole)])

    # --- quantizing rows ---

    def _round_rows(self, task: _Task) -> None:
        w, b = self.w, self.w.b
        with w.loop(w.integer(0), task.n_rows, w.integer(1)) as (row, _turn):
            source = w.at(task.x, (1, row), (2, task.batch))
            with w.loop(w.integer(0), task.n_blocks, w.integer(1)) as (block, _turn):
                at = b.gep(source, [b.mul(block, w.integer(4 * step(task.kind)))])
                rounded = self._row_block(task, row, block)
                if task.is_k:
                    place = b.add(b.mul(block, task.n_rows), row)
                    self._round_k(at, rounded, b.gep(task.scales, [b.mul(place, w.integer(4))]))
                else:
                    for j in range(step(task.kind) // PAIR):
                        pair = b.gep(rounded, [w.integer(PAIR_BYTES * j)])
                        self._round_pair(b.gep(at, [w.integer(4 * PAIR * j)]), pair, OFFSETS[task.kind])

    def _round_k(self, source: Any, target: Any, scale_at: Any) -> None:
        """Quantizes 256 numbers as ggml does: the one furthest from zero becomes -127. Stores the integers, the scaled
        sum of each sixteen, and the scale."""
        w, b = self.w, self.w.b
        values = [w.load(source, w.integer(REGISTER * i), w.vector) for i in range(BLOCK // LANES)]
        largest = w.largest(self._folded(values))
        least = b.fsub(w.number(-0.0), w.largest(self._folded([b.fsub(w.all(-0.0), value) for value in values])))
        furthest = b.select(b.fcmp_ordered(">=", largest, b.fsub(w.number(-0.0), least)), largest, least)
        is_zero = b.fcmp_ordered("==", furthest, w.number(0.0))
        factor = b.select(is_zero, w.number(0.0), b.fdiv(w.number(-127.0), furthest))
        scale = b.select(is_zero, w.number(0.0), b.fdiv(w.number(1.0), factor))
        totals = self.w.all(0.0)
        for i, value in enumerate(values):
            integers = self._to_integers(value, factor)
            w.store(b.trunc(integers, w.ir.VectorType(w.i8, LANES)), target, w.integer(LANES * i), LANES)
            total = w.whole_total(integers)
            totals = b.insert_element(totals, b.sitofp(total, w.f32), w.integer(i, w.i32))
        w.store(b.fmul(totals, w.spread(scale)), target, w.integer(BLOCK), REGISTER)
        w.store(scale, scale_at, w.integer(0))

    def _round_pair(self, source: Any, target: Any, offset: int) -> None:
        """Quantizes two blocks of 32 numbers; the one furthest from zero in each becomes 127 or -127. Stores the
        integers, what `offset` adds to each lane of their products, and the scales."""
        w, b = self.w, self.w.b
        values = [w.load(source, w.integer(REGISTER * i), w.vector) for i in range(4)]
        scales = []
        for i, value in enumerate(values):
            if i % 2 == 0:
                furthest = w.largest(self._folded([w.absolute(each) for each in values[i : i + 2]]))
                scale = b.fdiv(furthest, w.number(127.0))
                is_zero = b.fcmp_ordered("==", scale, w.number(0.0))
                factor = b.select(is_zero, w.number(0.0), b.fdiv(w.number(1.0), scale))
                scales.append(scale)
            integers = self._to_integers(value, factor)
            w.store(b.trunc(integers, w.ir.VectorType(w.i8, LANES)), target, w.integer(LANES * i), LANES)
        stored = w.load(target, w.integer(0), w.whole, REGISTER)
        zero = w.integers([0] * LANES, w.i32)
        totals = w.fours_added(zero, w.integers([-offset] * REGISTER, w.i8), stored)
        w.store(b.sub(zero, totals), target, w.integer(REGISTER), REGISTER)
        both = b.shuffle_vector(w.spread(scales[0], 8), w.spread(scales[1], 8), w.integers(range(16), w.i32))
        w.store(both, target, w.integer(2 * REGISTER), REGISTER)

    def _to_integers(self, values: Any, factor: Any) -> Any:
        w, b = self.w, self.w.b
        return b.fptosi(w.rounded(b.fmul(values, w.spread(factor))), w.whole)

    def _folded(self, values: Sequence[Any]) -> Any:
        """Elementwise maximum of several vectors."""
        found = values[0]
        for value in values[1:]:
            found = self.w.larger(found, value)
        return found
