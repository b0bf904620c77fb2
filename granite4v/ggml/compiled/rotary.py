"""The rotary embedding (RoPE) with the angles that transformers computes, for comparing values with it.

Both transformers and ggml round angles to float32, an error of up to a thousandth of a radian at positions around
8,000, but not in the same way: transformers multiplies the position by each pair's frequency, ggml multiplies each
pair's angle by a factor to get the next pair's. Here the angles are those of transformers. Their cosines and sines are
the nearest float32, and products and sums are rounded one by one, as in transformers.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

from granite4v.ggml.compiled.writer import Writer
from granite4v.ggml.declarations import TensorStruct

MAX_NUMBERS = 1024  # rotated numbers of a head at most
NEIGHBOURS, HALVES = 0, 2  # GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX: which numbers of a head form a pair
N_DIMS, MODE, BASE, SCALE, EXTENSION, MAGNITUDE = 1, 2, 5, 6, 7, 8  # indices in op_params of ggml's operation
# Byte offsets in op_params to which parameters move that ggml's custom operation would overwrite; only other modes have
# parameters there.
MOVED = {N_DIMS: 44, MODE: 48, BASE: 52}
FLOAT = 4  # bytes
LIBRARY = {"pow": 2, "cos": 1, "sin": 1}  # C functions and their numbers of arguments; all float64


def is_available() -> bool:
    """Whether this process has C's mathematical functions; works on any CPU."""
    return len(_addresses()) == len(LIBRARY)


@functools.cache
def _addresses() -> dict[str, int]:
    """Finds the addresses of the functions in `LIBRARY`. Kernels call these, since LLVM ends the process when it cannot
    find a function by name."""
    process = ctypes.CDLL(None if os.name == "posix" else "msvcrt")
    found = {name: getattr(process, name) for name in LIBRARY if hasattr(process, name)}
    return {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in found.items()}


class Rotary:
    """Writes the operation. A thread's task is one position, with all its heads."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer

    def write(self) -> Any:
        """Writes a ggml_custom_op_t: void (struct ggml_tensor * dst, int ith, int nth, void * userdata).

        `dst` may share the source's memory: each pair is read before it is written.
        """
        w = self.w
        function = w.begin("rotate", w.ir.VoidType(), w.bytes, w.i32, w.i32, w.bytes)
        self.target, ith, nth, _ = function.args
        b = w.b
        self.source, positions = (w.field(self.target, "src", i, w.bytes) for i in range(2))
        self.n_pairs = b.sdiv(b.sext(self._parameter(N_DIMS, w.i32), w.i64), w.integer(2))
        self.frequencies, self.cosines, self.sines = (w.on_stack(FLOAT * MAX_NUMBERS // 2) for _ in range(3))
        self._find_frequencies()
        is_halves = b.icmp_signed("==", self._parameter(MODE, w.i32), w.integer(HALVES, w.i32))
        self.step = b.select(is_halves, w.integer(1), w.integer(2))  # from one pair's first number to the next pair's
        self.apart = b.select(is_halves, self.n_pairs, w.integer(1))  # from a pair's first number to its second
        n_places, n_heads = w.field(self.source, "ne", 2), w.field(self.source, "ne", 1)
        n_tasks = b.mul(n_places, w.field(self.source, "ne", 3))
        with w.loop(b.sext(ith, w.i64), n_tasks, b.sext(nth, w.i64)) as (task, _turn):
            place, stream = b.srem(task, n_places), b.sdiv(task, n_places)
            self._find_turns(w.load(w.at(positions, (0, place)), w.integer(0), w.i32))
            with w.loop(w.integer(0), n_heads, w.integer(1)) as (head, _turn):
                self._turn(*(w.at(each, (1, head), (2, place), (3, stream)) for each in (self.source, self.target)))
        b.ret_void()
        return function

    def _parameter(self, slot: int, kind: Any) -> Any:
        w = self.w
        place = MOVED.get(slot, 4 * slot)
        return w.load(self.target, w.integer(TensorStruct.op_params.offset + place), kind)

    def _find_frequencies(self) -> None:
        """Computes each pair's frequency: 1 / base^(2j / n), divided by a factor for all pairs, and by the pair's own
        factor if there are any. Each step is rounded to float32, as in transformers' `compute_default_rope_parameters`
        and `modeling_rope_utils`."""
        w, b, one = self.w, self.w.b, self.w.number(1.0)
        base, n = self._parameter(BASE, w.f32), b.sitofp(b.mul(self.n_pairs, w.integer(2)), w.f32)
        factor_of_all = b.fdiv(one, self._parameter(SCALE, w.f32))
        with self._pairs() as (j, _turn):
            exponent = b.fdiv(b.sitofp(b.mul(j, w.integer(2)), w.f32), n)
            frequency = b.fdiv(b.fdiv(one, self._library("pow", base, exponent)), factor_of_all)
            w.store(frequency, self.frequencies, self._place(j))
        factors = w.field(self.target, "src", 2, w.bytes)
        with b.if_then(b.icmp_unsigned("!=", factors, w.ir.Constant(w.bytes, None))):
            own = w.at(factors)
            with self._pairs() as (j, _turn):
                frequency = w.load(self.frequencies, self._place(j), w.f32)
                w.store(b.fdiv(frequency, w.load(own, self._place(j), w.f32)), self.frequencies, self._place(j))

    def _find_turns(self, position: Any) -> None:
        w, b = self.w, self.w.b
        position = b.sitofp(position, w.f32)
        with self._pairs() as (j, _turn):
            angle = b.fmul(position, w.load(self.frequencies, self._place(j), w.f32))
            for name, found in (("cos", self.cosines), ("sin", self.sines)):
                w.store(self._library(name, angle), found, self._place(j))

    def _turn(self, source: Any, target: Any) -> None:
        """Rotates the pairs of one head and copies the numbers after them."""
        w, b = self.w, self.w.b
        with self._pairs() as (j, _turn):
            first = b.mul(j, self.step)
            places = [self._place(i) for i in (first, b.add(first, self.apart))]
            x, y = (w.load(source, place, w.f32) for place in places)
            cosine, sine = (w.load(found, self._place(j), w.f32) for found in (self.cosines, self.sines))
            w.store(b.fsub(b.fmul(x, cosine), b.fmul(y, sine)), target, places[0])
            w.store(b.fadd(b.fmul(x, sine), b.fmul(y, cosine)), target, places[1])
        n_turned = b.mul(self.n_pairs, w.integer(2))
        with w.loop(n_turned, w.field(self.source, "ne", 0), w.integer(1)) as (i, _turn):
            w.store(w.load(source, self._place(i), w.f32), target, self._place(i))

    def _pairs(self) -> Any:
        return self.w.loop(self.w.integer(0), self.n_pairs, self.w.integer(1))

    def _place(self, i: Any) -> Any:
        return self.w.b.mul(i, self.w.integer(FLOAT))

    def _library(self, name: str, *arguments: Any) -> Any:
        """Calls a C function in float64 on float32 values; rounds the result to the nearest float32, or nearly so."""
        w, b = self.w, self.w.b
        double = w.ir.DoubleType()
        kind = w.ir.FunctionType(double, [double] * LIBRARY[name]).as_pointer()
        function = b.inttoptr(w.integer(_addresses()[name]), kind)
        return b.fptrunc(b.call(function, [b.fpext(argument, double) for argument in arguments]), w.f32)
