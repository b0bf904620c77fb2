"""Flash attention of a few rows, compiled for this CPU by LLVM (the extra 'llvm').

ggml's own takes the rows of a decode step head by head, converts every key and value once for each head, and adds
values up in half precision: 15 ms for each answer of a 4B model behind 1,400 tokens, which is half of a step of 16
answers. Here heads that share keys are computed together, in float32, with all sums in registers. Rows of 64 and more
are left to ggml, which takes those in tiles.

llama.cpp knows nothing of it. `callback` is what it asks about every node of a graph before it computes any; that is
compiled, too, and turns each node of flash attention that it can compute into ggml's custom operation, in place: the
operation's number and its parameters change, its sources stay. The scale of the scores, which stands where ggml now
keeps the custom operation's function, moves behind it. ggml's threads call the operation themselves.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from granite4v.ggml.cpu_features import cpu_features
from granite4v.ggml.declarations import TensorStruct
from granite4v.ggml.types import TYPE_IDS

OP_FLASH_ATTN_EXT, OP_CUSTOM = 74, 95  # enum ggml_op, include/ggml.h of ggml 0.25.3; a test asks the library
FEW = 64  # GGML_FA_TILE_Q, ggml-cpu/ops.cpp of ggml 0.25.3: rows from which on ggml takes tiles
LANES = 16  # of float32 in a register of AVX-512, of which there are 32
MAX_HEAD, MAX_GROUP = 128, 16
SUMS = 20  # registers for sums of values; others hold keys, values and weights
CELLS = 64  # whose scores are computed before their values are added up; llama.cpp's caches have multiples of 256
_ALL_THREADS = -1  # GGML_N_TASKS_MAX
_SCALE = 32  # where in a node's parameters the scale moves: struct ggml_custom_op_params takes 24 of 64 bytes
_NEVER = 0xFC00  # minus infinity in half precision: a cell that a row does not see
_LEAST = -86.0  # of an exponent; the exponential of less is zero here
_LOWEST = -1e30  # below every score


def is_available(head: int, group: int) -> bool:
    """Whether there is a kernel for heads of `head` numbers, `group` of which share their keys, on this machine."""
    fits = head % LANES == 0 and LANES <= head <= MAX_HEAD and 1 <= group <= MAX_GROUP
    return fits and "avx512" in cpu_features() and llvm() is not None


@functools.cache
def version() -> str:
    """LLVM's version, '20.1.8'; empty where it is not installed."""
    binding = llvm()
    return "" if binding is None else ".".join(map(str, binding.llvm_version_info))


@functools.cache
def callback(head: int, group: int) -> int:
    """The address of the compiled `ggml_backend_sched_eval_callback`, to be given without data. It lives as long as the
    process. Only where `is_available`; takes some tenths of a second the first time."""
    return int(_compiled(head, group).get_function_address("see"))


@functools.cache
def llvm() -> Any:
    """llvmlite's modules, ready to compile for this machine; None without them."""
    try:
        from llvmlite import binding
    except (ImportError, OSError):
        return None
    if not hasattr(binding, "create_pass_builder"):  # an older one, which another package has brought
        return None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding


@functools.cache
def _compiled(head: int, group: int) -> Any:
    binding = llvm()
    features = binding.get_host_cpu_features()
    features["prefer-256-bit"] = False
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    module = binding.parse_assembly(_Writer(head, group).text())
    module.verify()
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    compiled = binding.create_mcjit_compiler(module, machine)
    compiled.finalize_object()
    return compiled


class _Writer:
    """Writes the two functions in LLVM's language. Values in registers of `LANES` float32 are called vectors."""

    def __init__(self, head: int, group: int) -> None:
        from llvmlite import ir

        self.ir, self.head, self.group = ir, head, group
        self.n_vectors = head // LANES
        self.i1, self.i8, self.i32, self.i64 = (ir.IntType(n) for n in (1, 8, 32, 64))
        self.f32, self.half = ir.FloatType(), ir.HalfType()
        self.vector = ir.VectorType(self.f32, LANES)
        self.bytes = self.i8.as_pointer()
        self.module = ir.Module("attention")
        self.b: Any = ir.IRBuilder()
        v, f = self.vector, self.f32
        self.fma = self._declare("llvm.fma.v16f32", v, v, v, v)
        self.larger = self._declare("llvm.maxnum.v16f32", v, v, v)
        self.larger_one = self._declare("llvm.maxnum.f32", f, f, f)
        self.round = self._declare("llvm.rint.v16f32", v, v)
        self.largest = self._declare("llvm.vector.reduce.fmax.v16f32", f, v)
        self.total = self._declare("llvm.vector.reduce.fadd.v16f32", f, f, v)

    def text(self) -> str:
        attend = self._write_attend()
        self._write_see(attend)
        return str(self.module)

    def _declare(self, name: str, result: Any, *arguments: Any) -> Any:
        return self.ir.Function(self.module, self.ir.FunctionType(result, arguments), name)

    def _begin(self, name: str, result: Any, *arguments: Any) -> Any:
        function = self._declare(name, result, *arguments)
        self.b = self.ir.IRBuilder(function.append_basic_block())
        return function

    # --- numbers and memory ---

    def integer(self, value: int, kind: Any = None) -> Any:
        return self.ir.Constant(kind or self.i64, value)

    def number(self, value: float) -> Any:
        return self.ir.Constant(self.f32, ctypes.c_float(value).value)

    def all(self, value: float) -> Any:
        return self.ir.Constant(self.vector, [self.number(value)] * LANES)

    def spread(self, value: Any) -> Any:
        """A vector of one number."""
        empty = self.ir.Constant(self.vector, self.ir.Undefined)
        one = self.b.insert_element(empty, value, self.integer(0, self.i32))
        return self.b.shuffle_vector(one, empty, self.ir.Constant(self.ir.VectorType(self.i32, LANES), [0] * LANES))

    def load(self, base: Any, n_bytes: Any, kind: Any, align: int = 4) -> Any:
        value = self.b.load(self.b.bitcast(self.b.gep(base, [n_bytes]), kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Any, base: Any, n_bytes: Any, align: int = 4) -> None:
        self.b.store(value, self.b.bitcast(self.b.gep(base, [n_bytes]), value.type.as_pointer())).align = align

    def halves(self, base: Any, n_bytes: Any) -> Any:
        """A vector from numbers in half precision."""
        return self.b.fpext(self.load(base, n_bytes, self.ir.VectorType(self.half, LANES), 2), self.vector)

    def field(self, tensor: Any, name: str, index: int = 0, kind: Any = None) -> Any:
        """Of a `struct ggml_tensor`."""
        kind = kind or self.i64
        size = {self.i64: 8, self.bytes: 8, self.i32: 4, self.f32: 4}[kind]
        offset = getattr(TensorStruct, name).offset + size * index
        return self.load(tensor, self.integer(offset), kind, size)

    @contextmanager
    def loop(self, start: Any, end: Any, step: Any, values: Sequence[Any] = ()) -> Iterator[tuple[Any, list[Any]]]:
        """`for i in range(start, end, step)`: the block gets `i` and the values before its turn, whose list it replaces
        by those after it. At the end the list holds what the last turn left."""
        b, function = self.b, self.b.function
        before, head, body, after = b.block, *(function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(start.type)
        i.add_incoming(start, before)
        phis = [b.phi(value.type) for value in values]
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", i, end), body, after)
        b.position_at_end(body)
        turn = list(phis)
        yield i, turn
        for phi, value in zip((i, *phis), (b.add(i, step), *turn), strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        turn[:] = phis

    # --- the operation ---

    def _write_attend(self) -> Any:
        """void (*ggml_custom_op_t)(struct ggml_tensor * dst, int ith, int nth, void * userdata)"""
        function = self._begin("attend", self.ir.VoidType(), self.bytes, self.i32, self.i32, self.bytes)
        target, ith, nth, _ = function.args
        b, entry = self.b, self.b
        per_pass = max(1, min(self.group, SUMS // self.n_vectors))
        scores = entry.alloca(self.i8, self.integer(4 * per_pass * CELLS))
        q, k, v, mask = (self.field(target, "src", i, self.bytes) for i in range(4))
        scale = self.spread(self.load(target, self.integer(TensorStruct.op_params.offset + _SCALE), self.f32))
        n_rows, n_heads = self.field(q, "ne", 1), self.field(k, "ne", 2)
        n_tasks = b.mul(b.mul(n_rows, n_heads), self.field(q, "ne", 3))
        with self.loop(b.sext(ith, self.i64), n_tasks, b.sext(nth, self.i64)) as (task, _turn):
            head, rest = b.srem(task, n_heads), b.sdiv(task, n_heads)
            row, stream = b.srem(rest, n_rows), b.sdiv(rest, n_rows)
            stream_of_mask = b.srem(stream, self.field(mask, "ne", 3))
            seen = self._at(mask, (1, row), (3, stream_of_mask))
            keys, values = (self._at(tensor, (2, head), (3, stream)) for tensor in (k, v))
            n_cells = self._n_seen(seen, self.field(k, "ne", 1))
            strides = self.field(k, "nb", 1), self.field(v, "nb", 1)
            for first in range(0, self.group, per_pass):
                heads = [
                    b.add(b.mul(head, self.integer(self.group)), self.integer(i))
                    for i in range(first, min(first + per_pass, self.group))
                ]
                queries = [self._at(q, (1, row), (2, one), (3, stream)) for one in heads]
                targets = [self._at(target, (1, one), (2, row), (3, stream)) for one in heads]
                self._heads(queries, keys, values, strides, seen, n_cells, scale, targets, scores)
        b.ret_void()
        return function

    def _at(self, tensor: Any, *places: tuple[int, Any]) -> Any:
        """Where in a tensor's data these places by dimension are."""
        b, at = self.b, self.field(tensor, "data", kind=self.bytes)
        for dimension, place in places:
            at = b.gep(at, [b.mul(place, self.field(tensor, "nb", dimension))])
        return at

    def _n_seen(self, seen: Any, n_cells: Any) -> Any:
        """Cells up to the last one that a row sees, in multiples of `CELLS`."""
        b = self.b
        kind = self.ir.VectorType(self.ir.IntType(16), CELLS)
        never = self.ir.Constant(kind, [_NEVER] * CELLS)
        with self.loop(self.integer(0), n_cells, self.integer(CELLS), [self.integer(0)]) as (i, turn):
            some = b.icmp_unsigned("!=", self.load(seen, b.mul(i, self.integer(2)), kind, 2), never)
            is_seen = b.icmp_unsigned(
                "!=", b.bitcast(some, self.ir.IntType(CELLS)), self.integer(0, self.ir.IntType(CELLS))
            )
            turn[0] = b.select(is_seen, b.add(i, self.integer(CELLS)), turn[0])
        return turn[0]

    def _heads(
        self,
        queries: Sequence[Any],
        keys: Any,
        values: Any,
        strides: tuple[Any, Any],
        seen: Any,
        n_cells: Any,
        scale: Any,
        targets: Sequence[Any],
        scores: Any,
    ) -> None:
        """Softmax of scores that are seen block by block, as in flash attention: sums are scaled when a larger score
        comes."""
        b, n, vectors = self.b, len(queries), range(self.n_vectors)
        query = [[b.fmul(self.load(one, self.integer(64 * j), self.vector), scale) for j in vectors] for one in queries]
        state = [*n * [self.number(_LOWEST)], *n * [self.number(0.0)], *n * self.n_vectors * [self.all(0.0)]]
        with self.loop(self.integer(0), n_cells, self.integer(CELLS), state) as (first, turn):
            tops, totals, sums = turn[:n], turn[n : 2 * n], turn[2 * n :]
            with self.loop(self.integer(0), self.integer(CELLS), self.integer(1)) as (i, _turn):
                at = b.mul(b.add(first, i), strides[0])
                key = [self.halves(keys, b.add(at, self.integer(32 * j))) for j in vectors]
                for g in range(n):
                    product = b.fmul(query[g][0], key[0])
                    for j in vectors[1:]:
                        product = b.call(self.fma, [query[g][j], key[j], product])
                    place = b.add(b.mul(i, self.integer(4)), self.integer(4 * CELLS * g))
                    self.store(self._total(product), scores, place)
            for g in range(n):
                tops[g], totals[g], scaled = self._weights(scores, g, seen, first, tops[g], totals[g])
                for j in vectors:
                    sums[g * self.n_vectors + j] = b.fmul(sums[g * self.n_vectors + j], scaled)
            with self.loop(self.integer(0), self.integer(CELLS), self.integer(1), sums) as (i, added):
                at = b.mul(b.add(first, i), strides[1])
                value = [self.halves(values, b.add(at, self.integer(32 * j))) for j in vectors]
                for g in range(n):
                    place = b.add(b.mul(i, self.integer(4)), self.integer(4 * CELLS * g))
                    weight = self.spread(self.load(scores, place, self.f32))
                    for j in vectors:
                        k = g * self.n_vectors + j
                        added[k] = b.call(self.fma, [weight, value[j], added[k]])
            turn[:] = [*tops, *totals, *added]
        for g in range(n):
            total = turn[n + g]
            is_empty = b.fcmp_ordered("==", total, self.number(0.0))
            factor = self.spread(b.select(is_empty, self.number(0.0), b.fdiv(self.number(1.0), total)))
            for j in vectors:
                self.store(b.fmul(turn[2 * n + g * self.n_vectors + j], factor), targets[g], self.integer(64 * j))

    def _weights(self, scores: Any, g: int, seen: Any, first: Any, top: Any, total: Any) -> tuple[Any, Any, Any]:
        """Turns the scores of a block into weights. The largest score, the sum of all weights, and what earlier sums
        are to be multiplied with, a vector."""
        b = self.b
        places = [self.integer(4 * (CELLS * g + LANES * i)) for i in range(CELLS // LANES)]
        found = []
        for i, place in enumerate(places):
            mask = self.halves(seen, b.mul(b.add(first, self.integer(LANES * i)), self.integer(2)))
            is_hidden = b.fcmp_ordered("<", mask, self.all(_LOWEST))
            found.append(
                b.select(is_hidden, self.all(float("-inf")), b.fadd(self.load(scores, place, self.vector), mask))
            )
        largest = found[0]
        for one in found[1:]:
            largest = b.call(self.larger, [largest, one])
        new_top = b.call(self.larger_one, [top, b.call(self.largest, [largest])])
        spread_top, added = self.spread(new_top), self.all(0.0)
        for place, one in zip(places, found, strict=True):
            weight = self._exponential(b.fsub(one, spread_top))
            self.store(weight, scores, place)
            added = b.fadd(added, weight)
        scaled = self._exponential(self.spread(b.fsub(top, new_top)))
        one_scaled = b.extract_element(scaled, self.integer(0, self.i32))
        return new_top, b.fadd(b.fmul(total, one_scaled), self._total(added)), scaled

    def _total(self, vector: Any) -> Any:
        return self.b.call(self.total, [self.number(-0.0), vector], fastmath=("reassoc",))

    def _exponential(self, x: Any) -> Any:
        """Of numbers up to 0, within two units in the last place; 0 below `_LEAST`.

        2**n times a polynomial of degree 6 on the rest, up to half of log(2): the minimax coefficients of Cephes's expf
        (S. Moshier).
        """
        b = self.b
        is_small = b.fcmp_ordered("<", x, self.all(_LEAST))
        x = b.select(is_small, self.all(_LEAST), x)
        n = b.call(self.round, [b.fmul(x, self.all(1.44269504088896341))])
        r = b.call(self.fma, [n, self.all(-0.693359375), x])  # log(2) in two parts, so that the difference is exact
        r = b.call(self.fma, [n, self.all(2.12194440e-4), r])
        y = self.all(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            y = b.call(self.fma, [y, r, self.all(coefficient)])
        y = b.fadd(b.call(self.fma, [y, b.fmul(r, r), r]), self.all(1.0))
        whole = self.ir.VectorType(self.i32, LANES)
        biased = b.add(b.fptosi(n, whole), self.ir.Constant(whole, [127] * LANES))
        power = b.bitcast(b.shl(biased, self.ir.Constant(whole, [23] * LANES)), self.vector)
        return b.select(is_small, self.all(0.0), b.fmul(y, power))

    # --- the callback ---

    def _write_see(self, attend: Any) -> None:
        """bool (*ggml_backend_sched_eval_callback)(struct ggml_tensor * t, bool ask, void * user_data)"""
        function = self._begin("see", self.i8, self.bytes, self.i8, self.bytes)
        node, asks, _ = function.args
        b = self.b
        leave = function.append_basic_block()
        go_on = b.zext(b.icmp_unsigned("==", asks, self.integer(0, self.i8)), self.i8)  # asked about a node: not wanted

        def require(condition: Any) -> None:
            more = function.append_basic_block()
            b.cbranch(condition, more, leave)
            b.position_at_end(more)

        def equal(value: Any, expected: int | Any) -> Any:
            expected = self.integer(expected, value.type) if isinstance(expected, int) else expected
            return b.icmp_signed("==", value, expected)

        require(equal(self.field(node, "op", kind=self.i32), OP_FLASH_ATTN_EXT))
        sources = [self.field(node, "src", i, self.bytes) for i in range(5)]
        none = self.ir.Constant(self.bytes, None)
        require(b.icmp_unsigned("!=", sources[3], none))  # a mask
        require(b.icmp_unsigned("==", sources[4], none))  # and no sinks
        q, k, v, mask = sources[:4]
        for tensor, kind, size in ((q, "F32", 4), (k, "F16", 2), (v, "F16", 2), (mask, "F16", 2)):
            require(equal(self.field(tensor, "type", kind=self.i32), TYPE_IDS[kind]))
            require(equal(self.field(tensor, "nb", 0), size))
        for tensor in (q, k, v):
            require(equal(self.field(tensor, "ne", 0), self.head))
        require(equal(self.field(q, "ne", 2), b.mul(self.field(k, "ne", 2), self.integer(self.group))))
        require(equal(self.field(v, "ne", 2), self.field(k, "ne", 2)))
        require(equal(self.field(mask, "ne", 2), 1))
        require(b.icmp_signed("<", self.field(q, "ne", 1), self.integer(FEW)))
        require(equal(b.srem(self.field(k, "ne", 1), self.integer(CELLS)), 0))
        for i in (1, 2):  # biases by distance, and a cap of scores
            require(b.fcmp_ordered("==", self.field(node, "op_params", i, self.f32), self.number(0.0)))
        parameters = TensorStruct.op_params.offset
        self.store(self.field(node, "op_params", 0, self.f32), node, self.integer(parameters + _SCALE))
        self.store(b.ptrtoint(attend, self.i64), node, self.integer(parameters))
        self.store(self.integer(_ALL_THREADS, self.i32), node, self.integer(parameters + 8))
        self.store(self.integer(0), node, self.integer(parameters + 16))
        self.store(self.integer(OP_CUSTOM, self.i32), node, self.integer(TensorStruct.op.offset))
        b.branch(leave)
        b.position_at_end(leave)
        b.ret(go_on)
