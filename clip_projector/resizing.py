"""Bilinear resizing of 8-bit images as PyTorch does it on CPUs with vector instructions, to the last bit.

Pillow, whose algorithm it is, rounds weights to 22 bits after the point, PyTorch to 16 in all (`UpSampleKernel.cpp`,
`_compute_index_ranges_int16_weights`), which moves up to one value in a hundred by one. Processors that transformers
has for torchvision alone resize in this way. Needs NumPy only.
"""

from __future__ import annotations

import math

import numpy as np

MAX_PRECISION = 22  # bits after the point of a weight, of which 16 are kept in all
VALUES_AT_ONCE = 1 << 22  # of a piece of rows: bounds the memory of sums


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 `(height, width, channels)` at `size` (width, height); averaged, where that is smaller."""
    width, height = size
    if image.shape[1] != width:
        image = _along_columns(image, width)
    if image.shape[0] != height:
        image = _along_rows(image, height)
    return image


def _along_columns(image: np.ndarray, n_out: int) -> np.ndarray:
    """Columns resampled, rows in pieces."""
    out = np.empty((len(image), n_out, image.shape[2]), dtype=np.uint8)
    n_rows = max(1, VALUES_AT_ONCE // (n_out * image.shape[2]))
    for first in range(0, len(image), n_rows):
        piece = image[first : first + n_rows].swapaxes(0, 1)
        out[first : first + n_rows] = _along_rows(piece, n_out).swapaxes(0, 1)
    return out


def _along_rows(image: np.ndarray, n_out: int) -> np.ndarray:
    """The first axis resampled: each result is a sum of neighbours with weights in fixed point."""
    first, weights, precision = _weights(len(image), n_out)
    out = np.empty((n_out, *image.shape[1:]), dtype=np.uint8)
    n_values = math.prod(image.shape[1:])
    n_rows = max(1, VALUES_AT_ONCE // n_values)
    for start in range(0, n_out, n_rows):
        part = slice(start, start + n_rows)
        total = np.full((len(first[part]), *image.shape[1:]), 1 << precision >> 1, dtype=np.int32)
        for tap in range(weights.shape[1]):  # beyond the last neighbour a weight is zero
            neighbour = image[np.minimum(first[part] + tap, len(image) - 1)].astype(np.int32)
            neighbour *= weights[part, tap, None, None]
            total += neighbour
        out[part] = np.clip(total >> precision, 0, 255)
    return out


def _weights(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, int]:
    """For each result the index of its first neighbour, the weights of them, and how many of their bits are behind the
    point: int64 `(n_out,)`, int32 `(n_out, neighbours)`."""
    scale = n_in / n_out
    support = max(scale, 1.0)  # how far a triangle reaches
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
    for column in exact.T:  # one after the other, as they are summed there
        total += column
    exact /= total[:, None]
    most = float(exact.max())
    precision = next((p for p in range(MAX_PRECISION) if int(0.5 + most * (1 << p + 1)) >= 1 << 15), MAX_PRECISION)
    return first, (0.5 + exact * (1 << precision)).astype(np.int32)[:, : int(n_each.max())], precision
