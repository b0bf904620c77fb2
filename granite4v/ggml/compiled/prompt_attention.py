"""Flash attention of many rows, for CPUs with AVX-512.

The arithmetic is that of `attention`, float32 throughout, arranged for the rows of a prompt. The keys of a block of 64
cells are transposed, so that lanes are cells and each number of a query is multiplied with 64 cells at once. Six
queries are multiplied together, so that each loaded register of keys or values is used for all of them. A row's result
does not depend on the other rows.
"""

from __future__ import annotations

from typing import Any

from granite4v.ggml.compiled.attention import CELLS, LOWEST, n_seen, weigh
from granite4v.ggml.compiled.writer import LANES, SCALE_PLACE, Writer
from granite4v.ggml.declarations import TensorStruct

ROWS = 6  # queries multiplied together; with four registers of cells or values each, 24 sums are in registers
WIDE = CELLS // LANES  # registers of a query's scores for a block of cells
QUERIES = 384  # about as many per task; a task transposes the keys once for all its queries
LEAST_ROWS, TASKS = 8, 4  # rows per task at least; tasks per thread to aim at
FLOAT, REGISTER = 4, 4 * LANES  # bytes


class PromptAttention:
    """Writes the operation. A thread's task is a block of rows and one KV head. Query i of a task is from the block's
    row i // `group` and the KV head's query head i % `group`."""

    def __init__(self, writer: Writer, head: int, group: int) -> None:
        self.w, self.head, self.group = writer, head, group
        self.most_rows = -(-QUERIES // group)  # of the batch in a task
        self.n_padded = -(-self.most_rows * group // ROWS) * ROWS  # queries of a task, rounded up to whole passes

    def write(self) -> Any:
        """Writes a ggml_custom_op_t: void (struct ggml_tensor * dst, int ith, int nth, void * userdata)."""
        w = self.w
        function = w.begin("attend_prompt", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        target, ith, nth, _ = function.args
        b = w.b
        self.target = target
        self.q, self.k, self.v, self.mask = (w.field(target, "src", i, w.bytes) for i in range(4))
        self.factor = w.spread(w.load(target, w.integer(TensorStruct.op_params.offset + SCALE_PLACE), w.f32))
        self.scores, self.scaled = w.on_stack(FLOAT * ROWS * CELLS), w.on_stack(FLOAT * LANES * ROWS)
        self.transposed = w.on_stack(FLOAT * self.head * CELLS)
        room = self._allocate()
        n_rows, n_heads, n_threads = w.field(self.q, "ne", 1), w.field(self.k, "ne", 2), b.sext(nth, w.i64)
        n_parts = b.mul(n_heads, w.field(self.q, "ne", 3))
        share = b.sdiv(b.mul(n_rows, n_parts), b.mul(n_threads, w.integer(TASKS)))
        share = b.select(b.icmp_signed("<", share, w.integer(LEAST_ROWS)), w.integer(LEAST_ROWS), share)
        is_large = b.icmp_signed(">", share, w.integer(self.most_rows))
        rows = b.select(is_large, w.integer(self.most_rows), share)
        n_blocks = b.sdiv(b.add(n_rows, b.sub(rows, w.integer(1))), rows)
        with w.loop(b.sext(ith, w.i64), b.mul(n_blocks, n_parts), n_threads) as (task, _turn):
            self.number, rest = b.srem(task, n_heads), b.sdiv(task, n_heads)
            self.first, self.stream = b.mul(b.srem(rest, n_blocks), rows), b.sdiv(rest, n_blocks)
            left = b.sub(n_rows, self.first)
            self.n_rows = b.select(b.icmp_signed("<", left, rows), left, rows)
            self._attend()
        b.call(w.declare("free", w.ir.VoidType(), w.bytes), [room])
        b.ret_void()
        return function

    def _allocate(self) -> Any:
        """Allocates memory for a task's queries, sums of values, largest scores and sums of weights."""
        w, b = self.w, self.w.b
        sizes = [FLOAT * self.head * self.n_padded] * 2 + [FLOAT * self.n_padded] * 2
        room = b.call(w.declare("malloc", w.bytes, w.i64), [w.integer(sum(sizes) + REGISTER)])
        past = b.and_(b.ptrtoint(room, w.i64), w.integer(REGISTER - 1))
        start = b.gep(room, [b.sub(w.integer(REGISTER), past)])
        self.queries, self.sums, self.tops, self.totals = (
            b.gep(start, [w.integer(sum(sizes[:i]))]) for i in range(len(sizes))
        )
        return room

    def _attend(self) -> None:
        """Computes one task, block of cells by block of cells, up to the last cell that any of its rows sees."""
        w, b, zero, one = self.w, self.w.b, self.w.integer(0), self.w.integer(1)
        n = b.mul(self.n_rows, w.integer(self.group))
        n_padded = b.mul(b.sdiv(b.add(n, w.integer(ROWS - 1)), w.integer(ROWS)), w.integer(ROWS))
        with w.loop(zero, n_padded, one) as (i, _turn):
            self._begin_query(i, b.icmp_signed("<", i, n))
        with w.loop(zero, self.n_rows, one, [zero]) as (row, turn):
            seen = n_seen(w, self._mask_row(row), w.field(self.k, "ne", 1))
            turn[0] = b.select(b.icmp_signed(">", seen, turn[0]), seen, turn[0])
        keys, values = (w.at(tensor, (2, self.number), (3, self.stream)) for tensor in (self.k, self.v))
        with w.loop(zero, turn[0], w.integer(CELLS)) as (cell, _turn):
            self._transpose(b.gep(keys, [b.mul(cell, w.field(self.k, "nb", 1))]))
            at = b.gep(values, [b.mul(cell, w.field(self.v, "nb", 1))])
            with w.loop(zero, n_padded, w.integer(ROWS)) as (query, _turn):
                self._score(query)
                with w.loop(zero, w.integer(ROWS), one) as (i, _turn):
                    self._weigh(query, i, cell)
                self._add_values(query, at)
        with w.loop(zero, n, one) as (i, _turn):
            self._end_query(i)

    def _row_and_head(self, i: Any) -> tuple[Any, Any]:
        """Row within the task and query head of query i; padding queries get the last row."""
        w, b = self.w, self.w.b
        row, last = b.sdiv(i, w.integer(self.group)), b.sub(self.n_rows, w.integer(1))
        row = b.select(b.icmp_signed("<", row, last), row, last)
        head = b.add(b.mul(self.number, w.integer(self.group)), b.srem(i, w.integer(self.group)))
        return row, head

    def _mask_row(self, row: Any) -> Any:
        w, b = self.w, self.w.b
        return w.at(self.mask, (1, b.add(self.first, row)), (3, b.srem(self.stream, w.field(self.mask, "ne", 3))))

    def _begin_query(self, i: Any, is_there: Any) -> None:
        w, b = self.w, self.w.b
        row, head = self._row_and_head(i)
        query = w.at(self.q, (1, b.add(self.first, row)), (2, head), (3, self.stream))
        factor = b.select(is_there, self.factor, w.all(0.0))
        start = b.mul(i, w.integer(FLOAT * self.head))
        for j in range(self.head // LANES):
            place = b.add(start, w.integer(REGISTER * j))
            w.store(b.fmul(w.load(query, w.integer(REGISTER * j), w.vector), factor), self.queries, place, REGISTER)
            w.store(w.all(0.0), self.sums, place, REGISTER)
        w.store(w.number(LOWEST), self.tops, b.mul(i, w.integer(FLOAT)))
        w.store(w.number(0.0), self.totals, b.mul(i, w.integer(FLOAT)))

    def _end_query(self, i: Any) -> None:
        w, b = self.w, self.w.b
        row, head = self._row_and_head(i)
        total = w.load(self.totals, b.mul(i, w.integer(FLOAT)), w.f32)
        is_empty = b.fcmp_ordered("==", total, w.number(0.0))
        factor = w.spread(b.select(is_empty, w.number(0.0), b.fdiv(w.number(1.0), total)))
        out = w.at(self.target, (1, head), (2, b.add(self.first, row)), (3, self.stream))
        start = b.mul(i, w.integer(FLOAT * self.head))
        for j in range(self.head // LANES):
            found = w.load(self.sums, b.add(start, w.integer(REGISTER * j)), w.vector, REGISTER)
            w.store(b.fmul(found, factor), out, w.integer(REGISTER * j))

    def _transpose(self, keys: Any) -> None:
        """Widens and transposes the keys of a block of cells: number 0 of all cells, then number 1 of all, ..."""
        w, b, stride = self.w, self.w.b, self.w.field(self.k, "nb", 1)
        n_blocks = self.head // LANES
        with w.loop(w.integer(0), w.integer(WIDE * n_blocks), w.integer(1)) as (block, _turn):
            cells, j = b.sdiv(block, w.integer(n_blocks)), b.srem(block, w.integer(n_blocks))
            at = b.add(b.mul(cells, b.mul(stride, w.integer(LANES))), b.mul(j, w.integer(2 * LANES)))
            vectors = [w.halves(keys, b.add(at, b.mul(stride, w.integer(i)))) for i in range(LANES)]
            start = b.add(b.mul(cells, w.integer(REGISTER)), b.mul(j, w.integer(FLOAT * CELLS * LANES)))
            for i, vector in enumerate(w.transposed(vectors)):
                w.store(vector, self.transposed, b.add(start, w.integer(FLOAT * CELLS * i)), REGISTER)

    def _score(self, query: Any) -> None:
        w, b = self.w, self.w.b
        at = [
            b.gep(self.queries, [b.mul(b.add(query, w.integer(r)), w.integer(FLOAT * self.head))]) for r in range(ROWS)
        ]
        with w.loop(w.integer(0), w.integer(self.head), w.integer(1), [w.all(0.0)] * ROWS * WIDE) as (i, sums):
            place = b.mul(i, w.integer(FLOAT * CELLS))
            keys = [
                w.load(self.transposed, b.add(place, w.integer(REGISTER * j)), w.vector, REGISTER) for j in range(WIDE)
            ]
            for r in range(ROWS):
                number = w.spread(w.load(at[r], b.mul(i, w.integer(FLOAT)), w.f32))
                for j in range(WIDE):
                    sums[WIDE * r + j] = w.fma(number, keys[j], sums[WIDE * r + j])
        for i, vector in enumerate(sums):
            w.store(vector, self.scores, w.integer(REGISTER * i), REGISTER)

    def _weigh(self, query: Any, r: Any, cell: Any) -> None:
        """Turns the scores of query `query + r` into weights, and stores the factor for its earlier sums of values."""
        w, b = self.w, self.w.b
        i, start = b.add(query, r), b.mul(r, w.integer(FLOAT * CELLS))
        mask = b.gep(self._mask_row(self._row_and_head(i)[0]), [b.mul(cell, w.integer(2))])
        places = [b.add(start, w.integer(REGISTER * j)) for j in range(WIDE)]
        at = b.mul(i, w.integer(FLOAT))
        top, total = (w.load(each, at, w.f32) for each in (self.tops, self.totals))
        top, total, scaled = weigh(w, mask, self.scores, places, top, total)
        w.store(top, self.tops, at)
        w.store(total, self.totals, at)
        w.store(scaled, self.scaled, b.mul(r, w.integer(REGISTER)), REGISTER)

    def _add_values(self, query: Any, values: Any) -> None:
        w, b, stride = self.w, self.w.b, self.w.field(self.v, "nb", 1)
        start = [b.mul(b.add(query, w.integer(r)), w.integer(FLOAT * self.head)) for r in range(ROWS)]
        for first in range(0, self.head // LANES, WIDE):
            columns = range(first, min(first + WIDE, self.head // LANES))
            places = [[b.add(start[r], w.integer(REGISTER * j)) for j in columns] for r in range(ROWS)]
            sums = []
            for r in range(ROWS):
                scaled = w.load(self.scaled, w.integer(REGISTER * r), w.vector, REGISTER)
                sums += [b.fmul(w.load(self.sums, place, w.vector, REGISTER), scaled) for place in places[r]]
            with w.loop(w.integer(0), w.integer(CELLS), w.integer(1), sums) as (i, added):
                at = b.mul(i, stride)
                value = [w.halves(values, b.add(at, w.integer(2 * LANES * j))) for j in columns]
                for r in range(ROWS):
                    place = b.add(b.mul(i, w.integer(FLOAT)), w.integer(FLOAT * CELLS * r))
                    weight = w.spread(w.load(self.scores, place, w.f32))
                    for j in range(len(columns)):
                        k = len(columns) * r + j
                        added[k] = w.fma(weight, value[j], added[k])
            for place, found in zip([place for row in places for place in row], added, strict=True):
                w.store(found, self.sums, place, REGISTER)
