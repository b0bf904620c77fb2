"""A loaded model: images and messages in, logits and answers out. The public API of the runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import numpy as np

from granite4v import clip_projector
from granite4v import gguf_keys as keys
from granite4v.choices import CacheType, Device, VisionCompute, whole_number
from granite4v.errors import ArgumentError, ModelFileError, PromptError
from granite4v.runtime import formats, grammar
from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.draft import Drafter, DraftSource
from granite4v.runtime.engine.engine import Engine
from granite4v.runtime.engine.logprobs import Logprobs
from granite4v.runtime.engine.page_store import PageStore
from granite4v.runtime.engine.parallel import Workload
from granite4v.runtime.engine.scheduler import Counters
from granite4v.runtime.engine.sequence import Advances, Scoring
from granite4v.runtime.engine.sequence import Sequence as AnswerSequence
from granite4v.runtime.engine.stream import Cancel, Progress, Stream
from granite4v.runtime.engine.trial import try_once
from granite4v.runtime.formats.repetition import Repetition
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.options import GenerationOptions
from granite4v.runtime.prompt.builder import PromptBuilder
from granite4v.runtime.prompt.messages import Prompt as PromptLike
from granite4v.runtime.prompt.spans import Prompt, check_fits

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from granite4v.clip_projector import ImageFeatures, ImageSource
    from granite4v.clip_projector.cross_features import CrossFeatures
    from granite4v.runtime.grammar import Compiler, Grammar, GrammarState
    from granite4v.runtime.options import GenerationFields

    Images: TypeAlias = Sequence[ImageSource] | ImageSource | None


class Model:
    """A loaded model, made by `granite4v.load` or `Model.load`.

    Any number of threads may submit requests at the same time. Up to `n_parallel` requests run concurrently; the others
    are queued.
    """

    def __init__(self, engine: Engine, lora: bool | None = None) -> None:
        """`lora`: True always applies a separate adapter, False never; None applies it to requests with images."""
        self.engine = engine
        self._lora = lora
        self.prompts = PromptBuilder(engine.files, engine.n_ctx, self._check)
        self.warnings = [*engine.warnings, *_warnings(engine.files)]
        self._compiling = threading.Lock()
        self._compiler: Compiler | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_parallel: int | None = None,
        device: Device = "auto",
        mmproj: str | Path | None = None,
        lora: bool | str | Path | None = None,
        exact: bool | None = None,
        vision_compute: VisionCompute = "file",
        workload: Workload | None = None,
        page_store: PageStore | bool | None = None,
        cache_type: CacheType | None = None,
    ) -> Model:
        """Loads the model in a directory made by `granite4v convert`, or a text GGUF (with `mmproj`, its vision file).

        `n_ctx`: context size in tokens, prompt and answer together; 8192 by default, or the model's training context if
        that is smaller. `n_threads`: one per core by default. `n_parallel`: maximum number of concurrent requests, 4 by
        default; each takes KV cache memory for its own tokens while it runs. `device`: 'cpu', 'cuda', 'metal' or 'auto'
        (a GPU if there is one). `lora`: when a separate LoRA is applied: None for requests with images only, True
        always, False never; a path names another adapter file. `exact`: float32 KV cache, no flash attention, one
        request at a time, and on a CPU, with the extra 'llvm', transformers' angles of rotary embedding, for comparing
        values with a reference; None means only for float32 files without a `cache_type`. `vision_compute`: 'file'
        multiplies the vision file's matrices in their own type; 'BF16' rounds those in F32 or F16, and their
        activations, to bfloat16; 'int8' quantizes those in F32, F16 or BF16 in memory, at the first image, to Q8_0 or
        Q6_K, whichever is faster on this CPU; 'Q8_0' and 'Q6_K' quantize to that type. `workload`, a
        `runtime.engine.parallel.Workload`: many questions asked concurrently. `n_parallel` is then chosen by their
        number, the available memory and the speed-up, which for a long batch is measured once per machine, in some
        seconds; all sequences exist from the start. On a CPU, with files of F32, F16, BF16 and Q8_0, an answer then has
        the same bits whatever is computed next to it, as long as `n_parallel` is more than 1. `page_store`: where the
        decoder's state after a prompt's images is kept on disk, so that a page is encoded and prefilled only once, in
        this process and in others; True for the user's own (`PageStore()`). `cache_type`: of the KV cache; 'q8_0' takes
        about half the memory and disk space of 'f16', the default, and changes answers a little.

        Raises ModelFileError for files that are damaged or do not belong together, DeviceError for a missing device,
        ArgumentError for a `cache_type` with `exact`.
        """
        adapter = lora if isinstance(lora, str | Path) else None
        files = ModelFiles.open(path, mmproj=mmproj, adapter=adapter)
        policy = lora if isinstance(lora, bool) else None
        try:
            engine = Engine(
                files,
                n_ctx=n_ctx,
                n_threads=n_threads,
                n_parallel=n_parallel,
                device=device,
                exact=_is_exact(files, exact, cache_type),
                vision_compute=vision_compute,
                workload=workload,
                page_store=PageStore() if page_store is True else page_store or None,
                cache_type=cache_type or "f16",
            )
            return cls(engine, policy)
        except BaseException:
            files.close()
            raise

    # --- properties ---

    @property
    def files(self) -> ModelFiles:
        return self.engine.files

    @property
    def n_ctx(self) -> int:
        """Context size in tokens: prompt and answer together."""
        return self.engine.n_ctx

    @property
    def n_threads(self) -> int:
        """Number of CPU threads. It changes the order of summation, so answers may differ slightly."""
        return self.engine.n_threads

    @property
    def n_parallel(self) -> int:
        """Maximum number of concurrent requests."""
        return self.engine.n_parallel

    @property
    def parallel_note(self) -> str | None:
        """Why `n_parallel` has its value, in a few words; None where it was not chosen automatically."""
        return None if self.engine.width is None else self.engine.width.reason

    @property
    def settings(self) -> dict[str, Any]:
        """The settings chosen for this machine, as plain data."""
        return self.engine.settings

    @property
    def vision_note(self) -> str | None:
        """A sentence on how the vision file's weights are rounded or quantized in memory; None where they are not."""
        kind = self.settings["vision_compute"]
        if kind == "file":
            return None
        how = "multiplied in bfloat16" if kind == "BF16" else f"quantized to {kind} in memory"
        return f"the vision file's matrices are {how}, which changes image features a little"

    @property
    def counters(self) -> Counters:
        """What was computed since the model was loaded."""
        return self.engine.counters

    @property
    def closed(self) -> bool:
        """Whether the model is closed and can no longer be used."""
        return self.engine.is_closed

    @property
    def has_vision(self) -> bool:
        return self.files.vision is not None

    @property
    def has_lora(self) -> bool:
        """Whether there is a separate adapter to switch on and off."""
        return self.files.adapter is not None

    # --- requests ---

    def encode_image(self, source: ImageSource, *, progress: Progress | None = None) -> ImageFeatures | CrossFeatures:
        """Encodes an image. The result has `streams`, float32 (n_streams, n_tokens, n_embd), and `layers`, sorted, the
        decoder layer before which each stream is added; for a decoder with cross-attention, the `states` that it
        attends to. `progress` is called with ('encode', done, total). Raises ImageError, ModelFileError."""
        self.engine.check_usable()
        self.files.need_vision()
        return self.engine.encode(clip_projector.load_image(source), progress)

    def logits(self, prompt: PromptLike | Prompt, images: Images = (), *, lora: bool | None = None) -> np.ndarray:
        """Logits of the token after the chat prompt, float32 `(n_vocab,)`."""
        return self._score(prompt, images, (), lora)[0]

    def score(
        self,
        prompt: PromptLike | Prompt,
        images: Images = (),
        *,
        tokens: Sequence[int],
        lora: bool | None = None,
    ) -> np.ndarray:
        """Logits before each of `tokens`, which are forced as the answer: float32 `(len(tokens), n_vocab)`.

        Raises ArgumentError or TypeError for anything that is not a token of the model.
        """
        n_vocab = self.files.text.n_texts(keys.TOKENS)
        tokens = [whole_number("a token", token, 0) for token in tokens]
        if max(tokens, default=0) >= n_vocab:  # checked here: inside a batch it would fail every request of the batch
            raise ArgumentError(f"token {max(tokens)} is not in the vocabulary; expected 0 to {n_vocab - 1}.")
        return np.stack(self._score(prompt, images, tokens, lora))

    def _score(
        self, prompt: PromptLike | Prompt, images: Any, tokens: Sequence[int], lora: bool | None
    ) -> list[np.ndarray]:
        scoring = Scoring(tokens)
        prepared = self.prepare(prompt, images)
        self._submit(prepared, scoring, Answer(), max_tokens=len(tokens), lora=lora).result()
        return scoring.rows

    def generate(
        self,
        prompt: PromptLike | Prompt,
        images: Images = (),
        *,
        options: GenerationOptions | None = None,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Answer:
        """Generates the complete answer. Arguments as for `stream`."""
        stream = self.stream(
            prompt,
            images,
            options=options,
            cancel=cancel,
            progress=progress,
            template_variables=template_variables,
            **fields,
        )
        return stream.result()

    def stream(
        self,
        prompt: PromptLike | Prompt,
        images: Images = (),
        *,
        options: GenerationOptions | None = None,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Stream:
        """Starts an answer. Iterating over the stream yields its text; `stream.answer` has the rest.

        `prompt`: text (one user turn: the images first, then the text), or messages in the content-part form of
        OpenAI's and Hugging Face's APIs; image parts that contain no image take `images` in order. `options`: see
        `GenerationOptions`; its fields may also be given as keyword arguments, such as `max_tokens=512`.
        `template_variables`: for the chat template. `cancel` is polled in the reading thread; when it returns true, the
        answer stops. `progress` is called there with (stage, done, total) before the first token; stages are 'check',
        'load', 'encode' and 'prefill'.

        The request is checked before anything is computed: raises PromptError, ContextOverflowError, ImageError,
        ConstraintError; TypeError and ArgumentError for options out of range.
        """
        chosen = GenerationOptions.of(options, fields)
        prepared = self.prepare(prompt, images, progress=progress, template_variables=template_variables)
        return self.submit(prepared, chosen, cancel=cancel, progress=progress)

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        drafts: Sequence[DraftSource] = (),
        listener: Callable[[], None] | None = None,
    ) -> Stream:
        """Starts an answer to a prompt made by `prepare`. `drafts`: texts that the answer may repeat, for
        `options.drafting`. `listener`: called in the engine's thread when there is something to read; it must not block
        or raise (see `Stream.poll`). Raises ContextOverflowError, ConstraintError."""
        options = options or GenerationOptions()
        check_fits(prompt, options.max_tokens, self.n_ctx)
        answer = Answer(warnings=list(self.warnings))
        sequence = AnswerSequence(
            answer,
            self.prompts.tokenizer().text_stream(),
            sampling=options,
            stop_tokens=frozenset() if options.ignore_eos else self.prompts.stop_tokens,
            stop=options.stop,
            max_tokens=options.max_tokens,
            grammar=self._grammar_state(options.constraint),
            fast_forward=options.fast_forward,
            repetition=self._repetition(options),
            drafter=Drafter(prompt.text_tokens, drafts) if options.drafting else None,
            logprobs=None if options.logprobs is None else Logprobs(options.logprobs, self.prompts.token_pieces()),
        )
        return self._submit(
            prompt,
            sequence,
            answer,
            max_tokens=options.max_tokens,
            lora=options.lora,
            cancel=cancel,
            progress=progress,
            listener=listener,
        )

    def prepare(
        self,
        prompt: PromptLike | Prompt,
        images: Images = (),
        *,
        progress: Progress | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Builds the prompt as the decoder gets it (text, token and image spans), without computing anything. All
        methods that take a prompt take this one too. Raises PromptError, ImageError, ContextOverflowError,
        ModelFileError."""
        if isinstance(prompt, Prompt):
            if _as_list(images) or template_variables:
                raise PromptError("a prepared prompt already contains its images and variables; leave them out.")
            return prompt

        def report() -> None:
            if progress is not None:
                progress("check", 0, 1)

        return self.prompts.build(prompt, _as_list(images), template_variables or {}, report)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token writes: UTF-8, possibly part of a character; a special token's name. Raises IndexError
        for an id that is not in the vocabulary."""
        return self.prompts.token_pieces()[whole_number("a token", token, 0)]

    def _submit(
        self,
        prompt: Prompt,
        advances: Advances,
        answer: Answer,
        *,
        max_tokens: int,
        lora: bool | None,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        listener: Callable[[], None] | None = None,
    ) -> Stream:
        check_fits(prompt, max_tokens, self.n_ctx)
        return self.engine.submit(
            prompt,
            advances,
            answer,
            max_tokens=max_tokens,
            adapter=self._adapter_for(prompt, lora),
            cancel=cancel,
            progress=progress,
            listener=listener,
        )

    def _check(self, report: Callable[[], None]) -> None:
        """Tries the files in a child process before native code builds a tokenizer from them unchecked."""
        self.engine.check_usable()
        try_once(self.files, report)

    def _repetition(self, options: GenerationOptions) -> Repetition | None:
        if not options.repetition or options.ignore_eos:
            return None
        task = options.repetition if isinstance(options.repetition, str) else ""
        if not task and options.constraint is not None:
            task = options.constraint.task
        return Repetition(formats.task_or_question(task).rows) if task else Repetition()

    def _grammar_state(self, constraint: Grammar | None) -> GrammarState | None:
        if constraint is None:
            return None
        with self._compiling:
            if self._compiler is None:
                n_vocab = self.files.text.n_texts(keys.TOKENS)
                self._compiler = grammar.Compiler(self.prompts.tokenizer(), n_vocab, self.prompts.stop_tokens)
            return self._compiler.begin(constraint)

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

    # --- closing ---

    def clear_cache(self) -> None:
        """Forgets all images and prompts: the next request is computed anew, or taken from the page store."""
        self.engine.clear()

    def close(self) -> None:
        """Frees everything. A second call does nothing, nor does a call in a forked process. Streams that are not
        complete end with ValueError."""
        if self.engine.close():
            self.prompts.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses copy, deepcopy and pickle: a copy would free the same native memory."""
        raise TypeError(
            "a Model cannot be copied or pickled: it owns native memory and a thread. Share it between threads, or "
            "load it again from its path in each process."
        )

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _is_exact(files: ModelFiles, exact: bool | None, cache_type: CacheType | None) -> bool:
    if exact and cache_type is not None:
        raise ArgumentError(f"cache_type is {cache_type!r}, but exact=True computes with a float32 KV cache.")
    if cache_type not in (None, *get_args(CacheType)):
        raise ArgumentError(f"cache_type is {cache_type!r:.40}; expected one of {get_args(CacheType)}.")
    if exact is None:
        return cache_type is None and all(info.type_name == "F32" for info in files.text.tensors.values())
    return exact


def _warnings(files: ModelFiles) -> list[str]:
    """Warnings about a model's files: ignored files, and a missing tokenizer.json."""
    warnings = [f"a file in the model's directory is ignored: {str(error).rstrip('.')}" for error in files.left_out]
    if keys.TOKENIZER_HF_JSON not in files.text:
        warnings.append(
            f"'{files.text.path}' contains no tokenizer.json; llama.cpp's tokenizer is used, which may split text "
            "(especially long numbers) differently from the model's training tokenizer"
        )
    return warnings


def _as_list(images: Any) -> list[Any]:
    """The images of an argument: a list or tuple, a single image without a list around it, or None for no images."""
    if images is None or isinstance(images, list | tuple):
        return list(images or ())
    return [images]
