"""Quantized weights unpacked as columns: registers whose 16 lanes are 16 rows of weights.

A quad is a lane of four neighbouring integers of a row, so that one instruction (vpdpbusd) multiplies the quads of 16
rows with one of an activation row. Packed bytes are transposed before they are unpacked, since a dword of Q4_K holds
two quads. Block layouts: ggml-common.h and ggml-quants.c of ggml 0.25.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from granite4v.ggml.compiled.writer import LANES, Writer
from granite4v.ggml.types import TYPES

BLOCK = 32  # numbers that share a scale of the activations
QUADS = BLOCK // 4
SUPER = 256  # numbers in a block of K-quants
FOURS = 4 * BLOCK  # numbers of the other types that are unpacked together
OFFSETS = {"Q8_0": -128, "Q4_0": -8, "Q6_K": -32}  # of the unsigned integers; K-quants 4 and 5 have a minimum instead
KINDS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0")


@dataclass(frozen=True)
class Columns:
    """16 rows of `step(kind)` weights: unsigned quads, float32 scales of `n_parts` equal parts of each `BLOCK`, and
    what is added for each `BLOCK`, times the sum of the activations (minus the minimum), where a type has that."""

    quads: list[Any] = field(default_factory=list)
    scales: list[Any] = field(default_factory=list)
    least: list[Any] = field(default_factory=list)


def step(kind: str) -> int:
    """Weights of a row that are unpacked together."""
    return SUPER if kind.endswith("_K") else FOURS


def step_bytes(kind: str) -> int:
    return step(kind) // TYPES[kind].block * TYPES[kind].nbytes


def n_parts(kind: str) -> int:
    """Scales of weights in each `BLOCK`."""
    return 2 if kind == "Q6_K" else 1


def has_least(kind: str) -> bool:
    return kind not in OFFSETS


def n_columns(kind: str) -> int:
    return step(kind) // 4 + step(kind) // BLOCK * (n_parts(kind) + has_least(kind))


class ColumnUnpacker:
    """Writes the instructions that unpack `step(kind)` weights of 16 rows."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer
        self._by_kind: dict[str, Callable[[Sequence[Any]], Columns]] = {
            "Q4_K": self._unpack_q4_k,
            "Q5_K": self._unpack_q5_k,
            "Q6_K": self._unpack_q6_k,
            "Q8_0": self._unpack_q8_0,
            "Q4_0": self._unpack_q4_0,
        }

    def unpack(self, kind: str, rows: Sequence[Any]) -> Columns:
        """`rows`: the address of the block in each row."""
        return self._by_kind[kind](rows)

    # --- from memory ---

    def _dwords(self, rows: Sequence[Any], at: int, n: int) -> list[Any]:
        """4, 8 or 16 dwords of all rows, as columns."""
        kind = self.w.ir.VectorType(self.w.i32, n)
        return self.w.transposed([self.w.load(row, self.w.integer(at), kind, 1) for row in rows])

    def _half(self, column: Any, number: int) -> Any:
        """The lower (0) or upper (1) half of each dword, a half-precision number."""
        w, b = self.w, self.w.b
        words = b.trunc(self._bits(column, -16 * number), w.ir.VectorType(w.i16, LANES))
        return b.fpext(b.bitcast(words, w.ir.VectorType(w.half, LANES)), w.vector)

    def _joined(self, columns: Sequence[Any]) -> list[Any]:
        """Quads that begin in the middle of each dword and end in the next one's."""
        pairs = zip(columns, columns[1:], strict=False)
        return [self.w.b.or_(self._bits(low, -16), self._bits(high, 16)) for low, high in pairs]

    # --- bits ---

    def _bits(self, column: Any, left: int, mask: int = 0xFF) -> Any:
        """Moved left (right where negative), and masked byte by byte."""
        w, b = self.w, self.w.b
        if left:
            by = w.integers([abs(left)] * LANES, w.i32)
            column = b.shl(column, by) if left > 0 else b.lshr(column, by)
        return column if mask == 0xFF else b.and_(column, w.integers([mask * 0x01010101] * LANES, w.i32))

    def _byte(self, column: Any, number: int, *, signed: bool = False) -> Any:
        """A byte of each dword, as float32."""
        w, b = self.w, self.w.b
        if signed:
            moved = b.shl(column, w.integers([24 - 8 * number] * LANES, w.i32))
            return b.sitofp(b.ashr(moved, w.integers([24] * LANES, w.i32)), w.vector)
        moved = b.lshr(column, w.integers([8 * number] * LANES, w.i32))
        return b.sitofp(b.and_(moved, w.integers([0xFF] * LANES, w.i32)), w.vector)

    # --- types ---

    def _with_minima(self, rows: Sequence[Any], quads: list[Any]) -> Columns:
        """Of Q4_K and Q5_K, whose blocks begin with the scale of scales, that of minima, and eight of both, with 6 bits
        each."""
        w, b = self.w, self.w.b
        both, low, middle, high = self._dwords(rows, 0, 4)
        scale, least = self._half(both, 0), b.fsub(w.all(-0.0), self._half(both, 1))
        scales = [self._bits(low, 0, 0x3F), b.or_(self._bits(high, 0, 0x0F), self._bits(low, -2, 0x30))]
        minima = [self._bits(middle, 0, 0x3F), b.or_(self._bits(high, -4, 0x0F), self._bits(middle, -2, 0x30))]
        return Columns(
            quads,
            [b.fmul(self._byte(scales[i // 4], i % 4), scale) for i in range(SUPER // BLOCK)],
            [b.fmul(self._byte(minima[i // 4], i % 4), least) for i in range(SUPER // BLOCK)],
        )

    def _unpack_q4_k(self, rows: Sequence[Any]) -> Columns:
        packed = [*self._dwords(rows, 16, 16), *self._dwords(rows, 80, 16)]
        quads = []
        for i in range(0, len(packed), QUADS):  # low halves of 32 bytes are a block of 32 numbers, high ones the next
            for left in (0, -4):
                quads += [self._bits(each, left, 0x0F) for each in packed[i : i + QUADS]]
        return self._with_minima(rows, quads)

    def _unpack_q5_k(self, rows: Sequence[Any]) -> Columns:
        b = self.w.b
        high = self._dwords(rows, 16, 8)  # bit i of a byte belongs to block i
        packed = [*self._dwords(rows, 48, 16), *self._dwords(rows, 112, 16)]
        quads = []
        for i in range(SUPER // BLOCK):
            some = packed[QUADS * (i // 2) : QUADS * (i // 2 + 1)]
            for low, top in zip(some, high, strict=True):
                quads.append(b.or_(self._bits(low, -4 * (i % 2), 0x0F), self._bits(top, 4 - i, 0x10)))
        return self._with_minima(rows, quads)

    def _unpack_q6_k(self, rows: Sequence[Any]) -> Columns:
        b = self.w.b
        high = self._dwords(rows, 128, 16)
        quads = []
        for half in range(2):  # of 128 numbers: two low halves of bytes, then two high ones; pairs of bits likewise
            low, top = self._dwords(rows, 64 * half, 16), high[QUADS * half : QUADS * (half + 1)]
            for i in range(4):
                some = low[QUADS * (i % 2) : QUADS * (i % 2 + 1)]
                for each, bits in zip(some, top, strict=True):
                    quads.append(b.or_(self._bits(each, -4 * (i // 2), 0x0F), self._bits(bits, 4 - 2 * i, 0x30)))
        last = self._dwords(rows, 178, 8)  # 16 scales from the middle of a dword on, and theirs
        fours, scale = self._joined(last[3:]), self._half(last[7], 1)
        return Columns(quads, [b.fmul(self._byte(fours[i // 4], i % 4, signed=True), scale) for i in range(16)])

    def _unpack_q8_0(self, rows: Sequence[Any]) -> Columns:
        """A scale, and signed integers: 128 more makes them unsigned."""
        w = self.w
        sign = w.integers([-0x7F7F7F80] * LANES, w.i32)
        loaded = [*self._dwords(rows, 0, 16), *self._dwords(rows, 64, 16), *self._dwords(rows, 120, 4)[2:]]
        quads, scales = self._scales_and_quads(loaded, QUADS)
        return Columns([w.b.xor(each, sign) for each in quads], scales)

    def _unpack_q4_0(self, rows: Sequence[Any]) -> Columns:
        """A scale, and 16 bytes, whose low halves are the first 16 numbers of a block, 8 too large."""
        loaded = [*self._dwords(rows, 0, 16), *self._dwords(rows, 56, 4)[2:]]
        packed, scales = self._scales_and_quads(loaded, 4)
        quads = []
        for i in range(0, len(packed), 4):
            for left in (0, -4):
                quads += [self._bits(each, left, 0x0F) for each in packed[i : i + 4]]
        return Columns(quads, scales)

    def _scales_and_quads(self, loaded: Sequence[Any], n: int) -> tuple[list[Any], list[Any]]:
        """Of blocks that begin with their scale, which takes half a dword, so that every other one begins in the middle
        of one. `n`: dwords of a block beside the scale."""
        quads, scales = [], []
        for first in range(0, len(loaded), 2 * n + 1):
            one, other = loaded[first : first + n + 1], loaded[first + n + 1 : first + 2 * n + 1]
            quads += [*self._joined(one), *other]
            scales += [self._half(one[0], 0), self._half(one[n], 1)]
        return quads, scales
