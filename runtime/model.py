"""A loaded model: pictures and messages in, logits and answers out. The public face of the runtime.

Weights are read when they are first needed: the vision file's at the first picture, the text file's after that,
so a text-only request never touches the vision file and the two peaks of memory do not add up.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from granite4v import gguf_keys as keys
from granite4v.errors import ModelFileError
from granite4v.ggml.backend import Aborted
from granite4v.runtime.decoder import Decoder, PrefillStats, Rows
from granite4v.runtime.generate import Answer, generate
from granite4v.runtime.llama import LlamaModel
from granite4v.runtime.messages import Prompt as PromptLike
from granite4v.runtime.messages import normalize
from granite4v.runtime.model_files import Injection, ModelFiles
from granite4v.runtime.native import Cancel, Worker
from granite4v.runtime.prompt import ImageSpan, Prompt, Span, TextSpan, build_prompt, check_fits, image_token
from granite4v.runtime.sampling import Sampling
from granite4v.runtime.settings import N_UBATCH, Placement, choose_placement
from granite4v.runtime.template import ChatTemplate
from granite4v.runtime.tokens import Tokenizer, load_tokenizer, special_tokens, stop_tokens

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from granite4v.clip_projector import ImageFeatures, ImageSource, VisionEncoder

FEATURE_CACHE_BYTES = 256 << 20  # embeddings of about two full pages are kept for the next question
Progress = Callable[[str, int, int], None]  # (what is going on, done, to do)


class Model:
    """Use `granite4v.load` or `Model.load` to get one. Calls from several threads take turns."""

    def __init__(
        self, files: ModelFiles, *, n_ctx: int, n_threads: int | None, device: str, exact: bool, lora: bool | None
    ) -> None:
        from granite4v.ggml.backend import default_threads, find_device

        find_device(device)  # a device that is missing is reported now, not after the first picture
        self.files, self.device, self.exact = files, device, exact
        self.n_threads = n_threads or default_threads()
        self.warnings: list[str] = []
        self.progress: Progress | None = None
        self.n_ctx = self._limit_context(n_ctx)
        self._lora = lora
        self._injection: Injection | None = files.injection
        self._placeholder = image_token(files.text)
        self._stop_tokens = stop_tokens(files.text)
        self._lock = threading.RLock()
        self._worker = Worker("granite4v")
        self._features: OrderedDict[bytes, ImageFeatures] = OrderedDict()
        self._encoder: VisionEncoder | None = None
        self._decoder: Decoder | None = None
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._placement = Placement()
        self._closed = False
        if keys.TOKENIZER_HF_JSON not in files.text:
            self.warnings.append(
                f"'{files.text.path}' carries no tokenizer.json; llama.cpp's tokenizer is used, which may split text "
                "(long numbers above all) otherwise than the model was trained on"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        n_ctx: int = 8192,
        n_threads: int | None = None,
        device: str = "auto",
        mmproj: str | Path | None = None,
        lora: bool | str | Path | None = None,
        exact: bool | None = None,
    ) -> Model:
        """The model in a directory made by `granite4v convert`, or of a text GGUF (with `mmproj`, its vision file).

        `n_ctx`: tokens a request and its answer may have together. `n_threads`: one for each core by default.
        `device`: 'cpu', 'cuda', 'metal' or 'auto' (a GPU if there is one). `lora`: when a separate LoRA is applied:
        None for requests with pictures only, True always, False never; a path names another adapter file.
        `exact`: float32 cache and plain attention, for comparing values with a reference rather than for speed;
        None means for float32 files, which nobody makes for another reason.

        Raises ModelFileError for files that are broken or do not fit together, DeviceError for a missing device.
        """
        adapter = lora if isinstance(lora, str | Path) else None
        files = ModelFiles.open(path, mmproj=mmproj, adapter=adapter)
        policy = lora if isinstance(lora, bool) else None
        if exact is None:
            exact = all(info.type_name == "F32" for info in files.text.tensors.values())
        try:
            return cls(files, n_ctx=n_ctx, n_threads=n_threads, device=device, exact=exact, lora=policy)
        except BaseException:
            files.close()
            raise

    # --- what it can do ---

    @property
    def has_vision(self) -> bool:
        return self.files.vision is not None

    @property
    def has_lora(self) -> bool:
        """Whether there is a separate adapter to switch on and off."""
        return self.files.adapter is not None

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen for this machine, as plain data."""
        placed = {name: len(tensors) for name, tensors in self._placement.tensors.items()}
        return {
            "device": self.device,
            "n_threads": self.n_threads,
            "n_ubatch": N_UBATCH,
            "n_ctx": self._decoder.context_size if self._decoder else 0,
            "mmap": not placed,
            "text_buffer_types": placed,
            "vision_ways": {kind: way.name for kind, way in self._encoder.ways.items()} if self._encoder else {},
        }

    def encode_image(self, source: ImageSource) -> ImageFeatures:
        """The picture's embeddings: `streams` float32 (n_streams, n_tokens, n_embd), and `layers`, sorted, the
        decoder layer before which each stream is added. Raises ImageError, ModelFileError."""
        from granite4v.clip_projector import load_image
        from granite4v.runtime.prompt import image_digest

        with self._lock:
            self._need_vision()
            image = load_image(source)
            return self._encode(image, image_digest(image), None)

    def logits(
        self, prompt: PromptLike, images: Sequence[ImageSource] | ImageSource = (), *, lora: bool | None = None
    ) -> np.ndarray:
        """Logits of the token after the chat prompt, float32 `(n_vocab,)`."""
        with self._lock:
            request = self._request(prompt, images, max_tokens=0, lora=lora, cancel=None, variables={})
            return request.first()

    def score(
        self,
        prompt: PromptLike,
        images: Sequence[ImageSource] | ImageSource = (),
        *,
        tokens: Sequence[int],
        lora: bool | None = None,
    ) -> np.ndarray:
        """Logits before each of `tokens` when they are forced as the answer, float32 `(len(tokens), n_vocab)`."""
        import numpy as np

        with self._lock:
            request = self._request(prompt, images, max_tokens=len(tokens), lora=lora, cancel=None, variables={})
            rows = [request.first()]
            rows += [request.next(tokens[:i]) for i in range(1, len(tokens))]
            return np.stack(rows)

    def generate(
        self,
        prompt: PromptLike,
        images: Sequence[ImageSource] | ImageSource = (),
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        lora: bool | None = None,
        cancel: Cancel | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Answer:
        """The whole answer. Arguments as for `stream`."""
        with self._lock:
            stream = self.stream(
                prompt,
                images,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repeat_penalty=repeat_penalty,
                seed=seed,
                stop=stop,
                ignore_eos=ignore_eos,
                lora=lora,
                cancel=cancel,
                template_variables=template_variables,
            )
            for _ in stream:
                pass
            return stream.answer

    def stream(
        self,
        prompt: PromptLike,
        images: Sequence[ImageSource] | ImageSource = (),
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        lora: bool | None = None,
        cancel: Cancel | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> AnswerStream:
        """Pieces of the answer as they come; `answer` of what is returned has the rest once they are all out.

        `prompt`: text (one user turn: the images first, then the text), or messages in the content-part form of
        OpenAI's and Hugging Face's APIs; image parts without a picture of their own take `images` in order.
        `max_tokens`: the most the answer may have. Temperature 0 is greedy. `stop`: texts that end the answer and
        are not part of it. `ignore_eos`: go on to `max_tokens` whatever the model says (for measuring). `lora`:
        whether a separate adapter is applied; None follows the model's policy. `cancel`: asked often, from the
        calling thread, whether to stop. `template_variables`: for the chat template.

        The request is checked before anything is computed: raises PromptError, ContextOverflowError, ImageError.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed=seed)
        if isinstance(stop, str):
            stop = (stop,)
        with self._lock:
            request = self._request(
                prompt, images, max_tokens=max_tokens, lora=lora, cancel=cancel, variables=template_variables or {}
            )
            pieces = generate(
                request,
                request.answer,
                self._open_tokenizer().text_stream(),
                sampling=sampling,
                stop_tokens=frozenset() if ignore_eos else self._stop_tokens,
                stop=stop,
                max_tokens=max_tokens,
                cancelled=cancel or _never,
            )
        return AnswerStream(pieces, request.answer, self._lock)

    def clear_cache(self) -> None:
        """Forgets all pictures and prompts, so that the next request is computed from its beginning."""
        with self._lock:
            self._features.clear()
            if self._decoder is not None:
                self._decoder.forget()

    def prepare(
        self,
        prompt: PromptLike,
        images: Sequence[ImageSource] | ImageSource = (),
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt as the decoder gets it (text, token and image spans), without computing anything."""
        from granite4v.clip_projector import count_tokens, load_image

        with self._lock:
            conversation = normalize(prompt, _as_list(images))
            if conversation.images:
                self._need_vision()
            opened = [load_image(source) for source in conversation.images]
            config = self.files.vision_config

            def count(size: tuple[int, int]) -> int:
                assert config is not None
                return count_tokens(size, config)

            return build_prompt(
                conversation,
                opened,
                self._open_template(),
                self._open_tokenizer(),
                self._placeholder,
                count,
                **(template_variables or {}),
            )

    # --- one request ---

    def _request(
        self,
        prompt: PromptLike,
        images: Sequence[ImageSource] | ImageSource,
        *,
        max_tokens: int,
        lora: bool | None,
        cancel: Cancel | None,
        variables: Mapping[str, Any],
    ) -> _Request:
        if self._closed:
            raise ValueError("the model is closed")
        if max_tokens < 0:
            raise ValueError(f"max_tokens is {max_tokens}; expected 0 or more.")
        prepared = self.prepare(prompt, images, template_variables=variables)
        check_fits(prepared, max_tokens, self.n_ctx)
        adapter = self._adapter_for(prepared, lora)
        return _Request(self, prepared, max_tokens, adapter, cancel)

    def _adapter_for(self, prompt: Prompt, lora: bool | None) -> bool:
        wanted = self._lora if lora is None else lora
        if wanted is None:
            return self.has_lora and bool(prompt.images)
        if wanted and not self.has_lora:
            raise ModelFileError(
                f"'{self.files.text.path}' has no separate LoRA to apply; convert with '--lora separate', or leave "
                "'lora' out (a merged one is always applied)."
            )
        return wanted

    def _limit_context(self, n_ctx: int) -> int:
        if n_ctx < 1:
            raise ValueError(f"n_ctx is {n_ctx}; expected 1 or more.")
        trained = int(self.files.text_value(keys.CONTEXT_LENGTH))
        if n_ctx > trained:
            self.warnings.append(f"the context is {trained:,} tokens, not {n_ctx:,}: the model was trained for no more")
        return min(n_ctx, trained)

    # --- parts, opened when they are needed ---

    def _open_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.files.text, self.files.text.path)
        return self._tokenizer

    def _open_template(self) -> ChatTemplate:
        if self._template is None:
            source = self.files.text_value(keys.CHAT_TEMPLATE)
            self._template = ChatTemplate(source, special_tokens(self.files.text))
        return self._template

    def _need_vision(self) -> None:
        if not self.has_vision:
            raise ModelFileError(
                f"'{self.files.text.path}' has no vision file beside it, so it cannot look at pictures; give one with "
                "'--mmproj', or a model directory that holds both."
            )

    def _open_encoder(self) -> VisionEncoder:
        if self._encoder is None:
            from granite4v.clip_projector import VisionEncoder

            assert self.files.vision is not None
            abort = (self._worker.abort_address, self._worker.abort_data)
            self._encoder = VisionEncoder(self.files.vision.path, self.device, self.n_threads, abort)
        return self._encoder

    def _open_decoder(self) -> Decoder:
        if self._decoder is None:
            self._report("load", 0, 1)
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
            self._report("load", 1, 1)
        return self._decoder

    def _choose_placement(self) -> Placement:
        from granite4v.ggml.backend import Backend

        backend = Backend(self.device, self.n_threads)
        try:
            return choose_placement(self.files.text.tensors, backend)
        finally:
            backend.close()

    def _check_width(self, model: LlamaModel) -> None:
        if self._injection is not None and model.n_embd_inp != model.n_embd * self._injection.n_slots:
            raise ModelFileError(
                f"llama.cpp takes embeddings of width {model.n_embd_inp} for '{model.path}', expected "
                f"{model.n_embd * self._injection.n_slots}; convert it again with 'granite4v convert'."
            )

    # --- pictures ---

    def _encode(self, image: Image, digest: bytes, cancel: Cancel | None) -> ImageFeatures:
        """The picture's features, from the cache or computed now. Raises Aborted when cancelled."""
        if digest in self._features:
            self._features.move_to_end(digest)
            return self._features[digest]
        encoder = self._open_encoder()

        def progress(done: int, total: int) -> None:
            self._report("encode", done, total)

        assert self._injection is not None
        encoded = self._worker.run(lambda: encoder.encode([image], progress), cancel)[0]
        features = dataclasses.replace(encoded, layers=list(self._injection.layers))
        self._features[digest] = features
        return features

    def _release_encoder(self) -> None:
        """Before text is decoded on the CPU: the encoder's intermediate results share its memory (0.25 GB a page)."""
        if self._encoder is not None and self._encoder.backend.is_cpu:
            self._encoder.release()

    def _trim_features(self) -> None:
        while len(self._features) > 1 and sum(f.rows.nbytes for f in self._features.values()) > FEATURE_CACHE_BYTES:
            self._features.popitem(last=False)

    def _report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def close(self) -> None:
        """Frees everything; a second call does nothing."""
        with self._lock:
            self._closed = True
            if self._decoder is not None:
                self._decoder.close()
                self._decoder.model.close()
            if self._encoder is not None:
                self._encoder.close()
            if self._tokenizer is not None:
                self._tokenizer.close()
            self._features.clear()
            self._worker.close()
            self.files.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AnswerStream:
    """An iterator over the pieces of an answer. Closing it early, or dropping it, ends the answer."""

    def __init__(self, pieces: Iterator[str], answer: Answer, lock: threading.RLock) -> None:
        self.answer = answer
        self._pieces, self._lock = pieces, lock

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        with self._lock:
            return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()  # type: ignore[attr-defined]  # it is a generator


class _Request:
    """The source of logits for one prompt. Goes on even if another request used the cache in between."""

    def __init__(self, model: Model, prompt: Prompt, max_tokens: int, adapter: bool, cancel: Cancel | None) -> None:
        self._model, self._prompt, self._adapter, self._cancel = model, prompt, adapter, cancel
        self._max_tokens = max_tokens
        self._epoch = -1
        self.answer = Answer(warnings=list(model.warnings))
        self.answer.timings.n_prompt = prompt.n_tokens
        self.answer.timings.n_image = prompt.n_image_tokens

    def first(self) -> np.ndarray:
        return self._prefill(self._prompt.spans, self._max_tokens)

    def next(self, tokens: Sequence[int]) -> np.ndarray:
        decoder = self._model._decoder
        if decoder is not None and not self._model._closed and decoder.epoch == self._epoch:
            return decoder.step(tokens[-1], self._cancel)
        return self._prefill((*self._prompt.spans, TextSpan(tuple(tokens))), self._max_tokens - len(tokens))

    def _prefill(self, spans: Sequence[Span], room_for: int) -> np.ndarray:
        model, timings = self._model, self.answer.timings
        if model._closed:
            raise ValueError("the model is closed")
        if model._decoder is None:
            # before the text weights are in memory, so that the two peaks do not add up
            for span in spans:
                if isinstance(span, ImageSpan):
                    self._encode(span)
        start = time.perf_counter()
        decoder = model._open_decoder()
        timings.load_s += time.perf_counter() - start
        model._release_encoder()
        stats = PrefillStats()
        try:
            logits = decoder.prefill(
                spans,
                self._rows,
                adapter=self._adapter,
                room_for=room_for,
                cancel=self._cancel,
                stats=stats,
                progress=lambda done, total: model._report("prefill", done, total),
            )
        finally:
            timings.prefill_image_s += stats.image_s
            timings.prefill_text_s += stats.text_s
            timings.n_reused += stats.reused
            model._trim_features()
        self._epoch = decoder.epoch
        return logits

    def _rows(self, span: ImageSpan) -> Rows:
        assert self._model._injection is not None
        features = self._encode(span)
        self._model._release_encoder()
        return EmbeddingRows(features, self._model._injection)

    def _encode(self, span: ImageSpan) -> ImageFeatures:
        if self._cancel is not None and self._cancel():
            raise Aborted
        timings, start = self.answer.timings, time.perf_counter()
        self._model._open_encoder()
        opened = time.perf_counter()
        features = self._model._encode(self._prompt.images[span.index], span.digest, self._cancel)
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


def _as_list(images: Any) -> list[Any]:
    """A single picture may be given without a list around it."""
    if isinstance(images, list | tuple):
        return list(images)
    return [images]


def _never() -> bool:
    return False
