"""Identifies what a page's cells depend on in addition to its pixels and the prompt: files, arithmetic, and versions.

Two runs with the same identity compute the same bits for the same batches, and only such runs may share a stored state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import PIL

from granite4v.clip_projector.pixels import PREPROCESSING
from granite4v.ggml import onednn
from granite4v.ggml.backend import device_name
from granite4v.ggml.build import build_id, installed_version
from granite4v.ggml.cpu_features import cpu_name
from granite4v.runtime.engine.cross_attention import CrossAttention
from granite4v.runtime.engine.text_model import TextModel
from granite4v.runtime.engine.vision import Vision
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.fingerprint import UnchangedFiles, model_hashes
from granite4v.runtime.llama.library import llama
from granite4v.runtime.llama.weight_copies import MAX_FEW_ROWS

Json = dict[str, Any]


class PageIdentity:
    """The identity of one engine's states, as JSON data. Not thread-safe."""

    def __init__(
        self,
        files: ModelFiles,
        vision: Vision,
        text: TextModel,
        cross: CrossAttention | None = None,
        *,
        device: str,
        n_threads: int,
        attention: Json,
    ) -> None:
        """`cross`: for a decoder with cross-attention. `attention`: how the text model's attention is computed, and the
        type of its KV cache. Raises ModelFileError."""
        self._unchanged = UnchangedFiles(files)
        self._cross = cross
        self._files, self._vision, self._text = files, vision, text
        self._device, self._n_threads, self._attention = device, n_threads, attention
        self._hashes: dict[str, str] | None = None
        # keyed by whether the encoder is open, which then knows its kernels for certain, and whether there are batches
        # of few rows
        self._known: dict[tuple[bool, bool], Json] = {}

    def prepare(self, announce: Callable[[str], None], check: Callable[[], None]) -> None:
        """Computes the checksums of the files, which takes seconds on their first use. `announce` is called with a text
        about what takes that long; `check` is called between pieces and may raise. Raises ModelFileError for an
        unreadable file."""
        if self._hashes is None:
            self._hashes = model_hashes(self._files, announce, check)

    def __call__(self, adapter: bool, least_rows: int) -> Json:
        """See `stored_pages.Identity`. Requires that the text model's placement is chosen, and `prepare`. Raises
        ModelFileError for files that have changed since the model was loaded: text file and encoder are each read on
        first use, so it is then unknown which weights are in memory."""
        self._unchanged.check()
        assert self._hashes is not None
        files = {role: found for role, found in self._hashes.items() if role != "adapter" or adapter}
        kind = (self._vision.is_open, least_rows <= MAX_FEW_ROWS)
        if kind not in self._known:
            self._known[kind] = self._environment(few=kind[1])
        return {**self._known[kind], "files": files}

    def of_images(self) -> Json:
        """Identity of encoded images alone. Requires `prepare`; raises as a call does."""
        self._unchanged.check()
        assert self._hashes is not None
        return {
            "granite4v": version("granite4v"),
            "images": self._images(),
            "machine": self._machine(),
            "llama_cpp_python": [installed_version(), build_id()],
            "files": {"vision": self._hashes["vision"]},
        }

    def _environment(self, *, few: bool) -> Json:
        arithmetic = json.dumps(self._text.placement.arithmetic(few=few))
        return {
            "granite4v": version("granite4v"),
            "llama_cpp_python": [installed_version(), build_id(), llama().LLAMA_STATE_SEQ_VERSION],
            "images": self._images(),
            "text": {**self._attention, "weights": hashlib.sha256(arithmetic.encode()).hexdigest()},
            "machine": self._machine(),
            **({} if self._cross is None else {"cross_attention": self._cross.identity()}),
        }

    def _images(self) -> Json:
        found = {
            "preprocessing": [PREPROCESSING, PIL.__version__],
            "compute": self._vision.compute,
            "kernels": self._vision.kernels(),
            "onednn": onednn.version(),
        }
        return {**found, "states_after": True} if self._vision.states_after else found

    def _machine(self) -> list[Any]:
        return [device_name(self._device), cpu_name(), self._n_threads]
