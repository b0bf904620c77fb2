"""Converts uint8 tiles to the patches that a tower takes, independent of the tiling."""

from __future__ import annotations

import numpy as np

from granite4v.families.base import CanvasConfig, Tiling

# increment when the same image and model give other tiles or pixel values; stored pages are then computed again
PREPROCESSING = 1


def normalize(tiles: np.ndarray, tiling: Tiling) -> np.ndarray:
    """Normalizes uint8 tiles to float32 of the same shape: (value * rescale_factor - mean) / std.

    Uses a lookup table of the 256 possible values of each channel.
    """
    mean, std = np.array(tiling.image_mean, dtype=np.float32), np.array(tiling.image_std, dtype=np.float32)
    if isinstance(tiling, CanvasConfig) and tiling.low_precision:  # the reference rounds each step to bfloat16
        values = _bfloat16(np.arange(256, dtype=np.float32) * np.float32(tiling.rescale_factor))[:, None]
        table = _bfloat16(_bfloat16(values - _bfloat16(mean)) / _bfloat16(std))
    else:
        values = (np.arange(256, dtype=np.float64) * tiling.rescale_factor).astype(np.float32)[:, None]
        table = (values - mean) / std
    return np.stack([table[:, channel][tiles[..., channel]] for channel in range(3)], axis=-1)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16, ties to even; returns float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)).view(np.float32)


def patches(tiles: np.ndarray, patch_size: int) -> np.ndarray:
    """Cuts normalized tiles `(tiles, px, px, 3)` into patches `(tiles, patches, 3 * patch_size^2)`.

    The values of a patch are in the order of the convolution kernel (channel, row, column), so that patch
    embedding is a matrix product in float32; ggml_conv_2d would round the pixels to half precision.
    """
    n, px, _, channels = tiles.shape
    side = px // patch_size
    covered = tiles[:, : side * patch_size, : side * patch_size]  # drops incomplete patches, like a convolution
    grid = covered.reshape(n, side, patch_size, side, patch_size, channels).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(grid).reshape(n, side * side, channels * patch_size**2)
