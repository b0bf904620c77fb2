"""The parts of a loaded model, each opened when it is first needed, and the pictures they have read.

The vision file's weights are read at the first picture, the text file's after that, so a text-only request never
touches the vision file and the two peaks of memory do not add up.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from granite4v import gguf_keys as keys
from granite4v.choices import whole_number
from granite4v.errors import ModelFileError
from granite4v.runtime.engine.decoder import Decoder
from granite4v.runtime.engine.trial import try_once
from granite4v.runtime.llama.files import MAX_COUNT, ModelFiles
from granite4v.runtime.llama.library import Cancel, Worker
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.llama.placement import N_UBATCH, Placement, choose_placement
from granite4v.runtime.prompt.spans import check_length, image_token, image_token_text
from granite4v.runtime.prompt.template import ChatTemplate
from granite4v.runtime.prompt.tokenizer import Tokenizer, load_tokenizer, special_tokens, stop_tokens

if TYPE_CHECKING:
    from granite4v.clip_projector import Image, ImageFeatures, VisionEncoder

FEATURE_CACHE_BYTES = 256 << 20  # embeddings of about two full pages are kept for the next question
Progress = Callable[[str, int, int], None]  # (what is going on, done, to do)


DEFAULT_CONTEXT = 8192  # tokens, where the model has as many


class Engine:
    """Files, tokenizer, template, encoder and decoder of one model. Not for several threads at once."""

    def __init__(
        self, files: ModelFiles, *, n_ctx: int | None, n_threads: int | None, device: str, exact: bool
    ) -> None:
        from granite4v.ggml.backend import check_threads, find_device

        find_device(device)  # a device that is missing is reported now, not after the first picture
        self.files, self.device, self.exact = files, device, exact
        self.n_threads = check_threads(n_threads)
        self.warnings: list[str] = []
        self.progress: Progress | None = None
        self.n_ctx = self._limit_context(n_ctx)
        self.injection = files.injection
        self.placeholder = image_token(files.text)
        self.placeholder_text = image_token_text(files.text)
        self.stop_tokens = stop_tokens(files.text)
        self.features: OrderedDict[bytes, ImageFeatures] = OrderedDict()
        self.closed = False
        self._tried = False
        self._longest_token = 0  # bytes; not known yet
        self._worker = Worker("granite4v")
        self._encoder: VisionEncoder | None = None
        self._decoder: Decoder | None = None
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._placement = Placement()
        self.warnings += [f"a file beside the model is left out: {str(error).rstrip('.')}" for error in files.left_out]
        if keys.TOKENIZER_HF_JSON not in files.text:
            self.warnings.append(
                f"'{files.text.path}' carries no tokenizer.json; llama.cpp's tokenizer is used, which may split text "
                "(long numbers above all) otherwise than the model was trained on"
            )

    def _limit_context(self, asked: int | None) -> int:
        n_ctx = DEFAULT_CONTEXT if asked is None else whole_number("n_ctx", asked, 1)
        trained = self.files.text.integer(self.files.text_key(keys.CONTEXT_LENGTH), 1, MAX_COUNT)
        if asked is not None and n_ctx > trained:
            self.warnings.append(f"the context is {trained:,} tokens, not {n_ctx:,}: the model was trained for no more")
        return min(n_ctx, trained)

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen for this machine, as plain data."""
        encoder = self._encoder
        placed = {name: len(tensors) for name, tensors in self._placement.tensors.items()}
        return {
            "device": self.device,
            "n_threads": self.n_threads,
            "n_ubatch": N_UBATCH,
            "n_ctx": self._decoder.context_size if self._decoder else 0,
            "mmap": not placed,
            "text_buffer_types": placed,
            "vision_kernels": {kind: kernel.name for kind, kernel in encoder.kernels.items()} if encoder else {},
        }

    @property
    def text_is_open(self) -> bool:
        return self._decoder is not None

    @property
    def vision_is_open(self) -> bool:
        return self._encoder is not None

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._try_once()
            self._tokenizer = load_tokenizer(self.files.text, self.files.text.path)
        return self._tokenizer

    def check_length(self, text: str) -> None:
        """Raises ContextOverflowError for a text that is certain to overflow the context, before it is split."""
        if len(text) > self.n_ctx:
            if not self._longest_token:
                tokens = self.files.text.texts(keys.TOKENS, [])
                self._longest_token = max((len(token.encode()) for token in tokens), default=1)
            check_length(text, self._longest_token, self.n_ctx)

    def _try_once(self) -> None:
        """Before native code of this process meets the text file: see `trial`."""
        if not self._tried:
            try_once(self.files, lambda: self.report("check", 0, 1))
            self._tried = True

    def template(self) -> ChatTemplate:
        if self._template is None:
            source = self.files.text.text(keys.CHAT_TEMPLATE)
            self._template = ChatTemplate(source, special_tokens(self.files.text))
        return self._template

    def need_vision(self) -> None:
        """Raises ModelFileError for a model without a vision file."""
        if self.files.vision is None:
            raise ModelFileError(
                f"'{self.files.text.path}' has no vision file beside it, so it cannot look at images; give one with "
                "'--mmproj', or a model directory that holds both."
            )

    def check_open(self) -> None:
        if self.closed:
            raise ValueError("the model is closed")

    def encoder(self) -> VisionEncoder:
        self.check_open()
        if self._encoder is None:
            from granite4v.clip_projector import VisionEncoder

            self.need_vision()
            assert self.files.vision is not None
            abort = (self._worker.abort_address, self._worker.abort_data)
            self._encoder = VisionEncoder(self.files.vision.path, self.device, self.n_threads, abort)
        return self._encoder

    def decoder(self) -> Decoder:
        self.check_open()
        if self._decoder is None:
            self._try_once()
            self.report("load", 0, 1)
            if not self.exact:
                self._placement = self._choose_placement()
            model = LlamaModel(self.files.text.path, device=self.device, placement=self._placement)
            try:
                self._check_width(model)
                if self.files.adapter is not None:
                    model.load_adapter(self.files.adapter.path)
            except BaseException:
                model.close()
                raise
            n_ubatch = min(N_UBATCH, self.n_ctx)
            self._decoder = Decoder(model, self.n_ctx, n_ubatch, self.n_threads, self._worker, exact=self.exact)
            self.report("load", 1, 1)
        return self._decoder

    def _choose_placement(self) -> Placement:
        from granite4v.ggml.backend import Backend

        backend = Backend(self.device, self.n_threads)
        try:
            return choose_placement(self.files.text.tensors, backend)
        finally:
            backend.close()

    def _check_width(self, model: LlamaModel) -> None:
        if self.injection is not None and model.n_embd_inp != model.n_embd * self.injection.n_slots:
            raise ModelFileError(
                f"llama.cpp takes embeddings of width {model.n_embd_inp} for '{model.path}', expected "
                f"{model.n_embd * self.injection.n_slots}; convert it again with 'granite4v convert'."
            )

    def encode(self, image: Image, cancel: Cancel | None = None) -> ImageFeatures:
        """The picture's features, from the cache or computed now. Raises Aborted when cancelled."""
        digest = image.digest
        if digest in self.features:
            self.features.move_to_end(digest)
            return self.features[digest]
        self.report("encode", 0, 100)
        encoder = self.encoder()

        def progress(done: int, total: int) -> None:
            self.report("encode", done, total)

        assert self.injection is not None
        wanted = progress if self.progress is not None else None
        encoded = self._worker.run(lambda: encoder.encode([image], wanted), cancel)[0]
        features = dataclasses.replace(encoded, layers=list(self.injection.layers))
        self.features[digest] = features
        return features

    def release_encoder(self) -> None:
        """Before text is decoded on the CPU: the encoder's intermediate results share its memory (0.25 GB a page)."""
        if self._encoder is not None and self._encoder.backend.is_cpu:
            self._encoder.release()

    def trim_features(self) -> None:
        """Lets go of the pictures that were asked about longest ago."""
        while len(self.features) > 1 and sum(f.rows.nbytes for f in self.features.values()) > FEATURE_CACHE_BYTES:
            self.features.popitem(last=False)

    def clear(self) -> None:
        """Forgets all pictures and prompts."""
        self.features.clear()
        if self._decoder is not None:
            self._decoder.forget()

    def report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def close(self) -> None:
        self.closed = True
        self._worker.close()  # first: an interrupted call may still be at work on what is freed below
        if self._decoder is not None:
            self._decoder.close()
            self._decoder.model.close()
        if self._encoder is not None:
            self._encoder.close()
        if self._tokenizer is not None:
            self._tokenizer.close()
        self.features.clear()
        self.files.close()
