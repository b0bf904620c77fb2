"""Quantized weights unpacked as columns: registers whose 16 lanes are 16 rows of weights.

A quad is a lane of four neighbouring integers of a row, so that one instruction (vpdpbusd) multiplies the quads of 16
rows with one of an activation row. Packed bytes are transposed before they are unpacked, since a dword of Q4_K holds
two quads. Block layouts: ggml-common.h and ggml-quants.c of ggml 0.25.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from granite4v.ggml.compiled.writer import LANES, Writer
from granite4v.ggml.types import TYPES

BLOCK = 32  # numbers that share a scale of the activations
QUADS = BLOCK // 4
SUPER = 256  # numbers in a block of K-quants
FOURS = 4 * BLOCK  # numbers of the other types that are unpacked together
OFFSETS = {"Q8_0": -128, "Q4_0": -8, "Q6_K": -32}  # of the unsigned integers; K-quants 4 and 5 have a minimum instead
POWER_BITS = 0x4B000000  # of 2**23 as float32
KINDS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0")


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


def places(kind: str) -> list[int]:
    """The order in which the blocks of a step are unpacked."""
    return [0, 2, 1, 3, 4, 6, 5, 7] if kind == "Q6_K" else list(range(step(kind) // BLOCK))


def larger(kind: str, block: int) -> int:
    """The factor by which the unpacked integers of a block are too large, and its scales too small: bits that stay in
    their place within a byte need no shift."""
    if kind == "Q4_K":
        return 16 if block % 2 else 1
    return 4 if kind == "Q6_K" and block % 4 == 3 else 1


class ColumnUnpacker:
    """Writes the instructions that unpack `step(kind)` weights of 16 rows."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer
        self._by_kind: dict[str, Callable[[], None]] = {
            "Q4_K": self._unpack_q4_k,
            "Q5_K": self._unpack_q5_k,
            "Q6_K": self._unpack_q6_k,
            "Q8_0": self._unpack_q8_0,
            "Q4_0": self._unpack_q4_0,
        }

    def unpack(self, kind: str, rows: Sequence[Any], keep: Callable[[int, Any], None]) -> None:
        """`rows`: the address of the block in each row. `keep` is called with each column and its number as soon as
        it is there, since 32 registers hold few: quads of unsigned integers, then float32 scales of `n_parts` equal
        parts of each `BLOCK`, then what is added for each `BLOCK` times the sum of the activations, where a type has
        that."""
        self.rows, self.keep = rows, keep
        self.n_quads, self.first_least = step(kind) // 4, step(kind) // 4 + step(kind) // BLOCK * n_parts(kind)
        self._by_kind[kind]()

    # --- from memory ---

    def _dwords(self, at: int, n: int) -> list[Any]:
        """4, 8 or 16 dwords of all rows, as columns."""
        kind = self.w.ir.VectorType(self.w.i32, n)
        return self.w.transposed([self.w.load(row, self.w.integer(at), kind, 1) for row in self.rows])

    def _half(self, column: Any, number: int) -> Any:
        """The lower (0) or upper (1) half of each dword, a half-precision number."""
        w, b = self.w, self.w.b
        words = b.trunc(self._bits(column, -16 * number), w.ir.VectorType(w.i16, LANES))
        return b.fpext(b.bitcast(words, w.ir.VectorType(w.half, LANES)), w.vector)

    def _joined(self, columns: Sequence[Any]) -> list[Any]:
        """Quads that begin in the middle of each dword and end in the next one's."""
        pairs = itertools.pairwise(columns)
        return [self.w.b.or_(self._bits(low, -16), self._bits(high, 16)) for low, high in pairs]

    # --- bits ---

    def _bits(self, column: Any, left: int, mask: int = 0xFF) -> Any:
        """Moved left (right where negative), and masked byte by byte."""
        w, b = self.w, self.w.b
        if left:
            by = w.integers([abs(left)] * LANES, w.i32)
            column = b.shl(column, by) if left > 0 else b.lshr(column, by)
        return column if mask == 0xFF else b.and_(column, w.integers([mask * 0x01010101] * LANES, w.i32))

    def _high_byte(self, column: Any, number: int) -> Any:
        """A signed byte of each dword times 2**24, as float32."""
        w, b = self.w, self.w.b
        moved = b.shl(column, w.integers([24 - 8 * number] * LANES, w.i32)) if number < 3 else column
        return b.sitofp(b.and_(moved, w.integers([-1 << 24] * LANES, w.i32)), w.vector)

    def _byte_times(self, column: Any, number: int, factor: Any) -> Any:
        """An unsigned byte of each dword times a number, rounded once: as the last bits of 2**23 a byte is float32."""
        w, b = self.w, self.w.b
        moved = b.lshr(column, w.integers([8 * number] * LANES, w.i32)) if number else column
        masked = b.and_(moved, w.integers([0xFF] * LANES, w.i32))
        with_power = b.bitcast(b.or_(masked, w.integers([POWER_BITS] * LANES, w.i32)), w.vector)
        return w.fma(with_power, factor, b.fmul(factor, w.all(-float(2**23))))

    # --- types ---

    def _read_scales(self, of_odd: float = 1.0) -> Callable[[int], None]:
        """Of Q4_K and Q5_K, whose blocks begin with the scale of scales, that of minima, and eight of both, with 6 bits
        each. Gives a function that keeps those of one block. `of_odd`: what scales of odd blocks are multiplied by."""
        w, b = self.w, self.w.b
        both, low, middle, high = self._dwords(0, 4)
        scale, least = self._half(both, 0), b.fsub(w.all(-0.0), self._half(both, 1))
        by_turns = scale, scale if of_odd == 1.0 else b.fmul(scale, w.all(of_odd))
        scales = [self._bits(low, 0, 0x3F), b.or_(self._bits(high, 0, 0x0F), self._bits(low, -2, 0x30))]
        minima = [self._bits(middle, 0, 0x3F), b.or_(self._bits(high, -4, 0x0F), self._bits(middle, -2, 0x30))]

        def keep(i: int) -> None:
            self.keep(self.n_quads + i, self._byte_times(scales[i // 4], i % 4, by_turns[i % 2]))
            self.keep(self.first_least + i, self._byte_times(minima[i // 4], i % 4, least))

        return keep

    def _unpack_q4_k(self) -> None:
        """The low halves of 32 bytes are a block of 32 numbers, the high ones the next; these stay sixteen times as
        large, and their scale is a sixteenth."""
        keep_scales = self._read_scales(1 / larger("Q4_K", 1))
        for pair in range(4):
            packed = self._dwords(16 + 32 * pair, QUADS)
            for high in range(2):
                for i, each in enumerate(packed):
                    self.keep(QUADS * (2 * pair + high) + i, self._bits(each, 0, 0xF0 if high else 0x0F))
                keep_scales(2 * pair + high)

    def _unpack_q5_k(self) -> None:
        b = self.w.b
        keep_scales = self._read_scales()
        top = self._dwords(16, 8)  # bit i of a byte belongs to block i
        for block in range(8):
            if block % 2 == 0:
                packed = self._dwords(48 + 16 * block, 8)
            for i, (low, bits) in enumerate(zip(packed, top, strict=True)):
                quad = b.or_(self._bits(low, -4 * (block % 2), 0x0F), self._bits(bits, 4 - block, 0x10))
                self.keep(QUADS * block + i, quad)
            keep_scales(block)

    def _unpack_q6_k(self) -> None:
        """Halves of 128 numbers: two low halves of bytes, then two high ones; pairs of bits likewise."""
        b = self.w.b
        last = self._dwords(178, 8)  # 16 scales from the middle of a dword on, and theirs
        fours, scale = self._joined(last[3:]), b.fmul(self._half(last[7], 1), self.w.all(2.0**-24))
        by_four = b.fmul(scale, self.w.all(1 / larger("Q6_K", 3)))
        for block in range(8):  # in the order of `places`
            half, part = divmod(places("Q6_K")[block], 4)
            if block % 4 == 0:
                top = self._dwords(128 + 32 * half, 8)
            if block % 2 == 0:
                packed = self._dwords(64 * half + 32 * (part % 2), 8)
            for i, (low, bits) in enumerate(zip(packed, top, strict=True)):
                if part == 3:  # four times as large, since the upper bits are where they belong then
                    quad = b.or_(self._bits(low, -2, 0x3C), self._bits(bits, 0, 0xC0))
                else:
                    quad = b.or_(self._bits(low, -4 * (part // 2), 0x0F), self._bits(bits, 4 - 2 * part, 0x30))
                self.keep(QUADS * block + i, quad)
            for i in range(2):
                number = 2 * places("Q6_K")[block] + i
                factor = b.fmul(self._high_byte(fours[number // 4], number % 4), by_four if part == 3 else scale)
                self.keep(self.n_quads + 2 * block + i, factor)

    def _unpack_q8_0(self) -> None:
        """A scale, and signed integers: 128 more makes them unsigned."""
        sign = self.w.integers([-0x7F7F7F80] * LANES, self.w.i32)
        for block, dwords in self._split(((0, 8), (32, 8), (64, 8), (96, 8), (128 - 8, 4)), QUADS):
            for i, column in enumerate(dwords):
                self.keep(QUADS * block + i, self.w.b.xor(column, sign))
            self.keep(self.n_quads + block, self.scale)

    def _unpack_q4_0(self) -> None:
        """A scale, and 16 bytes, whose low halves are the first 16 numbers of a block, 8 too large."""
        for block, dwords in self._split(((0, 8), (32, 8), (64 - 8, 4)), 4):
            for high in range(2):
                for i, column in enumerate(dwords):
                    self.keep(QUADS * block + 4 * high + i, self._bits(column, -4 * high, 0x0F))
            self.keep(self.n_quads + block, self.scale)

    def _split(self, pieces: Sequence[tuple[int, int]], n: int) -> Iterator[tuple[int, list[Any]]]:
        """Blocks of a scale, which takes half a dword, and `n` dwords, so that every other block begins in the middle
        of one. `pieces`: where they are, and dwords; the last ends with two new ones."""
        columns: list[Any] = []
        left = iter(pieces)
        for block in range(4):
            pair, is_odd = divmod(block, 2)
            first = (2 * n + 1) * pair + n * is_odd  # the dword with the scale
            while len(columns) < first + n + 1:
                at, n_dwords = next(left)
                columns += self._dwords(at, n_dwords)[2 if n_dwords == 4 else 0 :]
            some = columns[first : first + n + 1]
            self.scale = self._half(some[0], is_odd)
            yield block, some[1:] if is_odd else self._joined(some)
