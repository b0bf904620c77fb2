"""The header of one safetensors file, and rows of its tensors as float32.

Reads the header itself rather than through the safetensors package, which needs torch for bfloat16, keeps
the file mapped (its pages count as ours) and hides doubled names.
Format: https://github.com/huggingface/safetensors, an 8-byte length, JSON, then the data.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granite4v.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a checkpoint. `shape` is NumPy's order; `offset_bytes` counts from the file's start."""

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
        """Elements in one row: everything but the first dimension."""
        return math.prod(self.shape[1:])


def read_header(path: Path) -> tuple[list[SourceTensor], list[str]]:
    """The tensors of a file, and what is wrong with it in words (empty when nothing is).

    Raises CheckpointError when the header itself cannot be read.
    """
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or length > min(MAX_HEADER_BYTES, size_bytes - 8):
                raise CheckpointError(
                    f"'{path}' is cut short or is no safetensors file: its header does not fit in {size_bytes:,} "
                    "bytes. Download it again."
                )
            pairs = json.loads(file.read(length), object_pairs_hook=lambda items: items)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}.") from None
    except ValueError:
        raise CheckpointError(f"'{path}' has a broken safetensors header (not JSON). Download it again.") from None
    return _tensors(path, pairs, 8 + length, size_bytes)


def _tensors(path: Path, pairs: Any, data_start: int, size_bytes: int) -> tuple[list[SourceTensor], list[str]]:
    tensors: dict[str, SourceTensor] = {}
    problems: list[str] = []
    end_bytes = data_start
    for name, fields in pairs:
        if name == "__metadata__":
            continue
        info = dict(fields)
        try:
            dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
            first, last = (int(n) for n in info["data_offsets"])
        except (KeyError, TypeError, ValueError):
            problems.append(f"'{name}' in '{path.name}' has a header entry without dtype, shape or offsets")
            continue
        if name in tensors:
            problems.append(f"'{name}' stands twice in '{path.name}'")
        if dtype not in ELEMENT_BYTES:
            problems.append(f"'{name}' in '{path.name}' has type {dtype}; expected {', '.join(ELEMENT_BYTES)}")
        elif last - first != ELEMENT_BYTES[dtype] * math.prod(shape):
            problems.append(f"'{name}' in '{path.name}' has {last - first:,} bytes for {dtype} {list(shape)}")
        end_bytes = max(end_bytes, data_start + last)
        tensors[name] = SourceTensor(name, path, dtype, shape, data_start + first)
    if end_bytes > size_bytes:
        problems.append(
            f"'{path.name}' is cut short: its tensors end at byte {end_bytes:,}, the file has {size_bytes:,}; "
            "download it again"
        )
    return list(tensors.values()), problems


def read_rows(tensor: SourceTensor, first_row: int, last_row: int) -> np.ndarray:
    """Rows [first_row, last_row) in the file's own type (float32, float16 or ml_dtypes' bfloat16).

    Shape (rows, n_cols). Reads into fresh memory: the pages of a mapped file would count as ours. Raises
    CheckpointError when the file cannot be read.
    """
    import ml_dtypes
    import numpy as np

    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[tensor.dtype]
    rows = np.empty((last_row - first_row, tensor.n_cols), dtype=dtype)
    if not rows.size:
        return rows
    view, done = rows.view(np.uint8).data.cast("B"), 0
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset_bytes + first_row * tensor.n_cols * rows.itemsize)
            while done < len(view):
                n_bytes = file.readinto(view[done:])
                if not n_bytes:
                    raise CheckpointError(f"'{tensor.path}' became shorter while it was read.")
                done += n_bytes
    except OSError as error:
        raise CheckpointError(f"cannot read '{tensor.path}': {error.strerror or error}.") from None
    return rows
