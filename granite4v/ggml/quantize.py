"""Quantizes NumPy rows with ggml's own routines, on several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from granite4v.ggml.library import lib
from granite4v.ggml.types import TYPE_IDS, block_size, row_bytes

__all__ = ["block_size", "quantize_rows", "row_bytes"]

ROWS_ELEMENTS = 1 << 18  # elements that a thread takes at a time; small enough to balance the load of two cores


def quantize_rows(values: np.ndarray, type_name: str, n_threads: int) -> np.ndarray:
    """Quantizes the rows of a float32 array `(rows, cols)` to a ggml type; returns uint8 `(rows, row_bytes)`.

    The bytes are those of llama.cpp's quantizer without an importance matrix. Raises ValueError unless the array is
    two-dimensional float32 and `cols` is a multiple of the type's block size. ctypes releases the GIL, so `n_threads`
    threads run in parallel.
    """
    if values.ndim != 2 or values.dtype != np.float32:
        raise ValueError(f"quantize_rows takes float32 (rows, cols), got {values.dtype} {values.shape}")
    n_rows, n_cols = values.shape
    out = np.empty((n_rows, row_bytes(type_name, n_cols)), dtype=np.uint8)
    if type_name == "F32":
        out[:] = np.ascontiguousarray(values).view(np.uint8)
        return out
    values = np.ascontiguousarray(values)
    type_id, quantize = TYPE_IDS[type_name], lib().ggml_quantize_chunk
    lib().ggml_quantize_init(type_id)
    step = max(1, ROWS_ELEMENTS // n_cols)

    def chunk(first: int) -> None:
        rows = values[first : first + step]
        quantize(type_id, rows.ctypes.data, out[first:].ctypes.data, 0, len(rows), n_cols, None)

    starts = range(0, n_rows, step)
    if n_threads <= 1 or len(starts) == 1:
        for first in starts:
            chunk(first)
    else:
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(chunk, starts))
    return out
