"""Turns images into embeddings: the encoder, opened at the first image, and a cache of recent results."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from granite4v import clip_projector
from granite4v.choices import VisionCompute
from granite4v.clip_projector.cross_features import CrossFeatures
from granite4v.clip_projector.encoder import choose_kernels, quantized_in_memory
from granite4v.clip_projector.grid_canvas import CanvasLayout
from granite4v.clip_projector.views import View
from granite4v.ggml.backend import Backend
from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.files import ModelFiles

if TYPE_CHECKING:
    from granite4v.clip_projector import Image, ImageFeatures, VisionEncoder

    Features = ImageFeatures | CrossFeatures

FEATURE_CACHE_BYTES = 256 << 20  # about two full pages of embeddings, kept for the next question


class StoredImages(Protocol):
    """Encoder results of earlier images, as bytes by the image's digest."""

    def find_image(self, digest: bytes) -> np.ndarray | None: ...
    def save_image(self, digest: bytes, values: np.ndarray) -> None: ...


class Vision:
    """The image side of a loaded model. Not thread-safe."""

    def __init__(
        self,
        files: ModelFiles,
        device: str,
        n_threads: int,
        abort: AbortFlag,
        in_kv_cache: Callable[[bytes], bool],
        vision_compute: VisionCompute = "file",
    ) -> None:
        """`vision_compute`: see `VisionEncoder`; 'int8' is measured now, so that the type a run uses is known.

        `in_kv_cache(digest)`: whether an image's rows are already in the decoder's cache, so that its embeddings are
        hardly needed any more.
        """
        self._files, self._device, self._n_threads, self._abort = files, device, n_threads, abort
        self._in_kv_cache = in_kv_cache
        self.compute = self._resolved(vision_compute)
        self._features: OrderedDict[bytes, Features] = OrderedDict()
        self.stored: StoredImages | None = None  # set for a decoder that attends to images
        self.states_after = False  # see `VisionEncoder`; set before the first image
        self._encoder: VisionEncoder | None = None

    def _resolved(self, vision_compute: VisionCompute) -> VisionCompute:
        """Returns 'file', 'BF16', or the type that matrices are quantized to in memory."""
        if self._files.vision is None or vision_compute == "file":
            return "file"
        backend = Backend(self._device, self._n_threads)
        try:
            found = quantized_in_memory(self._files.vision, backend, vision_compute)
            if vision_compute == "BF16":
                return vision_compute
            return cast(VisionCompute, found or "file")
        finally:
            backend.close()

    @property
    def is_open(self) -> bool:
        return self._encoder is not None

    def encoder(self, announce: Callable[[], None] | None = None) -> VisionEncoder:
        """Returns the encoder, opening it if need be. `announce`: see `VisionEncoder`. Raises ModelFileError,
        DeviceError, Aborted."""
        if self._encoder is None:
            assert self._files.vision is not None
            abort = (self._abort.callback_address, self._abort.data_address)
            self._encoder = clip_projector.VisionEncoder(
                self._files.vision.path,
                self._device,
                self._n_threads,
                abort,
                announce,
                self.compute,
                states_after=self.states_after,
            )
        return self._encoder

    def kernels(self, announce: Callable[[], None] | None = None) -> dict[str, str]:
        """Names the kernel for each weight type that is not multiplied plainly. Reads no weights; measures on the first
        call on a machine. Raises Aborted."""
        if self._encoder is not None:
            chosen = self._encoder.kernels
        else:
            assert self._files.vision is not None
            backend = Backend(self._device, self._n_threads, (self._abort.callback_address, self._abort.data_address))
            try:
                chosen = choose_kernels(self._files.vision, backend, self.compute, announce)[1]
            finally:
                backend.close()
        return {kind: kernel.name for kind, kernel in chosen.items()}

    def knows(self, image: Image | View) -> bool:
        """Whether an image need not be encoded because its features are kept or stored."""
        if image.digest not in self._features and (stored := self._stored(image)) is not None:
            self._features[image.digest] = stored
        return image.digest in self._features

    def _stored(self, image: Image | View) -> CrossFeatures | None:
        config = self._files.vision_config
        values = None if self.stored is None else self.stored.find_image(image.digest)
        if values is None or config is None or not isinstance(image, View):
            return None
        tower = config.tower
        shape = (tower.max_num_tiles, tower.n_positions, config.text_hidden_size)
        where = image.layout(config)
        if values.nbytes != 4 * math.prod(shape) or not isinstance(where, CanvasLayout):
            return None
        return CrossFeatures(values.view(np.float32).reshape(shape), where)

    def features(self, image: Image | View, report: Callable[[str, int, int], None]) -> Features:
        """Returns an image's embeddings, kept or computed now. `report` gets ('encode', done, total). Raises Aborted
        when the abort flag is raised meanwhile, ModelFileError for damaged weights."""
        if image.digest in self._features:
            self._features.move_to_end(image.digest)
            return self._features[image.digest]
        self._forget_decoded()
        report("encode", 0, 100)
        encoded = self.encoder().encode([image], functools.partial(report, "encode"))[0]
        injection = self._files.injection
        if injection is not None:
            encoded = dataclasses.replace(cast("ImageFeatures", encoded), layers=list(injection.layers))
        self._features[image.digest] = encoded
        if self.stored is not None and isinstance(encoded, CrossFeatures):
            self.stored.save_image(image.digest, encoded.states)
        return encoded

    def _forget_decoded(self) -> None:
        """Drops embeddings whose rows are already in the KV cache, before an image is encoded: a page takes 0.1 GB.
        Keeps images that the decoder attends to, because another request may attend to them next."""
        if self._files.is_cross_attending:
            return
        for digest in [digest for digest in self._features if self._in_kv_cache(digest)]:
            del self._features[digest]

    def trim(self, *, to_one: bool) -> None:
        """Drops the least recently used images until one is left; without `to_one`, only while the embeddings take more
        than `FEATURE_CACHE_BYTES`."""
        n_bytes = 0 if to_one else FEATURE_CACHE_BYTES
        while len(self._features) > 1 and sum(f.nbytes for f in self._features.values()) > n_bytes:
            self._features.popitem(last=False)

    def release(self) -> None:
        """Frees the encoder's intermediate results (0.25 GB a page) before text is decoded on the CPU."""
        if self._encoder is not None and self._encoder.backend.is_cpu and self._encoder.release():
            _trim_heap()

    def clear(self) -> None:
        self._features.clear()

    def close(self) -> None:
        self.clear()
        if self._encoder is not None:
            self._encoder.close()


def _trim_heap() -> None:
    """Returns freed memory to the system. glibc keeps memory that threads other than the main one have freed, here tens
    of megabytes of tiles and embeddings, which would add to the peak; other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
