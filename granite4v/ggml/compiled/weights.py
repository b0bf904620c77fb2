"""Unpacks weights from ggml's blocks to AVX-512 registers. Layouts: ggml-common.h and ggml-quants.c of ggml 0.25.3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from granite4v.ggml.compiled.writer import LANES, Writer

KINDS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "F16")
REGISTER = 64  # bytes
WIDENED = 64  # F16 weights unpacked at once


@dataclass(frozen=True)
class Unpacked:
    """Some weights of a row: float32 vectors for F16, otherwise unsigned 8-bit integers, 64 per register.

    K-quants: `scales` are 16-bit integers, for the products of adjacent pairs of weights; `scale` is the scale of the
    block; `offset` has a float32 for each sixteen weights, to be multiplied with the sum of the row's numbers there.
    A weight is `scale` * its element of `scales` * its integer + its element of `offset`. Q8_0, Q4_0: `scales` has a
    float32 vector for each register of 64 weights; `products.OFFSETS` has the offset that makes the integers signed.
    """

    numbers: list[Any]
    scales: list[Any] = field(default_factory=list)
    offset: Any = None
    scale: Any = None


class Unpackers:
    """Writes the instructions that unpack one block of K-quants, four blocks of Q8_0 or Q4_0, or 64 weights of F16."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer
        self.words = writer.ir.VectorType(writer.i16, 2 * LANES)
        self._by_kind: dict[str, Callable[[Any], Unpacked]] = {
            "Q4_K": self._unpack_q4_k,
            "Q5_K": self._unpack_q5_k,
            "Q6_K": self._unpack_q6_k,
            "Q8_0": self._unpack_q8_0,
            "Q4_0": self._unpack_q4_0,
            "F16": self._widen_f16,
        }

    def unpack(self, kind: str, block: Any) -> Unpacked:
        return self._by_kind[kind](block)

    def _half(self, block: Any, n_bytes: int) -> Any:
        return self.w.b.fpext(self.w.load(block, self.w.integer(n_bytes), self.w.half, 2), self.w.f32)

    def _twice(self, block: Any, n_bytes: int) -> Any:
        """Loads 32 bytes into both halves of a register, as 16-bit integers."""
        w = self.w
        loaded = w.load(block, w.integer(n_bytes), w.ir.VectorType(w.i8, 32), 1)
        return w.b.bitcast(w.picked(loaded, [*range(32)] * 2), self.words)

    def _shifted(self, value: Any, low: int, high: int, mask: int) -> Any:
        """Shifts 16-bit integers left by `low` in the first half of the register and by `high` in the second (right if
        negative), and masks every byte. The mask removes bits that a shift moved in from the neighbouring byte."""
        w, b = self.w, self.w.b
        n = value.type.count // 2
        left, right = ([max(0, sign * one) for one in (low, high)] for sign in (1, -1))
        for move, by in ((b.shl, left), (b.lshr, right)):
            if any(by):
                value = move(value, w.integers([by[0]] * n + [by[1]] * n, w.i16))
        as_bytes = b.bitcast(value, w.ir.VectorType(w.i8, REGISTER))
        return b.and_(as_bytes, w.integers([mask] * REGISTER, w.i8))

    def _six_bits(self, block: Any, n_bytes: int) -> tuple[Any, Any]:
        """Unpacks the 6-bit scales and offsets of the eight parts of a block of Q4_K or Q5_K to 8-bit integers."""
        w, b = self.w, self.w.b
        words = [w.load(block, w.integer(n_bytes + 4 * i), w.i32) for i in range(3)]

        def masked(value: Any, right: int, mask: int) -> Any:
            moved = b.lshr(value, w.integer(right, w.i32)) if right else value
            return b.and_(moved, w.integer(mask, w.i32))

        def joined(low: Any, high: Any) -> Any:
            both = b.or_(b.zext(low, w.i64), b.shl(b.zext(high, w.i64), w.integer(32)))
            return b.bitcast(both, w.ir.VectorType(w.i8, 8))

        six, four, two = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030
        scales = joined(masked(words[0], 0, six), b.or_(masked(words[2], 0, four), masked(words[0], 2, two)))
        offsets = joined(masked(words[1], 0, six), b.or_(masked(words[2], 4, four), masked(words[1], 2, two)))
        return scales, offsets

    def _k_parts(self, block: Any, integers: list[Any]) -> Unpacked:
        """Adds the scales and offsets of a block of Q4_K or Q5_K. It begins with its scale, the scale of the offsets,
        and the scales and offsets of its parts."""
        w, b = self.w, self.w.b
        scales, offsets = self._six_bits(block, 4)
        wide = b.zext(scales, w.ir.VectorType(w.i16, 8))
        by_64 = [w.picked(wide, [2 * j] * 16 + [2 * j + 1] * 16) for j in range(4)]
        of_16 = b.uitofp(b.zext(w.picked(offsets, [i // 2 for i in range(16)]), w.whole), w.vector)
        least = b.fsub(w.number(-0.0), self._half(block, 2))
        return Unpacked(integers, by_64, b.fmul(of_16, w.spread(least)), w.spread(self._half(block, 0)))

    def _unpack_q4_k(self, block: Any) -> Unpacked:
        return self._k_parts(block, [self._shifted(self._twice(block, 16 + 32 * j), 0, -4, 0x0F) for j in range(4)])

    def _unpack_q5_k(self, block: Any) -> Unpacked:
        high = self._twice(block, 16)
        integers = [
            self.w.b.or_(
                self._shifted(self._twice(block, 48 + 32 * j), 0, -4, 0x0F),
                self._shifted(high, 4 - 2 * j, 3 - 2 * j, 0x10),
            )
            for j in range(4)
        ]
        return self._k_parts(block, integers)

    def _unpack_q6_k(self, block: Any) -> Unpacked:
        w, b = self.w, self.w.b
        integers = []
        for i in range(2):
            low = w.load(block, w.integer(64 * i), self.words, 1)
            high = self._twice(block, 128 + 32 * i)
            integers.append(b.or_(self._shifted(low, 0, 0, 0x0F), self._shifted(high, 4, 2, 0x30)))
            integers.append(b.or_(self._shifted(low, -4, -4, 0x0F), self._shifted(high, 0, -2, 0x30)))
        scales = w.load(block, w.integer(192), w.ir.VectorType(w.i8, 16), 1)
        wide = b.sext(scales, w.ir.VectorType(w.i16, 16))
        by_64 = [w.picked(wide, [4 * j + i // 8 for i in range(32)]) for j in range(4)]
        scale = self._half(block, 208)
        offset = b.fmul(b.sitofp(wide, w.vector), w.spread(b.fmul(scale, w.number(-32.0))))
        return Unpacked(integers, by_64, offset, w.spread(scale))

    def _scales(self, block: Any, n_bytes: int) -> list[Any]:
        """Loads the scales that four blocks begin with, as a vector for each two blocks."""
        w, b = self.w, self.w.b
        halves = w.ir.Constant(w.ir.VectorType(w.half, 4), w.ir.Undefined)
        for i in range(4):
            halves = b.insert_element(halves, w.load(block, w.integer(n_bytes * i), w.half, 2), w.integer(i, w.i32))
        scales = b.fpext(halves, w.ir.VectorType(w.f32, 4))
        return [w.picked(scales, [2 * j] * 8 + [2 * j + 1] * 8) for j in range(2)]

    def _unpack_q8_0(self, block: Any) -> Unpacked:
        """Adds 128 to the signed integers, by flipping their top bits, to make them unsigned."""
        w, b = self.w, self.w.b
        integers = []
        for j in range(2):
            kind = w.ir.VectorType(w.i8, 32)
            both = [w.load(block, w.integer(34 * (2 * j + i) + 2), kind, 1) for i in range(2)]
            integers.append(b.xor(w.picked(both[0], range(64), both[1]), w.integers([-128] * REGISTER, w.i8)))
        return Unpacked(integers, self._scales(block, 34))

    def _unpack_q4_0(self, block: Any) -> Unpacked:
        """The low halves of a block's sixteen bytes are its first sixteen weights, the high halves the others; all are
        stored with 8 added."""
        w, b = self.w, self.w.b
        integers = []
        for j in range(2):
            kind = w.ir.VectorType(w.i8, 16)
            both = [w.load(block, w.integer(18 * (2 * j + i) + 2), kind, 1) for i in range(2)]
            places = [*range(16), *range(16), *range(16, 32), *range(16, 32)]
            as_words = b.bitcast(w.picked(both[0], places, both[1]), self.words)
            by = w.integers(([0] * 8 + [4] * 8) * 2, w.i16)
            as_bytes = b.bitcast(b.lshr(as_words, by), w.ir.VectorType(w.i8, REGISTER))
            integers.append(b.and_(as_bytes, w.integers([0x0F] * REGISTER, w.i8)))
        return Unpacked(integers, self._scales(block, 18))

    def _widen_f16(self, block: Any) -> Unpacked:
        w = self.w
        return Unpacked([w.halves(block, w.integer(2 * LANES * j)) for j in range(WIDENED // LANES)])
