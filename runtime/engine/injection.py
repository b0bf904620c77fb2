"""Prepares image embeddings for the decoder: one batch row per image token, which contains every stream, and one for
each vocabulary token between them.

llama.cpp takes rows of `llama_model_n_embd_inp()` values: `n_slots` slots of `n_embd` side by side, each added to the
hidden state before one decoder layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.token_rows import token_rows
from granite4v.runtime.prompt.spans import ImageSpan

if TYPE_CHECKING:
    from granite4v.clip_projector import ImageFeatures


class EmbeddingRows:
    """An image's streams in the form llama.cpp takes; rows are assembled on access (0.1 MB each)."""

    def __init__(self, features: ImageFeatures, span: ImageSpan, files: ModelFiles) -> None:
        """Raises ModelFileError if there are tokens between the embeddings and their rows cannot be read."""
        assert files.injection is not None
        self._rows, self._slots, self._n_slots = features.rows, files.injection.slots, files.injection.n_slots
        if span.between:
            assert self._slots == (0,)  # a token has only one stream
            between = token_rows(files.text, span.tokens)
            places = [place - i for i, (place, _) in enumerate(span.between)]  # embeddings that follow a token
            self._rows = np.insert(features.rows, places, between[:, None], axis=0)

    def __getitem__(self, part: slice) -> np.ndarray:
        """float32 `(n, n_slots * n_embd)`; slots without a stream are zero."""
        rows = self._rows[part]
        n, _, n_embd = rows.shape
        if self._slots == tuple(range(self._n_slots)):
            return rows.reshape(n, -1)
        placed = np.zeros((n, self._n_slots, n_embd), dtype=np.float32)
        placed[:, list(self._slots)] = rows
        return placed.reshape(n, -1)
