"""The text model of an engine: chooses where its weights go on this machine, and opens the model with them, once."""

from __future__ import annotations

from collections.abc import Callable

from granite4v import gguf_keys as keys
from granite4v.choices import whole_number
from granite4v.errors import ModelFileError
from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import n_weights
from granite4v.ggml.slow_weights import warn_if_slow
from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.files import MAX_COUNT, ModelFiles
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.llama.placement import Placement, choose_placement
from granite4v.runtime.llama.weight_copies import open_model

DEFAULT_CONTEXT = 8192  # tokens, if the model's training context is not smaller


def context_size(files: ModelFiles, asked: int | None, warnings: list[str]) -> int:
    """Returns the context size in tokens, prompt and answer together: `asked`, or 8192 if None, but at most the
    training context. A warning is added if `asked` was reduced. Raises TypeError, ArgumentError."""
    n_ctx = DEFAULT_CONTEXT if asked is None else whole_number("n_ctx", asked, 1)
    trained = files.text.integer(files.text_key(keys.CONTEXT_LENGTH), 1, MAX_COUNT)
    if asked is not None and n_ctx > trained:
        warnings.append(f"the context is {trained:,} tokens, not {n_ctx:,}: that is the model's training context")
    return min(n_ctx, trained)


class TextModel:
    """The text model, opened on first use. Not thread-safe."""

    def __init__(
        self, files: ModelFiles, device: str, n_threads: int, abort: AbortFlag, *, exact: bool, **way: bool
    ) -> None:
        """`exact`: no copies of weights, for comparing values; `way`: see `choose_placement`."""
        self._files, self._device, self._n_threads, self._abort = files, device, n_threads, abort
        self._exact, self._way = exact, way
        self._model: LlamaModel | None = None
        self.placement = Placement()

    @property
    def is_open(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> LlamaModel:
        """The model, once it is open."""
        assert self._model is not None
        return self._model

    def choose(self, announce: Callable[[], None]) -> None:
        """Decides where weights go, by the memory available now. The last choice before `open`
        counts. Raises Aborted."""
        if self._exact:
            return
        backend = Backend(self._device, self._n_threads, (self._abort.callback_address, self._abort.data_address))
        try:
            tensors = self._files.text.tensors
            self.placement = choose_placement(tensors, backend, announce, **self._way)
            warn_if_slow(self._files.text.path, "text", n_weights(tensors.values()), backend)
        finally:
            backend.close()

    def open(self) -> None:
        """Opens the model and its adapter. Raises ModelFileError, DeviceError."""
        model = open_model(self._files.text.path, self.placement, device=self._device, n_threads=self._n_threads)
        try:
            self._check_width(model)
            if self._files.adapter is not None:
                model.load_adapter(self._files.adapter.path)
        except BaseException:
            model.close()
            raise
        self._model = model

    def _check_width(self, model: LlamaModel) -> None:
        injection = self._files.injection
        if injection is not None and model.n_embd_inp != model.n_embd * injection.n_slots:
            raise ModelFileError(
                f"llama.cpp takes embeddings of width {model.n_embd_inp} for '{model.path}', expected "
                f"{model.n_embd * injection.n_slots}; convert it again with 'granite4v convert'."
            )

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
