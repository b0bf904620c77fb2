"""Products of weights with a few rows, for CPUs with AVX-512 VNNI.

ggml multiplies the weights of the mapped file row by row, or in tiles of sixteen however few rows there are: a decode
step of four answers of a 4B model takes it 3.4 times as long as one of a single answer. Here weights are unpacked once
for all rows, and fetched ahead of time, so that four rows take little longer than one.

As in ggml the rows are rounded to 8-bit integers first where weights are quantized, of one scale for 256 numbers or for
32, and products of integers are exact; only the order in which their scaled sums are added up, in float32, differs.
Beside F16 rows stay float32, where ggml rounds them to half precision. The values of a row are the same to the bit
whatever is beside it, and for every number of threads.
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

MOST_ROWS = 64  # a multiple of the lanes
AHEAD = 12 << 10  # bytes, or the rows of weights after those that are multiplied: what is fetched from memory
OFFSETS = {"Q8_0": -128, "Q4_0": -8}  # of weights as unsigned integers
BLOCK = 256  # numbers of K-quants that have one scale of the rows they are multiplied with
PAIR = 2 * 32  # numbers in two blocks of other types
K_BYTES = BLOCK + REGISTER  # of a row's integers and the sums of sixteen of them each
PAIR_BYTES = 3 * REGISTER  # of a row's integers, what the weights' offset adds to their products, and the scales


@dataclass
class _Task:
    """One call: its tensors, which of its products is computed, numbers of blocks and rows, and places: of the rows as
    integers, of their scales, of sums, and of products of scales."""

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
        """Of a row's block among the integers."""
        return K_BYTES if self.is_k else step(self.kind) // PAIR * PAIR_BYTES


def is_available() -> bool:
    """Whether this CPU has the instructions."""
    return {"avx512", "avx512_vnni"} <= {*cpu_features()}


def multiplies(kind: str) -> bool:
    """Whether weights of a type are multiplied here, as far as that is known before anything is compiled."""
    return kind in KINDS and is_available() and llvm() is not None


def step(kind: str) -> int:
    """Numbers of a row of weights of a type that are taken together."""
    return BLOCK if kind.endswith("_K") else WIDENED if kind == "F16" else 2 * PAIR


def at_once(kind: str) -> int:
    """Rows of weights of a type that are multiplied with what is loaded of a row; they are in registers."""
    return 4 if kind == "F16" else 2


class Products:
    """Writes the operations, one for each type of weights."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer
        self.words = writer.ir.VectorType(writer.i16, 2 * LANES)
        self.unpackers = Unpackers(writer)

    def write(self, kind: str) -> Any:
        """void (*ggml_custom_op_t)(struct ggml_tensor * dst, int ith, int nth, void * userdata)"""
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
        """Memory for the rows as integers, up to some megabytes, which stacks of threads may not have."""
        w, b = self.w, self.w.b
        n = b.mul(task.n_blocks, task.n_rows)
        n_bytes = b.mul(n, w.integer(task.row_bytes))
        n_scales = b.add(b.mul(n, w.integer(4)), w.integer(REGISTER))  # which are read by registers
        room = b.call(w.declare("malloc", w.bytes, w.i64), [b.add(b.add(n_bytes, n_scales), w.integer(REGISTER))])
        past = b.and_(b.ptrtoint(room, w.i64), w.integer(REGISTER - 1))
        task.rounded = b.gep(room, [b.sub(w.integer(REGISTER), past)])
        task.scales = b.gep(task.rounded, [n_bytes])
        return room

    def _multiply(self, task: _Task, numbers: Sequence[Any]) -> None:
        """Rows of weights, by their numbers, with all rows, whose sums stay in memory: with these in registers, there
        are too few to unpack the next weights meanwhile."""
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
        """Where the numbers of a row are that a block of weights is multiplied with."""
        w, b = self.w, self.w.b
        if task.is_float:
            return b.gep(w.at(task.x, (1, row), (2, task.batch)), [b.mul(block, w.integer(4 * step(task.kind)))])
        place = b.add(b.mul(block, task.n_rows), row)
        return b.gep(task.rounded, [b.mul(place, w.integer(task.row_bytes))])

    def _factor_place(self, row: Any, p: int) -> Any:
        return self.w.b.add(self.w.b.mul(row, self.w.integer(4)), self.w.integer(4 * MOST_ROWS * p))

    def _write_factors(self, task: _Task, block: Any, weights: Sequence[Unpacked]) -> None:
        """The scale of a block of each row of weights, times those of all rows."""
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
        """Products of 8-bit integers, two neighbours added up to one of 16 bits, which is large enough for 6 bits."""
        w = self.w
        function = w.declare("llvm.x86.avx512.pmaddubs.w.512", self.words, unsigned.type, unsigned.type)
        return w.b.call(function, [unsigned, signed])

    def _pairs_added(self, to: Any, x: Any, y: Any) -> Any:
        """Products of 16-bit integers, two neighbours added up."""
        w = self.w
        function = w.declare("llvm.x86.avx512.vpdpwssd.512", w.whole, w.whole, w.whole, w.whole)
        return w.b.call(function, [to, w.b.bitcast(x, w.whole), w.b.bitcast(y, w.whole)])

    # --- rows as integers ---

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
        """256 numbers as ggml rounds them: the one furthest from zero becomes -127."""
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
        """Twice 32 numbers, the one furthest from zero of each becomes 127 or -127."""
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
        """The larger ones of some vectors."""
        found = values[0]
        for value in values[1:]:
            found = self.w.larger(found, value)
        return found
