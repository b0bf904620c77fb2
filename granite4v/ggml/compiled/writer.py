"""Writes functions on ggml tensors in LLVM IR, and compiles them for this CPU (the extra 'llvm')."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from granite4v.ggml.compiled import object_cache
from granite4v.ggml.declarations import TensorStruct

LANES = 16  # float32 lanes of an AVX-512 register; there are 32 registers
LEAST = -86.0  # smallest argument of `exponential`; below it the result is zero
# Byte offset in op_params that a replaced node's first parameter moves to: struct ggml_custom_op_params takes the first
# 24 of the 64 bytes.
SCALE_PLACE = 32


@functools.cache
def llvm() -> Any:
    """Returns llvmlite's binding module, ready to compile for this machine; None if it is not installed or too old."""
    try:
        from llvmlite import binding
    except (ImportError, OSError):
        return None
    if not hasattr(binding, "create_pass_builder"):  # too old; another package has installed it
        return None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding


@functools.cache
def version() -> str:
    """Returns LLVM's version, such as '20.1.8'; empty if it is not installed."""
    binding = llvm()
    return "" if binding is None else ".".join(map(str, binding.llvm_version_info))


def compiled(write: Callable[[], str], what: str | None) -> Any:
    """Compiles a module; returns LLVM's execution engine. Its function addresses stay valid until the process ends.

    `write` returns the module's text. `what` names everything the text depends on besides this package's sources: it is
    part of the key of the object cache, which spares later processes writing and compiling it. None: the text is only
    valid in this process, and is not cached. Raises RuntimeError if LLVM fails.
    """
    binding = llvm()
    features = binding.get_host_cpu_features()
    if "prefer-256-bit" in features:
        features["prefer-256-bit"] = False
    cpu = binding.get_host_cpu_name(), features.flatten()
    with _LOCK:
        machine = binding.Target.from_default_triple().create_target_machine(cpu=cpu[0], features=cpu[1], opt=3)
        key = None if what is None or SOURCES is None else _key(SOURCES, binding.get_default_triple(), *cpu, what)
        code = None if key is None else object_cache.find(key)
        if code is None:
            module = binding.parse_assembly(write())
            module.verify()
            builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
            builder.getModulePassManager().run(module, builder)
            code = machine.emit_object(module)
            if key is not None:
                object_cache.keep(key, code)
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _ENGINES.append(engine)
    return engine


def _key(*what: str) -> str:
    """Hashes what compiled code depends on, LLVM's version included, to a cache key."""
    return hashlib.sha256(json.dumps([version(), *what]).encode()).hexdigest()


def _sources_digest() -> str | None:
    """Hashes the sources that write kernels; None if they cannot be read."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    try:
        for path in [*sorted(here.glob("*.py")), here.parent / "declarations.py", here.parent / "types.py"]:
            digest.update(path.read_bytes())
    except OSError:
        return None
    return digest.hexdigest()


SOURCES = _sources_digest()  # read at import: the files may change while the process runs
_LOCK = threading.Lock()
_ENGINES: list[Any] = []  # keeps compiled code alive for good, since its addresses are stored in many places


class Writer:
    """Emits LLVM IR: numbers, memory access and loops. A "vector" is a register of `LANES` float32.

    Apart from constants, methods take and return IR values of the function that is being written, whose builder is `b`.
    The IR types `vector` and `whole` are `LANES` float32 and `LANES` int32; `bytes` is a pointer to bytes.
    """

    def __init__(self) -> None:
        from llvmlite import ir

        self.ir = ir
        self.i1, self.i8, self.i16, self.i32, self.i64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
        self.f32, self.half = ir.FloatType(), ir.HalfType()
        self.vector, self.whole = ir.VectorType(self.f32, LANES), ir.VectorType(self.i32, LANES)
        self.bytes = self.i8.as_pointer()
        self.module = ir.Module("granite4v")
        self.b: Any = ir.IRBuilder()
        self._declared: dict[str, Any] = {}

    def declare(self, name: str, result: Any, *arguments: Any) -> Any:
        """Declares a function, once per module: one that the module defines, a C function or an LLVM intrinsic."""
        if name not in self._declared:
            self._declared[name] = self.ir.Function(self.module, self.ir.FunctionType(result, arguments), name)
        return self._declared[name]

    def begin(self, name: str, result: Any, *arguments: Any) -> Any:
        """Starts a function; instructions are added to it from now on. Returns it."""
        function = self.declare(name, result, *arguments)
        function.attributes.add("nounwind")  # llvmlite drops the alignstack attribute if there is no other
        function.attributes.alignstack = 4 * LANES  # otherwise spilled registers straddle cache lines
        self.b = self.ir.IRBuilder(function.append_basic_block())
        return function

    # --- numbers ---

    def integer(self, value: int, kind: Any = None) -> Any:
        return self.ir.Constant(kind or self.i64, value)

    def number(self, value: float) -> Any:
        return self.ir.Constant(self.f32, ctypes.c_float(value).value)

    def all(self, value: float) -> Any:
        return self.ir.Constant(self.vector, [self.number(value)] * LANES)

    def integers(self, values: Sequence[int], kind: Any) -> Any:
        return self.ir.Constant(self.ir.VectorType(kind, len(values)), list(values))

    def spread(self, value: Any, n: int = LANES) -> Any:
        """Broadcasts a value to a vector of `n` elements."""
        empty = self.ir.Constant(self.ir.VectorType(value.type, n), self.ir.Undefined)
        one = self.b.insert_element(empty, value, self.integer(0, self.i32))
        return self.picked(one, [0] * n)

    def picked(self, vector: Any, places: Sequence[int], other: Any = None) -> Any:
        """Shuffles: picks elements of `vector` by index; indices past its end pick from `other`."""
        if other is None:
            other = self.ir.Constant(vector.type, self.ir.Undefined)
        return self.b.shuffle_vector(vector, other, self.integers(places, self.i32))

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """Columns of 16 rows of 4, 8 or 16 elements: blocks of four elements are gathered from four rows each, and
        transposed in place, with instructions that most execution units have."""
        n = rows[0].type.count
        blocks: list[list[Any]] = [[] for _ in range(n // 4)]
        for i in range(4):
            pairs = [(rows[i], rows[4 + i]), (rows[8 + i], rows[12 + i])]
            if n == LANES:
                halves = [[*range(first, first + 8), *range(n + first, n + first + 8)] for first in (0, 8)]
                sources = [[self.picked(a, places, b) for a, b in pairs] for places in halves]
            else:
                sources = [[self.picked(a, range(2 * n), b) for a, b in pairs]]
            n_of_one = len(blocks) // len(sources)
            for j, block in enumerate(blocks):
                a, b = sources[j // n_of_one]
                width, at = a.type.count, 4 * (j % n_of_one)
                places = [part + at + k for part in range(0, 2 * width, width // 2) for k in range(4)]
                block.append(self.picked(a, places, b))
        return [column for block in blocks for column in self._transposed_fours(block)]

    def _transposed_fours(self, rows: Sequence[Any]) -> list[Any]:
        """Four vectors, transposed in each four of their elements."""

        def both(a: Any, b: Any, low: Sequence[int], high: Sequence[int]) -> list[Any]:
            fours = range(0, LANES, 4)
            return [
                self.picked(a, [at + (place & 3) + LANES * (place >> 2) for at in fours for place in places], b)
                for places in (low, high)
            ]

        pairs = [both(rows[i], rows[i + 1], (0, 4, 1, 5), (2, 6, 3, 7)) for i in (0, 2)]
        return [column for a, b in zip(*pairs, strict=True) for column in both(a, b, (0, 1, 4, 5), (2, 3, 6, 7))]

    def fma(self, a: Any, x: Any, y: Any) -> Any:
        """Vector a * x + y, rounded once."""
        v = self.vector
        return self.b.call(self.declare("llvm.fma.v16f32", v, v, v, v), [a, x, y])

    def rounded(self, vector: Any) -> Any:
        """Rounds a vector to the nearest integers, ties to even; the result is float32."""
        return self.b.call(self.declare("llvm.rint.v16f32", self.vector, self.vector), [vector])

    def larger(self, a: Any, b: Any) -> Any:
        """Elementwise maximum. LLVM's own also checks for NaNs, and its maximum of one vector goes lane by lane."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def largest(self, vector: Any) -> Any:
        for distance in (8, 4, 2, 1):
            vector = self.larger(vector, self.picked(vector, [lane ^ distance for lane in range(LANES)]))
        return self.b.extract_element(vector, self.integer(0, self.i32))

    def least(self, a: Any, b: Any) -> Any:
        """Minimum of two integers."""
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def total(self, vector: Any) -> Any:
        function = self.declare("llvm.vector.reduce.fadd.v16f32", self.f32, self.f32, self.vector)
        return self.b.call(function, [self.number(-0.0), vector], fastmath=("reassoc",))

    def absolute(self, vector: Any) -> Any:
        return self.b.call(self.declare("llvm.fabs.v16f32", self.vector, self.vector), [vector])

    def whole_total(self, integers: Any) -> Any:
        return self.b.call(self.declare("llvm.vector.reduce.add.v16i32", self.i32, self.whole), [integers])

    def fours_added(self, to: Any, unsigned: Any, signed: Any) -> Any:
        """vpdpbusd: adds to each int32 lane the four products of its 8-bit integers, `unsigned` times `signed`."""
        function = self.declare("llvm.x86.avx512.vpdpbusd.512", self.whole, self.whole, self.whole, self.whole)
        return self.b.call(function, [to, self.b.bitcast(unsigned, self.whole), signed])

    def exponential(self, x: Any) -> Any:
        """Vector exp(x) for x up to 0, within two units in the last place; 0 below `LEAST`.

        Computes 2**n * p(r) with x = n * log(2) + r and |r| up to log(2) / 2, where p has degree 7: the minimax
        coefficients of Cephes's expf (S. Moshier).
        """
        b = self.b
        is_small = b.fcmp_ordered("<", x, self.all(LEAST))
        x = b.select(is_small, self.all(LEAST), x)
        n = self.rounded(b.fmul(x, self.all(1.44269504088896341)))
        r = self.fma(n, self.all(-0.693359375), x)  # log(2) in two parts: this difference is exact
        r = self.fma(n, self.all(2.12194440e-4), r)
        y = self.all(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            y = self.fma(y, r, self.all(coefficient))
        y = b.fadd(self.fma(y, b.fmul(r, r), r), self.all(1.0))
        biased = b.add(b.fptosi(n, self.whole), self.integers([127] * LANES, self.i32))
        power = b.bitcast(b.shl(biased, self.integers([23] * LANES, self.i32)), self.vector)
        return b.select(is_small, self.all(0.0), b.fmul(y, power))

    def as_integers(self, values: Sequence[Any]) -> tuple[list[Any], Any, Any]:
        """Quantizes two vectors together to 8-bit integers; the value furthest from zero becomes 127 or -127. Returns
        the integers (in int32 lanes), their scale and their sum."""
        b = self.b
        largest = self.largest(self.larger(*(self.absolute(value) for value in values)))
        is_zero = b.fcmp_ordered("<", largest, self.number(1e-30))
        factor = self.spread(b.select(is_zero, self.number(0.0), b.fdiv(self.number(127.0), largest)))
        integers = [b.fptosi(self.rounded(b.fmul(value, factor)), self.whole) for value in values]
        return integers, b.fdiv(largest, self.number(127.0)), self.whole_total(b.add(*integers))

    # --- memory ---

    def on_stack(self, n_bytes: int) -> Any:
        """Allocates stack memory, valid until the function returns, aligned to 64 bytes."""
        room = self.b.alloca(self.i8, self.integer(n_bytes))
        room.align = 4 * LANES
        return room

    def load(self, base: Any, n_bytes: Any, kind: Any, align: int = 4) -> Any:
        value = self.b.load(self.b.bitcast(self.b.gep(base, [n_bytes]), kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Any, base: Any, n_bytes: Any, align: int = 4) -> None:
        self.b.store(value, self.b.bitcast(self.b.gep(base, [n_bytes]), value.type.as_pointer())).align = align

    def prefetch(self, base: Any, n_bytes: int) -> None:
        """Prefetches `n_bytes` by cache lines of 64 bytes. A barrier keeps the request at this place in the code: LLVM
        would otherwise move all prefetches of a loop to its head."""
        function = self.declare("llvm.prefetch.p0", self.ir.VoidType(), self.bytes, self.i32, self.i32, self.i32)
        to_read, keep, data = (self.integer(value, self.i32) for value in (0, 3, 1))
        for place in range(0, n_bytes, 64):
            self.b.call(function, [self.b.gep(base, [self.integer(place)]), to_read, keep, data])
        self.b.asm(self.ir.FunctionType(self.ir.VoidType(), []), "", "~{memory}", [], side_effect=True)

    def halves(self, base: Any, n_bytes: Any) -> Any:
        """Loads `LANES` half-precision values as a vector."""
        return self.b.fpext(self.load(base, n_bytes, self.ir.VectorType(self.half, LANES), 2), self.vector)

    def field(self, tensor: Any, name: str, index: int = 0, kind: Any = None) -> Any:
        """Loads a field of a `struct ggml_tensor`, or element `index` of an array field."""
        kind = kind or self.i64
        size = {self.i64: 8, self.bytes: 8, self.i32: 4, self.f32: 4}[kind]
        offset = getattr(TensorStruct, name).offset + size * index
        return self.load(tensor, self.integer(offset), kind, size)

    def at(self, tensor: Any, *places: tuple[int, Any]) -> Any:
        """Address in a tensor's data of the element at these (dimension, index) pairs."""
        b, address = self.b, self.field(tensor, "data", kind=self.bytes)
        for dimension, place in places:
            address = b.gep(address, [b.mul(place, self.field(tensor, "nb", dimension))])
        return address

    @contextmanager
    def loop(self, start: Any, end: Any, step: Any, values: Sequence[Any] = ()) -> Iterator[tuple[Any, list[Any]]]:
        """Emits `for i in range(start, end, step)`; the `with` block emits the body.

        The body gets `i` and a list `turn` with the loop-carried values at the start of an iteration, first `values`.
        It assigns their new values to the elements of `turn`. After the block `turn` holds the final ones. A sum of i:

            with w.loop(w.integer(0), n, w.integer(1), [w.integer(0)]) as (i, turn):
                turn[0] = w.b.add(turn[0], i)
            total = turn[0]
        """
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
