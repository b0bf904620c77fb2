"""One request: the source of its logits, pictures first, and the time each part takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from granite4v.ggml.backend import Aborted
from granite4v.runtime.engine.decoder import PrefillStats, Rows
from granite4v.runtime.engine.engine import Engine
from granite4v.runtime.engine.generate import Answer
from granite4v.runtime.llama.files import Injection
from granite4v.runtime.llama.library import Cancel
from granite4v.runtime.prompt.spans import ImageSpan, Prompt, Span, TextSpan

if TYPE_CHECKING:
    import numpy as np

    from granite4v.clip_projector import ImageFeatures


class Request:
    """The source of logits for one prompt. Goes on even if another request used the cache in between."""

    def __init__(self, engine: Engine, prompt: Prompt, max_tokens: int, adapter: bool, cancel: Cancel | None) -> None:
        self._engine, self._prompt, self._adapter, self._cancel = engine, prompt, adapter, cancel
        self._max_tokens = max_tokens
        self._epoch, self._n_decoded = -1, 0  # tokens of the answer that the decoder has seen
        self.answer = Answer(warnings=list(engine.warnings))
        self.answer.timings.n_prompt = prompt.n_tokens
        self.answer.timings.n_image = prompt.n_image_tokens

    def first(self) -> np.ndarray:
        return self._prefill(self._prompt.spans, self._max_tokens)

    def next(self, tokens: Sequence[int]) -> np.ndarray:
        engine = self._engine
        if not engine.closed and engine.text_is_open and engine.decoder().epoch == self._epoch:
            logits = engine.decoder().extend(tokens[self._n_decoded :], self._cancel)
        else:
            logits = self._prefill((*self._prompt.spans, TextSpan(tuple(tokens))), self._max_tokens - len(tokens))
        self._n_decoded = len(tokens)
        return logits

    def _prefill(self, spans: Sequence[Span], room_for: int) -> np.ndarray:
        engine, timings = self._engine, self.answer.timings
        engine.check_open()
        if not engine.text_is_open:
            # before the text weights are in memory, so that the two peaks do not add up
            for span in spans:
                if isinstance(span, ImageSpan):
                    self._encode(span)
        start = time.perf_counter()
        decoder = engine.decoder()
        timings.load_s += time.perf_counter() - start
        engine.release_encoder()
        engine.report("prefill", 0, sum(span.n_tokens for span in spans))
        stats = PrefillStats()
        try:
            logits = decoder.prefill(
                spans,
                self._rows,
                adapter=self._adapter,
                room_for=room_for,
                cancel=self._cancel,
                stats=stats,
                progress=lambda done, total: engine.report("prefill", done, total),
            )
        finally:
            timings.prefill_image_s += stats.image_s
            timings.prefill_text_s += stats.text_s
            timings.n_reused += stats.reused
            engine.trim_features()
        self._epoch = decoder.epoch
        return logits

    def _rows(self, span: ImageSpan) -> Rows:
        features = self._encode(span)
        self._engine.release_encoder()
        assert self._engine.injection is not None
        return EmbeddingRows(features, self._engine.injection)

    def _encode(self, span: ImageSpan) -> ImageFeatures:
        if self._cancel is not None and self._cancel():
            raise Aborted
        timings, start = self.answer.timings, time.perf_counter()
        self._engine.encoder()
        opened = time.perf_counter()
        is_new = span.digest not in self._engine.features
        features = self._engine.encode(self._prompt.images[span.index], self._cancel)
        timings.n_encoded += is_new
        timings.load_s += opened - start
        timings.encode_s += time.perf_counter() - opened
        return features


class EmbeddingRows:
    """A picture's streams as llama.cpp takes them: one row a token, all slots side by side."""

    def __init__(self, features: ImageFeatures, injection: Injection) -> None:
        self._rows, self._slots, self._n_slots = features.rows, injection.slots, injection.n_slots

    def __getitem__(self, part: slice) -> np.ndarray:
        """float32 `(n, n_slots * n_embd)`; a slot that no stream feeds is zero."""
        import numpy as np

        rows = self._rows[part]
        n, _, n_embd = rows.shape
        if self._slots == tuple(range(self._n_slots)):
            return rows.reshape(n, -1)
        placed = np.zeros((n, self._n_slots, n_embd), dtype=np.float32)
        placed[:, self._slots] = rows
        return placed.reshape(n, -1)
