"""Bilinear resizing of 8-bit images, bit-exact with PyTorch on CPUs with vector instructions.

The algorithm is Pillow's. Pillow rounds weights to 22 fractional bits, PyTorch to 16 bits in total
(`UpSampleKernel.cpp`, `_compute_index_ranges_int16_weights`), which changes up to one value in a hundred by one. Image
processors that transformers has only for torchvision resize in this way. Needs only NumPy.
"""

from __future__ import annotations

import math

import numpy as np

MAX_PRECISION = 22  # most fractional bits of a weight, which must fit in 16 bits in total
VALUES_AT_ONCE = 1 << 22  # values in a piece of rows: bounds the memory of the sums


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 `(height, width, channels)` to `size` (width, height); averages when it shrinks a side."""
    width, height = size
    if image.shape[1] != width:
        image = _along_columns(image, width)
    if image.shape[0] != height:
        image = _along_rows(image, height)
    return image


def _along_columns(image: np.ndarray, n_out: int) -> np.ndarray:
    """Resamples the columns, one piece of rows at a time."""
    out = np.empty((len(image), n_out, image.shape[2]), dtype=np.uint8)
    n_rows = max(1, VALUES_AT_ONCE // (n_out * image.shape[2]))
    for first in range(0, len(image), n_rows):
        piece = image[first : first + n_rows].swapaxes(0, 1)
        out[first : first + n_rows] = _along_rows(piece, n_out).swapaxes(0, 1)
    return out


def _along_rows(image: np.ndarray, n_out: int) -> np.ndarray:
    """Resamples the first axis: each result is a sum of neighbours with fixed-point weights."""
    first, weights, precision = _weights(len(image), n_out)
    out = np.empty((n_out, *image.shape[1:]), dtype=np.uint8)
    n_values = math.prod(image.shape[1:])
    n_rows = max(1, VALUES_AT_ONCE // n_values)
    for start in range(0, n_out, n_rows):
        part = slice(start, start + n_rows)
        total = np.full((len(first[part]), *image.shape[1:]), 1 << precision >> 1, dtype=np.int32)
        for tap in range(weights.shape[1]):  # weights beyond the last neighbour are zero
            neighbour = image[np.minimum(first[part] + tap, len(image) - 1)].astype(np.int32)
            neighbour *= weights[part, tap, None, None]
            total += neighbour
        out[part] = np.clip(total >> precision, 0, 255)
    return out


def _weights(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the index of each result's first neighbour, int64 `(n_out,)`, the weights of its neighbours, int32
    `(n_out, neighbours)`, and the number of fractional bits of the weights."""
    scale = n_in / n_out
    support = max(scale, 1.0)  # half the width of the triangle filter
    inverse = 1.0 / scale if scale >= 1 else 1.0
    centre = scale * (np.arange(n_out) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    n_each = np.minimum((centre + support + 0.5).astype(np.int64), n_in) - first
    n_most = math.ceil(support) * 2 + 1
    n_each = np.clip(n_each, 0, n_most)
    tap = np.arange(n_most)
    away = np.abs((tap + first[:, None] - centre[:, None] + 0.5) * inverse)
    exact = np.where((away < 1) & (tap < n_each[:, None]), 1 - away, 0.0)
    total = np.zeros(n_out)
    for column in exact.T:  # in PyTorch's order of summation
        total += column
    exact /= total[:, None]
    most = float(exact.max())
    precision = next((p for p in range(MAX_PRECISION) if int(0.5 + most * (1 << p + 1)) >= 1 << 15), MAX_PRECISION)
    return first, (0.5 + exact * (1 << precision)).astype(np.int32)[:, : int(n_each.max())], precision
