"""Reads the header of a safetensors file, and rows and columns of its tensors.

The safetensors package is not used, because it needs torch for bfloat16, keeps the file memory-mapped (and mapped pages
count as this process's memory) and hides duplicate names.
Format: https://github.com/huggingface/safetensors, an 8-byte length, JSON, then the data.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from granite4v.converter.files import PEEK_BYTES, check_regular, placeholder
from granite4v.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 100_000  # in one file; models with hundreds of experts have fewer
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # the types that convert

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8}
COLUMN_ROWS = 256  # a multiple of every type's block size, and below the limit of buffers for one call of preadv
CACHE_LINE = 64  # in elements: at least one CPU cache line

# Element sizes of the format's other types. Types smaller than a byte are left out: their sizes are not checked.
OTHER_BYTES = {
    name: n_bytes
    for n_bytes, names in (
        (1, ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0")),
        (2, ("I16", "U16")),
        (4, ("I32", "U32")),
        (8, ("I64", "U64", "F64", "C64")),
    )
    for name in names
}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a checkpoint. `shape`: in NumPy's order. `offset_bytes`: from the start of the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def n_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def n_cols(self) -> int:
        """Elements in one row: the product of all dimensions but the first."""
        return math.prod(self.shape[1:])


class _Pairs(list):  # type: ignore[type-arg]
    """The (name, value) pairs of a JSON object, including duplicate names."""


def read_header(path: Path) -> tuple[list[SourceTensor], list[str]]:
    """Reads the tensors of a file, of all types. Returns them with a list of messages about problems.

    Raises CheckpointError if the header itself cannot be read.
    """
    try:
        size_bytes = check_regular(path)
        with path.open("rb") as file:
            start = file.read(PEEK_BYTES)
            instead = placeholder(start)
            if instead is not None:
                raise CheckpointError(f"'{path}' {instead}.")
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else None
            if length is None or length > min(MAX_HEADER_BYTES, size_bytes - 8):
                raise CheckpointError(
                    f"'{path}' is cut short or not a safetensors file: its header does not fit in {size_bytes:,} "
                    "bytes. Download it again."
                )
            file.seek(8)
            text = file.read(length).decode("utf-8")
            pairs = json.loads(text, object_pairs_hook=_Pairs)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"'{path}' has a broken safetensors header (not JSON). Download it again.") from None
    if not isinstance(pairs, _Pairs):
        raise CheckpointError(f"'{path}' has a broken safetensors header (not a JSON object). Download it again.")
    if len(pairs) > MAX_TENSORS:
        raise CheckpointError(f"'{path}' has {len(pairs):,} tensors; expected at most {MAX_TENSORS:,}.")
    return _tensors(path, pairs, 8 + length, size_bytes)


def _tensors(path: Path, pairs: _Pairs, data_start: int, size_bytes: int) -> tuple[list[SourceTensor], list[str]]:
    tensors: dict[str, SourceTensor] = {}
    problems: list[str] = []
    spans: list[tuple[int, int, str]] = []
    for name, fields in pairs:
        if name == "__metadata__":
            continue
        info = dict(fields) if isinstance(fields, _Pairs) else {}
        dtype, shape, offsets = (info.get(key, 0) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            problems.append(f"{name!r} in '{path.name}' has a header entry without dtype, shape or offsets")
            continue
        first, last = offsets
        if name in tensors:
            problems.append(f"{name!r} occurs twice in '{path.name}'")
        n_bytes = ELEMENT_BYTES.get(dtype) or OTHER_BYTES.get(dtype)
        if last < first or (n_bytes and last - first != n_bytes * math.prod(shape)):
            problems.append(f"{name!r} in '{path.name}' has {last - first:,} bytes for {dtype} {shape}")
        spans.append((data_start + first, data_start + last, name))
        tensors[name] = SourceTensor(name, path, dtype, tuple(shape), data_start + first)
    return list(tensors.values()), problems + _misplaced(path, spans, size_bytes)


def _counts(value: Any) -> bool:
    """Whether a JSON value is a list of integers from 0 to 2**63 - 1."""
    return type(value) is list and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _misplaced(path: Path, spans: list[tuple[int, int, str]], size_bytes: int) -> list[str]:
    """Messages about tensors that overlap or end after the end of the file. `spans`: (first byte, end, name)."""
    problems = []
    end_bytes = max((last for _, last, _ in spans), default=0)
    if end_bytes > size_bytes:
        problems.append(
            f"'{path.name}' is cut short: its tensors end at byte {end_bytes:,}, the file has {size_bytes:,}; "
            "download it again"
        )
    held = sorted(span for span in spans if span[1] > span[0])
    for (_, end, name), (start, _, other) in itertools.pairwise(held):
        if start < end and name != other:
            problems.append(f"{name!r} and {other!r} overlap in '{path.name}'")
    return problems


def read_columns(tensor: SourceTensor, index: int, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
    """Reads columns [first, last) of matrix `index` of a tensor `(matrices, n_in, n_out)`, by `COLUMN_ROWS` rows.

    Yields the number of the first row, and a `(rows, last - first)` array in the file's own type. The next iteration
    overwrites the array. Complete rows are read from the file, so that the system sees sequential reads and reads far
    ahead, and the other columns are in the page cache if they are needed next. Raises CheckpointError if the file
    cannot be read.
    """
    _, n_in, n_out = tensor.shape
    # Cache lines whose addresses differ by a power of two evict each other: without the padding of the rows, reading
    # columns is 40 times as slow.
    block = np.empty((COLUMN_ROWS, n_out + CACHE_LINE), dtype=_DTYPES[tensor.dtype])[:, :n_out]
    views = [row.view(np.uint8).data for row in block]
    try:
        with tensor.path.open("rb", buffering=0) as file:
            for start in range(0, n_in, COLUMN_ROWS):
                n = min(COLUMN_ROWS, n_in - start)
                offset = tensor.offset_bytes + (index * n_in + start) * n_out * block.itemsize
                _fill(file, offset, views[:n], tensor.path)
                yield start, block[:n, first:last]
    except OSError as error:
        raise CheckpointError(f"cannot read '{tensor.path}': {error.strerror or error}.") from None


def _fill(file: Any, offset: int, parts: list[memoryview], path: Path) -> None:
    """Reads bytes from `offset` on, and fills the parts one after the other. Raises CheckpointError at the file's
    end."""
    at = 0
    while at < len(parts):
        n_bytes = os.preadv(file.fileno(), parts[at:], offset)
        if not n_bytes:
            raise CheckpointError(f"'{path}' became shorter while it was read.")
        offset += n_bytes
        while at < len(parts) and n_bytes >= len(parts[at]):
            n_bytes -= len(parts[at])
            at += 1
        if n_bytes:
            parts = [*parts[:at], parts[at][n_bytes:], *parts[at + 1 :]]


def read_rows(tensor: SourceTensor, first_row: int, last_row: int) -> np.ndarray:
    """Reads rows [first_row, last_row) in the file's own type (float32, float16, ml_dtypes' bfloat16, or bytes).

    Shape (rows, n_cols). The file is not memory-mapped, because mapped pages count as this process's memory. Raises
    CheckpointError if the file cannot be read.
    """
    rows = np.empty((last_row - first_row, tensor.n_cols), dtype=_DTYPES[tensor.dtype])
    if not rows.size:
        return rows
    try:
        with tensor.path.open("rb", buffering=0) as file:
            offset = tensor.offset_bytes + first_row * tensor.n_cols * rows.itemsize
            _fill(file, offset, [rows.view(np.uint8).data.cast("B")], tensor.path)
    except OSError as error:
        raise CheckpointError(f"cannot read '{tensor.path}': {error.strerror or error}.") from None
    return rows
