"""Decides which images the rows of a request attend to, for a decoder with cross-attention layers.

A row sees the last image at or before it, plus the images directly before that one without text in between. What was
said about earlier images is in the cells of the decoder's own layers. So what a sequence sees follows from its prompt
and its length alone, even if its cells were moved or restored. Keys and values are kept for one view only, and
recomputed for another.

Rows before the first image see nothing, and the cross-attention layers leave them unchanged: the rule that published
weights were trained with ('original'). transformers lets them attend to all images, including absent tiles, and skips
the MLP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from granite4v import gguf_keys as keys
from granite4v.clip_projector.weights import Weights
from granite4v.errors import ModelFileError
from granite4v.families.base import CrossAttentionConfig
from granite4v.ggml.backend import Backend
from granite4v.ggml.compiled.between_layers import InPlace
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.metadata import AGAIN
from granite4v.runtime.engine.cross_layers import CrossLayers, cross_kernels, cross_node_kernels, kv_type
from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.files import MAX_LAYERS, ModelFiles
from granite4v.runtime.llama.layer_hook import LayerHook
from granite4v.runtime.prompt.spans import ImageSpan, Span

if TYPE_CHECKING:
    from granite4v.clip_projector.cross_features import CrossFeatures

CrossRule = Literal["original", "transformers"]


@dataclass(frozen=True)
class Sight:
    """What rows attend to: images, identified by their digests. `before_first`: the rows lie before the first image;
    under transformers' rule they see all images and absent tiles."""

    images: tuple[ImageSpan, ...]
    before_first: bool = False

    @property
    def key(self) -> tuple[tuple[bytes, ...], bool]:
        return tuple(span.digest for span in self.images), self.before_first


def sight(spans: Sequence[Span], position: int, rule: CrossRule = "original") -> Sight:
    """Returns what the row at a position of a prompt and its answer attends to; the following rows see the same up to
    the next image.

    For example, with image, image, text, image: row 0 sees the first image, text rows see both, and rows after the last
    image see only that one.
    """
    seen: list[ImageSpan] = []
    start, is_run = 0, False
    for span in spans:
        if start > position:
            break
        is_image = isinstance(span, ImageSpan)
        if isinstance(span, ImageSpan):
            seen = [*seen, span] if is_run else [span]
        start, is_run = start + span.n_tokens, is_image
    if not seen and rule == "transformers":
        return Sight(tuple(span for span in spans if isinstance(span, ImageSpan)), before_first=True)
    return Sight(tuple(seen))


class CrossAttention:
    """The cross-attention layers of one engine, and what its rows attend to now. Not thread-safe."""

    def __init__(self, files: ModelFiles, device: str, n_threads: int, abort: AbortFlag, *, exact: bool) -> None:
        """Requires a model whose vision file has cross-attention layers. `exact`: float32, for comparing values."""
        assert files.vision is not None and files.vision_config is not None
        config = files.vision_config.cross_attention
        assert config is not None
        self._file: GgufFile = files.vision
        self._config: CrossAttentionConfig = config
        self._device, self._n_threads, self._abort, self._exact = device, n_threads, abort, exact
        self.rule: CrossRule = "original"
        self._backend: Backend | None = None
        self._layers: CrossLayers | None = None
        self._key: object = None
        self._before_first = False
        self._row: np.ndarray | None = None
        self._places = layers_by_place(config)
        n_layers = files.text.integer(files.text_key(keys.BLOCK_COUNT), 1, MAX_LAYERS)
        computes = {place: partial(self._run, layers) for place, layers in self._places.items()}
        self.hook = LayerHook(n_layers, computes, self._in_place)

    @classmethod
    def of(
        cls, files: ModelFiles, device: str, n_threads: int, abort: AbortFlag, *, exact: bool
    ) -> CrossAttention | None:
        """Returns None for a decoder without such layers."""
        return cls(files, device, n_threads, abort, exact=exact) if files.is_cross_attending else None

    def look(
        self,
        spans: Sequence[Span],
        position: int,
        features: Callable[[ImageSpan], CrossFeatures],
        computing: contextlib.AbstractContextManager[None],
    ) -> None:
        """Sets what rows attend to, before those from `position` on are decoded, up to the next image.

        `features(span)` encodes an image; `computing` wraps all other computation. Raises what these raise,
        ModelFileError, DeviceError, Aborted.
        """
        seen = sight(spans, position, self.rule)
        self.hook.is_wanted, self._before_first = bool(seen.images), seen.before_first
        if not seen.images or seen.key == self._key:
            return
        self._key = None
        found = [features(span) for span in seen.images]
        states = [image.states if seen.before_first else image.states[: image.n_tiles] for image in found]
        rows = np.concatenate([tiles.reshape(-1, self._config.hidden_size) for tiles in states])
        with computing:
            self._opened().look_at(rows)
        self._key = seen.key

    def forget(self) -> None:
        """Makes the images of the next rows be encoded again."""
        self._key = None

    def _opened(self) -> CrossLayers:
        """Returns the layers, opened on first use. Raises ModelFileError, DeviceError, Aborted."""
        if self._layers is None:
            self._layers = CrossLayers(self._file, self._config, self._started(), exact=self._exact)
        return self._layers

    def _started(self) -> Backend:
        if self._backend is None:
            abort = (self._abort.callback_address, self._abort.data_address)
            self._backend = Backend(self._device, self._n_threads, abort)
        return self._backend

    def identity(self) -> dict[str, Any]:
        """What the values of rows depend on in addition to the files and the image, as JSON data. May measure kernels,
        as `look`."""
        kernels = {} if self._exact else cross_kernels(self._file, self._started())
        named = {kind: [many.name, few.name] for kind, (many, few) in sorted(kernels.items())}
        compiled = cross_node_kernels(self._file, self._config, self._started(), exact=self._exact).description
        return {
            "rule": self.rule,
            "kernels": named,
            "compiled": compiled,
            "kv": kv_type(self._file, self._config, exact=self._exact),
        }

    @property
    def token_row(self) -> np.ndarray:
        """The embedding of the image token, float32 `(1, hidden_size)`. Raises ModelFileError."""
        if self._row is None:
            info = self._file.tensors.get(keys.IMAGE_TOKEN_EMBD)
            if info is None:
                raise ModelFileError(f"'{self._file.path}' has no tensor '{keys.IMAGE_TOKEN_EMBD}'; {AGAIN}.")
            backend = Backend("cpu", 1)
            weights = Weights(self._file, backend, {}, infos=[info])
            try:
                self._row = weights.array(keys.IMAGE_TOKEN_EMBD, 1, self._config.hidden_size)
            finally:
                weights.close()
                backend.close()
        return self._row

    def _run(self, layers: tuple[int, ...], rows: np.ndarray, n_threads: int) -> np.ndarray:
        return self._opened().run(layers, rows, n_threads, with_mlp=not self._before_first)

    def _in_place(self, place: int, n_rows: int, n_threads: int) -> InPlace | None:
        with_mlp = not self._before_first
        return self._opened().in_place(self._places[place], n_rows, n_threads, with_mlp=with_mlp)

    def close(self) -> None:
        layers, self._layers = self._layers, None
        if layers is not None:
            layers.close()
        if self._backend is not None:
            self._backend.close()


def layers_by_place(config: CrossAttentionConfig) -> dict[int, tuple[int, ...]]:
    """Groups consecutive cross-attention layers by the number of the text file's layers before them.

    For example, with nine layers of which 1, 3, 4 and 8 are cross-attention: {1: (1,), 2: (3, 4), 5: (8,)}.
    """
    places: dict[int, tuple[int, ...]] = {}
    for n_before, layer in enumerate(config.layers):
        places[layer - n_before] = (*places.get(layer - n_before, ()), layer)
    return places
