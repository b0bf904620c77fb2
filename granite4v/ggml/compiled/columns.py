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

    def _dwords(self, rows: Sequence[Any], *pieces: tuple[int, int]) -> list[Any]:
        """The dwords of all rows as columns. `pieces`: offset and number of dwords of what is put together, which are
        as many each, and 16 at most in all."""
        loaded = [self._joined([self._load(row, at, n) for at, n in pieces]) for row in rows]
        return self.w.transposed(loaded)[: sum(n for _, n in pieces)]

    def _load(self, row: Any, at: int, n: int) -> Any:
        return self.w.load(row, self.w.integer(at), self.w.ir.VectorType(self.w.i32, n), 1)

    def _joined(self, vectors: Sequence[Any]) -> Any:
        """One vector of 16 lanes; those that are left over are undefined."""
        while len(vectors) > 1:
            n = 2 * vectors[0].type.count
            vectors = [self.w.picked(a, range(n), b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        n = vectors[0].type.count
        return vectors[0] if n == LANES else self.w.picked(vectors[0], [i % n for i in range(LANES)])

    def _halves(self, rows: Sequence[Any], at: int) -> Any:
        """One half-precision number of each row."""
        w = self.w
        found = w.ir.Constant(w.ir.VectorType(w.half, LANES), w.ir.Undefined)
        for i, row in enumerate(rows):
            found = w.b.insert_element(found, w.load(row, w.integer(at), w.half, 2), w.integer(i, w.i32))
        return w.b.fpext(found, w.vector)

    # --- bits ---

    def _bits(self, column: Any, left: int, mask: int) -> Any:
        """Moved left (right where negative), and masked byte by byte."""
        w, b = self.w, self.w.b
        if left:
            by = w.integers([abs(left)] * LANES, w.i32)
            column = b.shl(column, by) if left > 0 else b.lshr(column, by)
        return b.and_(column, w.integers([mask * 0x01010101] * LANES, w.i32))

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
        both, low, middle, high = self._dwords(rows, (0, 4))
        as_halves = [b.trunc(each, w.ir.VectorType(w.i16, LANES)) for each in (both, self._moved_down(both))]
        scale, least = (b.fpext(b.bitcast(e, w.ir.VectorType(w.half, LANES)), w.vector) for e in as_halves)
        least = b.fsub(w.all(-0.0), least)
        scales = [self._bits(low, 0, 0x3F), b.or_(self._bits(high, 0, 0x0F), self._bits(low, -2, 0x30))]
        minima = [self._bits(middle, 0, 0x3F), b.or_(self._bits(high, -4, 0x0F), self._bits(middle, -2, 0x30))]
        return Columns(
            quads,
            [b.fmul(self._byte(scales[i // 4], i % 4), scale) for i in range(SUPER // BLOCK)],
            [b.fmul(self._byte(minima[i // 4], i % 4), least) for i in range(SUPER // BLOCK)],
        )

    def _moved_down(self, column: Any) -> Any:
        return self.w.b.lshr(column, self.w.integers([16] * LANES, self.w.i32))

    def _unpack_q4_k(self, rows: Sequence[Any]) -> Columns:
        packed = [*self._dwords(rows, (16, 16)), *self._dwords(rows, (80, 16))]
        quads = []
        for i in range(0, len(packed), QUADS):  # low halves of 32 bytes are a block of 32 numbers, high ones the next
            for left in (0, -4):
                quads += [self._bits(each, left, 0x0F) for each in packed[i : i + QUADS]]
        return self._with_minima(rows, quads)

    def _unpack_q5_k(self, rows: Sequence[Any]) -> Columns:
        b = self.w.b
        high = self._dwords(rows, (16, 8))  # bit i of a byte belongs to block i
        packed = [*self._dwords(rows, (48, 16)), *self._dwords(rows, (112, 16))]
        quads = []
        for i in range(SUPER // BLOCK):
            some = packed[QUADS * (i // 2) : QUADS * (i // 2 + 1)]
            for low, top in zip(some, high, strict=True):
                quads.append(b.or_(self._bits(low, -4 * (i % 2), 0x0F), self._bits(top, 4 - i, 0x10)))
        return self._with_minima(rows, quads)

    def _unpack_q6_k(self, rows: Sequence[Any]) -> Columns:
        b = self.w.b
        high = self._dwords(rows, (128, 16))
        quads = []
        for half in range(2):  # of 128 numbers: two low halves of bytes, then two high ones; pairs of bits likewise
            low, top = self._dwords(rows, (64 * half, 16)), high[QUADS * half : QUADS * (half + 1)]
            for i in range(4):
                some = low[QUADS * (i % 2) : QUADS * (i % 2 + 1)]
                for each, bits in zip(some, top, strict=True):
                    quads.append(b.or_(self._bits(each, -4 * (i // 2), 0x0F), self._bits(bits, 4 - 2 * i, 0x30)))
        scale = self._halves(rows, 208)
        fours = self._dwords(rows, (192, 4))
        return Columns(quads, [b.fmul(self._byte(fours[i // 4], i % 4, signed=True), scale) for i in range(16)])

    def _unpack_q8_0(self, rows: Sequence[Any]) -> Columns:
        """Signed integers: 128 more makes them unsigned."""
        w = self.w
        sign = w.integers([-0x7F7F7F80] * LANES, w.i32)
        quads = []
        for i in (0, 2):
            both = self._dwords(rows, (34 * i + 2, 8), (34 * (i + 1) + 2, 8))
            quads += [w.b.xor(each, sign) for each in both]
        return Columns(quads, [self._halves(rows, 34 * i) for i in range(4)])

    def _unpack_q4_0(self, rows: Sequence[Any]) -> Columns:
        """The low halves of 16 bytes are the first 16 numbers of a block, 8 too large."""
        packed = self._dwords(rows, *((18 * i + 2, 4) for i in range(4)))
        quads = []
        for i in range(4):
            for left in (0, -4):
                quads += [self._bits(each, left, 0x0F) for each in packed[4 * i : 4 * i + 4]]
        return Columns(quads, [self._halves(rows, 18 * i) for i in range(4)])
