"""How image embeddings reach the decoder: one batch row per image token, which contains every stream.

llama.cpp takes rows of `llama_model_n_embd_inp()` values: `n_slots` slots of `n_embd` side by side, each added to the
hidden state before one decoder layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from granite4v.runtime.llama.files import Injection

if TYPE_CHECKING:
    from granite4v.clip_projector import ImageFeatures


class EmbeddingRows:
    """An image's streams as llama.cpp takes them; rows are put together when they are asked for (0.1 MB each)."""

    def __init__(self, features: ImageFeatures, injection: Injection) -> None:
        self._rows, self._slots, self._n_slots = features.rows, injection.slots, injection.n_slots

    def __getitem__(self, part: slice) -> np.ndarray:
        """float32 `(n, n_slots * n_embd)`; a slot that no stream feeds is zero."""
        rows = self._rows[part]
        n, _, n_embd = rows.shape
        if self._slots == tuple(range(self._n_slots)):
            return rows.reshape(n, -1)
        placed = np.zeros((n, self._n_slots, n_embd), dtype=np.float32)
        placed[:, list(self._slots)] = rows
        return placed.reshape(n, -1)
