"""Turns planned tensors into bytes, some rows at a time: read, merge, reorder, pad, quantize.

Every chunk of rows is one job in a thread pool. Jobs run a few chunks ahead, across tensors, so that reading, computing
and writing overlap, and memory use does not grow with the size of the tensors. That works because each row of the
result depends only on its own source row (or on the rows of its head, if those are reordered). A row of a transposed
matrix depends on all rows of that matrix, so one matrix is one job.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import gguf
import ml_dtypes
import numpy as np

from granite4v.converter.plan import PlannedTensor
from granite4v.converter.safetensors_file import COLUMN_ROWS, SourceTensor, read_columns, read_rows
from granite4v.converter.tensors.rules import TensorRule
from granite4v.errors import CheckpointError
from granite4v.ggml.quantize import block_size, quantize_rows, row_bytes

CHUNK_ELEMENTS = 1 << 19  # 2 MB as float32: fits the CPU cache, and large enough to hide Python's overhead
JOBS_AHEAD = 3  # chunks in flight per thread
BYTES_AHEAD = 1 << 29  # limit for the results of chunks in flight: transposed matrices are large
CACHED_MATRICES = 4  # lora_A matrices of the modules that the threads work on
# `COLUMN_ROWS` rows of so many columns are 1 MB as float32, which stays in the CPU cache until they are quantized.
TURNED_COLUMNS = 1024


@dataclass(frozen=True)
class Chunk:
    """Rows [first, last) of a planned tensor. A transposed tensor `(matrices, n_rows, n_cols)` counts as one matrix of
    `matrices * n_rows` rows."""

    tensor: PlannedTensor
    first: int
    last: int

    @property
    def offset_bytes(self) -> int:
        """Offset of the result within the tensor's bytes."""
        return self.tensor.n_bytes * self.first // _as_matrix(self.tensor)[0]

    @property
    def n_bytes(self) -> int:
        """Size of the result."""
        return self.tensor.n_bytes * (self.last - self.first) // _as_matrix(self.tensor)[0]


def n_cores() -> int:
    """The number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stream(tensors: Iterable[PlannedTensor], n_threads: int) -> Generator[tuple[Chunk, np.ndarray], None, None]:
    """Yields every chunk of every tensor with its bytes (uint8); the chunks of one tensor come in order. Closing the
    generator stops the work."""
    cache = SharedMatrices()
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="granite4v-convert")
    waiting: deque[tuple[Chunk, Future[np.ndarray]]] = deque()
    try:
        for chunk in _all_chunks(tensors):
            waiting.append((chunk, pool.submit(compute, chunk, cache)))
            while len(waiting) >= JOBS_AHEAD * n_threads or sum(job.n_bytes for job, _ in waiting) > BYTES_AHEAD:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _all_chunks(tensors: Iterable[PlannedTensor]) -> Iterator[Chunk]:
    """Yields all chunks in the order in which they are computed.

    Transposed tensors that are cut from the same source alternate, matrix by matrix (gate 0, up 0, gate 1, up 1, ...),
    so that each source matrix is still in the page cache for the second one. One tensor after the other would read the
    source twice if it does not fit in memory.
    """

    def matrices(tensor: PlannedTensor) -> object:
        return tensor.source if tensor.rule.transposed else tensor.name

    for _, group in itertools.groupby(tensors, matrices):
        for chunks in zip(*map(_chunks_of, group), strict=True):
            yield from chunks


def _chunks_of(tensor: PlannedTensor) -> Iterator[Chunk]:
    """Splits the tensor's rows into chunks of about `CHUNK_ELEMENTS`. A head whose rows are reordered is never split; a
    transposed matrix is always one chunk."""
    n_rows, n_cols = _as_matrix(tensor)
    unit = n_rows // tensor.rule.rope_heads if tensor.rule.rope_heads else 1
    step = tensor.shape[1] if tensor.rule.transposed else max(1, CHUNK_ELEMENTS // (n_cols * unit)) * unit
    for first in range(0, n_rows, step):
        yield Chunk(tensor, first, min(n_rows, first + step))


def compute(chunk: Chunk, cache: SharedMatrices) -> np.ndarray:
    """Computes the bytes of a chunk, one-dimensional uint8.

    Raises CheckpointError for NaN and infinity in values that are converted; values that keep their type are copied
    without a check.
    """
    tensor = chunk.tensor
    if tensor.source is None:
        assert tensor.rule.values is not None
        values = np.asarray(tensor.rule.values[chunk.first : chunk.last], dtype=np.float32)
        return quantize_rows(values.reshape(-1, 1), tensor.type_name, n_threads=1).reshape(-1)
    if _is_copied(tensor):
        return read_rows(_packed(tensor.source), *_source_span(chunk)).reshape(-1)
    same = tensor.source.dtype == tensor.type_name and block_size(tensor.type_name) == 1
    if tensor.rule.transposed:
        return _transposed(chunk, unchanged=same)
    rows = _source_rows(tensor.source, *_source_span(chunk))
    unchanged = same and tensor.lora is None and tensor.factor == 1.0
    if not unchanged:
        rows = rows.astype(np.float32, copy=False)
        if tensor.lora is not None:
            rows = rows + _delta(chunk, cache)
        if tensor.factor != 1.0:
            rows = rows * np.float32(tensor.factor)
        _check_finite(tensor.source, rows)
    if tensor.rule.column_blocks:
        rows = _reorder_columns(rows, tensor.rule.column_blocks)
    if tensor.rule.rope_heads:
        rows = _interleave(rows, _as_matrix(tensor)[0] // tensor.rule.rope_heads)
    rows = _pad(rows, chunk)
    if unchanged:
        return rows.view(np.uint8).reshape(-1)
    row_width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    return quantize_rows(rows.reshape(-1, row_width), tensor.type_name, n_threads=1).reshape(-1)


class SharedMatrices:
    """LRU cache of the lora_A matrices as float32, shared by the threads: each is needed for many chunks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._matrices: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def get(self, tensor: SourceTensor) -> np.ndarray:
        key = (str(tensor.path), tensor.offset_bytes)
        with self._lock:
            if key not in self._matrices:
                self._matrices[key] = read_rows(tensor, 0, tensor.n_rows).astype(np.float32, copy=False)
                if len(self._matrices) > CACHED_MATRICES:
                    self._matrices.popitem(last=False)
            self._matrices.move_to_end(key)
            return self._matrices[key]


def _as_matrix(tensor: PlannedTensor) -> tuple[int, int]:
    """Rows and columns of the tensor as a matrix. Rows are the first dimension; of a transposed tensor, the first
    two."""
    shape = tensor.shape
    if tensor.rule.transposed:
        return shape[0] * shape[1], shape[2]
    return shape[0], math.prod(shape[1:])


def _transposed(chunk: Chunk, *, unchanged: bool) -> np.ndarray:
    """Computes the bytes of one transposed matrix.

    `COLUMN_ROWS` rows of the source become as many columns of the result. That is a whole number of blocks of every
    type, so each such group is quantized separately, and only the result is in memory as a complete matrix.
    """
    tensor, columns = chunk.tensor, chunk.tensor.rule.transposed
    assert tensor.source is not None and columns is not None and tensor.lora is None and tensor.factor == 1.0
    n_rows, n_cols = tensor.shape[1:]
    found = np.empty((n_rows, row_bytes(tensor.type_name, n_cols)), dtype=np.uint8)
    room = np.zeros((TURNED_COLUMNS, COLUMN_ROWS), dtype=np.float32)
    for n_done, block in read_columns(tensor.source, chunk.first // n_rows, *columns):
        start, end = (row_bytes(tensor.type_name, n) for n in (n_done, n_done + len(block)))
        for first in range(0, n_rows, TURNED_COLUMNS):
            part = block[:, first : first + TURNED_COLUMNS].T
            if unchanged:
                packed = np.ascontiguousarray(part).view(np.uint8)
            else:
                values = _as_float32(part, room)
                _check_finite(tensor.source, values)
                packed = quantize_rows(values, tensor.type_name, n_threads=1)
            found[first : first + len(part), start:end] = packed
    return found.reshape(-1)


def _as_float32(values: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Copies the values to a corner of `room` as float32, and returns that corner.

    `room` must be zeros before its first use: a bfloat16 is the upper half of a float32, so only the upper halves are
    written, and the lower halves must be zero.
    """
    n_rows, n_cols = values.shape
    if values.dtype == ml_dtypes.bfloat16:
        room.view(np.uint16)[:n_rows, 1 : 2 * n_cols : 2] = values.view(np.uint16)
    else:
        room[:n_rows, :n_cols] = values
    return room[:n_rows, :n_cols]


def _source_span(chunk: Chunk) -> tuple[int, int]:
    """The source rows [first, last) of a chunk; fewer than its own rows where it is padded."""
    rule = chunk.tensor.rule
    start, end = rule.rows or (0, rule.shape[0])
    first = start + chunk.first
    return first, max(first, min(end, start + chunk.last))


def _source_rows(source: SourceTensor, first: int, last: int) -> np.ndarray:
    """Reads rows [first, last) in their float type; rows of a quantized GGUF tensor are dequantized to float32."""
    if block_size(source.dtype) == 1:
        return read_rows(source, first, last)
    values = gguf.quants.dequantize(read_rows(_packed(source), first, last), gguf.GGMLQuantizationType[source.dtype])
    return np.asarray(values, dtype=np.float32)


def _packed(source: SourceTensor) -> SourceTensor:
    """The same quantized tensor of a GGUF file, described as rows of bytes."""
    return replace(source, dtype="U8", shape=(source.n_rows, row_bytes(source.dtype, source.n_cols)))


def _is_copied(tensor: PlannedTensor) -> bool:
    """Whether a matrix is quantized in the target type already and is not changed, so that its blocks can be copied."""
    same = tensor.source is not None and tensor.source.dtype == tensor.type_name
    as_it_is = tensor.rule == TensorRule(tensor.rule.source, tensor.rule.target, tensor.shape)
    return same and as_it_is and block_size(tensor.type_name) > 1 and tensor.lora is None and tensor.factor == 1.0


def _delta(chunk: Chunk, cache: SharedMatrices) -> np.ndarray:
    """Computes scale * B @ A for the chunk's source rows, as float32."""
    lora = chunk.tensor.lora
    assert lora is not None
    first, last = _source_span(chunk)
    b = read_rows(lora.b, first, last).astype(np.float32, copy=False)
    return np.float32(lora.scale) * (b @ cache.get(lora.a))


def _interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders every head's rows from (0, 1, ...) to (0, n/2, 1, n/2 + 1, ...); for 6 rows: 0, 3, 1, 4, 2, 5.

    Hugging Face rotates rows i and i + n/2 together, llama.cpp's 'normal' rotary embedding rows 2i and 2i + 1.
    """
    n_rows, n_cols = rows.shape
    halves = rows.reshape(n_rows // head_dim, 2, head_dim // 2, n_cols)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(n_rows, n_cols)


def _reorder_columns(rows: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """Splits the columns into `len(blocks)` equal blocks, and puts them in the order `blocks`."""
    n_rows, n_cols = rows.shape
    return np.ascontiguousarray(rows.reshape(n_rows, len(blocks), -1)[:, blocks]).reshape(n_rows, n_cols)


def _pad(rows: np.ndarray, chunk: Chunk) -> np.ndarray:
    wanted = (chunk.last - chunk.first, _as_matrix(chunk.tensor)[1])
    if rows.shape == wanted:
        return rows
    padded = np.zeros(wanted, dtype=rows.dtype)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return padded


def _check_finite(source: SourceTensor, rows: np.ndarray) -> None:
    """Raises CheckpointError for NaN or infinity. The sum is tested first: it is not finite if a value is not, and it
    costs a fraction of testing each value. A sum can also overflow, so the values decide."""
    if not math.isfinite(float(rows.sum(dtype=np.float32))) and not np.isfinite(rows).all():
        raise CheckpointError(
            f"'{source.name}' in '{source.path}' holds values that are not finite numbers; the "
            "checkpoint is damaged. Download it again."
        )
