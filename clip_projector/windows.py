"""Index tables for the window projectors: plain NumPy, each a permutation or a selection of raster positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def window_order(side: int, window_side: int) -> np.ndarray:
    """Raster positions of a `side` x `side` grid, window by window, each window in raster order; int32."""
    import numpy as np

    n = side // window_side
    raster = np.arange(side * side, dtype=np.int32).reshape(n, window_side, n, window_side)
    return np.ascontiguousarray(raster.swapaxes(1, 2)).reshape(-1)


def raster_order(side: int, window_side: int) -> np.ndarray:
    """The inverse of `window_order`: where each raster position stands among the windows."""
    import numpy as np

    return np.argsort(window_order(side, window_side)).astype(np.int32)


def corner_of_blocks(side: int, offset: int) -> np.ndarray:
    """Raster positions of one corner of every 2x2 block: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    import numpy as np

    raster = np.arange(side * side, dtype=np.int32).reshape(side, side)
    return np.ascontiguousarray(raster[offset // 2 :: 2, offset % 2 :: 2]).reshape(-1)
