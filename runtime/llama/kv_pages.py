"""Returns the memory of empty KV cells to the system.

llama.cpp writes zeros to its whole KV cache when it makes it, and copies a sequence with all cells that it has room
for. A sequence of a 4B model takes 0.15 GB that way, of which on average three quarters are used. On Linux, pages that
were given back read as zeros again, which is what llama.cpp had written there, and take memory only when a cell is
written.

No function of llama.cpp says where the cache is, or how it is laid out. The buffer is observed when ggml allocates it.
Its layout is known: for each layer the keys, then the values, of one sequence after the other, cell by cell. It is
verified by the pages that the first batch has written. A cache of another layout, such as one with transposed values,
is left alone.
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

PADDING = 256  # llama.cpp's attention reads cells up to a multiple of this
MIN_BYTES = 32 << 20  # smallest cache that is worth the calls
CHECKED_BYTES = 4 * mmap.PAGESIZE  # bytes of a tensor that must have been written to tell one layout from another
RETURN_EVERY_S = 0.02  # while a cache is cleared, at some gigabytes per second
LEAST_CELLS = 128  # smallest number of cells given back: fewer are soon written again


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
    """Records the start and the size in bytes of each buffer that ggml allocates on the CPU inside the block, in any
    thread.

    `is_cleared(n_bytes)`: whether nothing but zeros is written to such a buffer inside the block. Its pages are given
    back while that goes on, so that they are never in memory all at once.
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
    """The CPU's buffer type, to be patched in place; None where pages cannot be given back, or where the structure is
    not as declared here: then its functions answer differently from ggml's own."""
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
    """Whether a buffer of this size may be a cache of `n_cells` cells, counted over all tensors, that is worth the
    calls. The bytes of a cell are a multiple of two."""
    return n_bytes >= MIN_BYTES and n_bytes % (2 * n_cells) == 0


def give_back(start: int, end: int) -> None:
    """Returns the pages that lie completely between two addresses to the system."""
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _c_library().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@contextlib.contextmanager
def _returned_meanwhile(start: int, end: int) -> Iterator[None]:
    """Gives pages back repeatedly inside the block."""
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
    """The memory of a KV cache: `n_tensors` tensors from the address `start` on, each with `n_cells` cells of `n_bytes`
    bytes for each of `n_sequences` sequences."""

    start: int
    n_tensors: int
    n_sequences: int
    n_cells: int
    n_bytes: int

    @classmethod
    def among(cls, buffers: Sequence[tuple[int, int]], n_layers: int, n_sequences: int, n_cells: int) -> KvPages | None:
        """Finds the cache among the buffers of a new context: the only one whose size fits this many equal cells. Gives
        its pages back. Returns None if there is no such cache, or none that is worth it."""
        n = 2 * n_layers * n_sequences * n_cells
        found = [(start, size // n) for start, size in buffers if consists_of(size, n)]
        if len(found) != 1:
            return None
        pages = cls(found[0][0], 2 * n_layers, n_sequences, n_cells, found[0][1])
        give_back(pages.start, pages.start + n * pages.n_bytes)
        return pages

    def give_back(self, sequence: int, n_used: int) -> None:
        """Gives back the pages of a sequence's cells after the first `n_used`; those cells must be empty."""
        for start, end in self._spans(sequence, n_used, self.n_cells):
            give_back(start, end)

    def is_as_expected(self, used: Sequence[int]) -> bool:
        """Whether the pages in memory are those of the first cells of each sequence: all that were written, and none
        beyond the padding that attention reads. Nothing else was used since the cache was made, so any other page shows
        another layout."""
        page, base = mmap.PAGESIZE, self.start // mmap.PAGESIZE * mmap.PAGESIZE
        end = self.start + self.n_tensors * self.n_sequences * self.n_cells * self.n_bytes
        resident = np.zeros(-(-(end - base) // page), dtype=np.uint8)
        address = resident.ctypes.data_as(ctypes.c_void_p)
        if _c_library().mincore(ctypes.c_void_p(base), ctypes.c_size_t(end - base), address) != 0:
            return False
        written, allowed = np.zeros(len(resident), dtype=bool), np.zeros(len(resident), dtype=bool)
        allowed[[0, -1]] = True  # other data may be there
        for sequence, n_used in enumerate(used):
            n_padded = min(self.n_cells, -(-n_used // PADDING) * PADDING)
            for spans, n in ((written, n_used), (allowed, n_padded)):
                for start, stop in self._spans(sequence, 0, n):
                    spans[(start - base) // page : -(-(stop - base) // page)] = True
        found = (resident & 1).astype(bool)
        return bool((found | ~written).all() and (allowed | ~found).all())

    def _spans(self, sequence: int, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yields the address ranges of the cells from `first` up to, not including, `last` of a sequence, one for each
        tensor.

        For example, with 4 tensors, 2 sequences and 100 cells of 10 bytes, the cells from 5 to 7 of sequence 1 begin
        1,050, 3,050, 5,050 and 7,050 bytes after `start`, 20 bytes each.
        """
        if last <= first:
            return
        n_sequence = self.n_cells * self.n_bytes
        for number in range(self.n_tensors):
            start = self.start + (number * self.n_sequences + sequence) * n_sequence
            yield start + first * self.n_bytes, start + last * self.n_bytes


class SequenceRoom:
    """Tracks how many cells of each sequence are used, and how many may be in memory. Gives back those in between."""

    def __init__(self, pages: KvPages | None, n_sequences: int, n_cells: int) -> None:
        self._pages, self._n_cells = pages, n_cells
        self._used, self._touched = [0] * n_sequences, [0] * n_sequences
        self._copies: list[int] = []  # targets of copies that llama.cpp makes with the next batch
        self._is_checked = False

    def will_write(self, sequences: np.ndarray, positions: np.ndarray) -> None:
        """Must be called before a batch."""
        for number, position in zip(sequences.tolist(), positions.tolist(), strict=True):
            self._used[number] = max(self._used[number], position + 1)
            self._touched[number] = max(self._touched[number], position + 1)

    def has_written(self) -> None:
        """Must be called after a batch, whether it succeeded or not."""
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
        """Announces a copy of a complete sequence to `target`, which is then cut to its first `n_tokens`."""
        self._used[target] = n_tokens
        self._copies.append(target)

    def is_filled(self, sequence: int, n_tokens: int) -> None:
        """Records that a sequence was filled with `n_tokens` tokens, from the first cell on."""
        self._used[sequence] = min(n_tokens, self._n_cells)
        self._touched[sequence] = max(self._touched[sequence], self._used[sequence])

    def _trim(self, sequence: int) -> None:
        n_used = self._used[sequence]
        if self._pages is not None and self._touched[sequence] - n_used >= LEAST_CELLS:
            self._pages.give_back(sequence, n_used)
            self._touched[sequence] = n_used
