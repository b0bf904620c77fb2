"""The memory of KV cells that hold nothing, which is given back to the system.

llama.cpp writes zeros to its whole KV cache when it makes it, and copies a sequence with all the cells that it has room
for. A sequence of a 4B model takes 0.15 GB so, and holds on average three quarters of that. Pages of Linux that were
given back read as zeros again, which is what llama.cpp had written there, and take memory when a cell is written.

No function of llama.cpp tells where the cache lies, or how. The buffer is seen when ggml allocates it; its layout is
known (for each layer the keys, then the values, of one sequence after the other, cell by cell), and checked by the
pages that the first batch has written: a cache of another layout, as one with transposed values, is left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from granite4v.ggml.backend import buffer_type_name
from granite4v.ggml.declarations import BufferP
from granite4v.ggml.library import lib as ggml

PADDING = 256  # llama.cpp's attention reads cells up to a multiple of that
MIN_BYTES = 32 << 20  # of a cache: a smaller one is not worth the calls
CHECKED_BYTES = 4 * mmap.PAGESIZE  # of a tensor: what must have been written to tell one layout from another
RETURN_EVERY_S = 0.02  # while a cache is cleared, by some gigabytes a second
LEAST_CELLS = 128  # that are given back: fewer are soon written again


class _BufferType(ctypes.Structure):
    """The beginning of struct ggml_backend_buffer_type (ggml-backend-impl.h)"""

    _fields_ = [
        ("get_name", ctypes.c_void_p),
        ("alloc_buffer", ctypes.c_void_p),
        ("get_alignment", ctypes.c_void_p),
    ]


_ALLOCATES = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def cpu_buffers(is_cleared: Callable[[int], bool] = lambda n_bytes: False) -> Iterator[list[tuple[int, int]]]:
    """Where the buffers begin that ggml allocates on the CPU inside the block, by any thread, and their bytes.

    `is_cleared(n_bytes)`: whether nothing but zeros is written to such a buffer inside the block. Its pages are given
    back while that goes on, so that they never are in memory all at once.
    """
    found: list[tuple[int, int]] = []
    buffer_type = _cpu_buffer_type()
    if buffer_type is None:
        yield found
        return
    with _ONE_AT_A_TIME:
        address = buffer_type.alloc_buffer
        original = _ALLOCATES(address)

        def allocate(which: int, n_bytes: int) -> int | None:
            buffer: int | None = original(which, n_bytes)
            if buffer:
                start = int(ggml().ggml_backend_buffer_get_base(BufferP(buffer)))
                found.append((start, n_bytes))
                if is_cleared(n_bytes):
                    returning.enter_context(_returned_meanwhile(start, start + n_bytes))
            return buffer

        watching = _ALLOCATES(allocate)
        buffer_type.alloc_buffer = ctypes.cast(watching, ctypes.c_void_p).value
        with contextlib.ExitStack() as returning:
            try:
                yield found
            finally:
                buffer_type.alloc_buffer = address


def _cpu_buffer_type() -> Any:
    """The CPU's buffer type, to be changed in place; None where pages cannot be given back, or where the structure is
    not the one that is declared here: its functions answer otherwise than ggml's own."""
    if not sys.platform.startswith("linux"):
        return None
    device = next(
        device
        for device in map(ggml().ggml_backend_dev_get, range(ggml().ggml_backend_dev_count()))
        if ggml().ggml_backend_dev_type(device) == 0
    )
    handle = ggml().ggml_backend_dev_buffer_type(device)
    found = _BufferType.from_address(handle.value)
    name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(found.get_name)(handle)
    return found if name is not None and name.decode() == buffer_type_name(handle) else None


def consists_of(n_bytes: int, n_cells: int) -> bool:
    """Whether a buffer of this size may be a cache of so many cells, counted in all tensors, that is worth the calls.
    A cell holds numbers of two bytes at least."""
    return n_bytes >= MIN_BYTES and n_bytes % (2 * n_cells) == 0


def give_back(start: int, end: int) -> None:
    """The pages that lie completely between two addresses."""
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _c_library().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@contextlib.contextmanager
def _returned_meanwhile(start: int, end: int) -> Iterator[None]:
    """Gives pages back again and again inside the block."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(RETURN_EVERY_S):
            give_back(start, end)

    thread = threading.Thread(target=repeat, name="granite4v cells", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@dataclass
class KvPages:
    """A cache of `n_tensors` tensors from the address `start` on, each with `n_cells` cells of `n_bytes` bytes for each
    of `n_sequences` sequences."""

    start: int
    n_tensors: int
    n_sequences: int
    n_cells: int
    n_bytes: int

    @classmethod
    def among(cls, buffers: Sequence[tuple[int, int]], n_layers: int, n_sequences: int, n_cells: int) -> KvPages | None:
        """The cache among buffers of a new context: the only one that consists of as many equal cells. Its pages are
        given back. None where there is none that is worth it."""
        n = 2 * n_layers * n_sequences * n_cells
        found = [(start, size // n) for start, size in buffers if consists_of(size, n)]
        if len(found) != 1:
            return None
        pages = cls(found[0][0], 2 * n_layers, n_sequences, n_cells, found[0][1])
        give_back(pages.start, pages.start + n * pages.n_bytes)
        return pages

    def give_back(self, sequence: int, n_used: int) -> None:
        """The pages of a sequence's cells behind the first `n_used`, which must hold nothing."""
        for start, end in self._spans(sequence, n_used, self.n_cells):
            give_back(start, end)

    def is_as_expected(self, used: Sequence[int]) -> bool:
        """Whether the pages in memory are those of the first cells of each sequence, which are all that was used since
        the cache was made."""
        page, base = mmap.PAGESIZE, self.start // mmap.PAGESIZE * mmap.PAGESIZE
        end = self.start + self.n_tensors * self.n_sequences * self.n_cells * self.n_bytes
        resident = np.zeros(-(-(end - base) // page), dtype=np.uint8)
        address = resident.ctypes.data_as(ctypes.c_void_p)
        if _c_library().mincore(ctypes.c_void_p(base), ctypes.c_size_t(end - base), address) != 0:
            return False
        written, allowed = np.zeros(len(resident), dtype=bool), np.zeros(len(resident), dtype=bool)
        allowed[[0, -1]] = True  # other data may lie there
        for sequence, n_used in enumerate(used):
            n_padded = min(self.n_cells, -(-n_used // PADDING) * PADDING)
            for spans, n in ((written, n_used), (allowed, n_padded)):
                for start, stop in self._spans(sequence, 0, n):
                    spans[(start - base) // page : -(-(stop - base) // page)] = True
        found = (resident & 1).astype(bool)
        return bool((found | ~written).all() and (allowed | ~found).all())

    def _spans(self, sequence: int, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The addresses of some cells of a sequence in each tensor."""
        if last <= first:
            return
        n_sequence = self.n_cells * self.n_bytes
        for number in range(self.n_tensors):
            start = self.start + (number * self.n_sequences + sequence) * n_sequence
            yield start + first * self.n_bytes, start + last * self.n_bytes


class SequenceRoom:
    """How far the cells of each sequence are used, and how far they may be in memory. Gives back what lies between."""

    def __init__(self, pages: KvPages | None, n_sequences: int, n_cells: int) -> None:
        self._pages, self._n_cells = pages, n_cells
        self._used, self._touched = [0] * n_sequences, [0] * n_sequences
        self._copies: list[int] = []  # that llama.cpp makes with the next batch
        self._is_checked = False

    def will_write(self, sequences: np.ndarray, positions: np.ndarray) -> None:
        """Before a batch."""
        for number, position in zip(sequences.tolist(), positions.tolist(), strict=True):
            self._used[number] = max(self._used[number], position + 1)
            self._touched[number] = max(self._touched[number], position + 1)

    def has_written(self) -> None:
        """After a batch, whatever became of it."""
        if self._pages is None:
            return
        if not self._is_checked:
            if max(self._used) * self._pages.n_bytes < CHECKED_BYTES:
                return
            self._is_checked = True
            if not self._pages.is_as_expected(self._used):
                self._pages = None
                return
        for number in self._copies:
            self._touched[number] = self._n_cells
            self._trim(number)
        self._copies.clear()

    def has_cut(self, sequence: int, n_tokens: int) -> None:
        self._used[sequence] = min(self._used[sequence], n_tokens)
        if self._is_checked:
            self._trim(sequence)

    def will_copy(self, target: int, n_tokens: int) -> None:
        """All of another sequence to `target`, of which the first `n_tokens` stay."""
        self._used[target] = n_tokens
        self._copies.append(target)

    def is_filled(self, sequence: int, n_tokens: int) -> None:
        """With so many tokens, from the first cell on."""
        self._used[sequence] = min(n_tokens, self._n_cells)
        self._touched[sequence] = max(self._touched[sequence], self._used[sequence])

    def _trim(self, sequence: int) -> None:
        n_used = self._used[sequence]
        if self._pages is not None and self._touched[sequence] - n_used >= LEAST_CELLS:
            self._pages.give_back(sequence, n_used)
            self._touched[sequence] = n_used
