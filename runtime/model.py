"""A loaded model: pictures and messages in, logits and answers out. The public face of the runtime."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from granite4v import gguf_keys as keys
from granite4v.choices import whole_number
from granite4v.errors import DeviceError, ModelFileError, PromptError
from granite4v.runtime.engine.engine import Engine, Progress
from granite4v.runtime.engine.generate import Answer, generate
from granite4v.runtime.engine.repetition import Repetition
from granite4v.runtime.engine.request import Request
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.formats.tasks import task_or_question
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.grammar_state import Compiler, GrammarState
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.library import Cancel
from granite4v.runtime.prompt.messages import Prompt as PromptLike
from granite4v.runtime.prompt.messages import normalize
from granite4v.runtime.prompt.spans import Prompt, build_prompt, check_fits

if TYPE_CHECKING:
    import numpy as np

    from granite4v.choices import Device
    from granite4v.clip_projector import ImageFeatures, ImageSource


class Model:
    """Use `granite4v.load` or `Model.load` to get one. Calls from several threads take turns."""

    def __init__(self, engine: Engine, lora: bool | None = None) -> None:
        """`lora`: when a separate adapter is applied; None for requests with pictures."""
        self.engine = engine
        self._lora = lora
        self._lock = _Turns()
        self._compiler: Compiler | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        device: Device = "auto",
        mmproj: str | Path | None = None,
        lora: bool | str | Path | None = None,
        exact: bool | None = None,
    ) -> Model:
        """The model in a directory made by `granite4v convert`, or of a text GGUF (with `mmproj`, its vision file).

        `n_ctx`: tokens a request and its answer may have together; 8192 by default, less if the model has less.
        `n_threads`: one for each core by default.
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
            return cls(Engine(files, n_ctx=n_ctx, n_threads=n_threads, device=device, exact=exact), policy)
        except BaseException:
            files.close()
            raise

    # --- what it can do ---

    @property
    def files(self) -> ModelFiles:
        return self.engine.files

    @property
    def n_ctx(self) -> int:
        """Tokens that a request and its answer may have together."""
        return self.engine.n_ctx

    @property
    def n_threads(self) -> int:
        """Threads it computes with on the CPU. Another number sums in another order, so answers may differ."""
        return self.engine.n_threads

    @property
    def warnings(self) -> list[str]:
        """What is not as one would expect of this model's files."""
        return self.engine.warnings

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen for this machine, as plain data."""
        return self.engine.settings

    @property
    def progress(self) -> Progress | None:
        """Called with (stage, done, to do) while something takes long: 'load', 'encode' or 'prefill'."""
        return self.engine.progress

    @progress.setter
    def progress(self, progress: Progress | None) -> None:
        self.engine.progress = progress

    @property
    def closed(self) -> bool:
        """Whether it was closed and can answer nothing any more."""
        return self.engine.closed

    @property
    def has_vision(self) -> bool:
        return self.files.vision is not None

    @property
    def has_lora(self) -> bool:
        """Whether there is a separate adapter to switch on and off."""
        return self.files.adapter is not None

    def encode_image(self, source: ImageSource) -> ImageFeatures:
        """The picture's embeddings: `streams` float32 (n_streams, n_tokens, n_embd), and `layers`, sorted, the
        decoder layer before which each stream is added. Raises ImageError, ModelFileError."""
        from granite4v.clip_projector import load_image

        with self._lock:
            self.engine.check_open()
            self.engine.need_vision()
            return self.engine.encode(load_image(source))

    def logits(
        self, prompt: PromptLike | Prompt, images: Sequence[ImageSource] | ImageSource = (), *, lora: bool | None = None
    ) -> np.ndarray:
        """Logits of the token after the chat prompt, float32 `(n_vocab,)`."""
        with self._lock:
            request = self._request(prompt, images, max_tokens=0, lora=lora, cancel=None, variables={})
            return request.first()

    def score(
        self,
        prompt: PromptLike | Prompt,
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
        prompt: PromptLike | Prompt,
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
        constraint: Grammar | None = None,
        fast_forward: bool = True,
        repetition: bool | str = True,
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
                constraint=constraint,
                fast_forward=fast_forward,
                repetition=repetition,
                lora=lora,
                cancel=cancel,
                template_variables=template_variables,
            )
            for _ in stream:
                pass
            return stream.answer

    def stream(
        self,
        prompt: PromptLike | Prompt,
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
        constraint: Grammar | None = None,
        fast_forward: bool = True,
        repetition: bool | str = True,
        lora: bool | None = None,
        cancel: Cancel | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> AnswerStream:
        """Pieces of the answer as they come; `answer` of what is returned has the rest once they are all out.

        `prompt`: text (one user turn: the images first, then the text), or messages in the content-part form of
        OpenAI's and Hugging Face's APIs, or what `prepare` returned; image parts without an image of their own take
        `images` in order. `max_tokens`: the most the answer may have. Temperature 0 is greedy. `stop`: texts that end
        the answer and are not part of it. `ignore_eos`: go on to `max_tokens` whatever the model says (for measuring).
        `lora`: whether a separate adapter is applied; None follows the model's policy. `cancel`: asked often, from the
        calling thread, whether to stop. `template_variables`: for the chat template.

        `constraint`: what `grammar_for` gives; the answer keeps to it, and ends by itself only where it is whole.
        `fast_forward`: text that leaves no choice is not sampled but decoded in one go, as the tokenizer writes it.
        `repetition`: whether an answer that runs on with the same rows is ended; the name of a task says what its
        rows are, where no constraint does.

        The request is checked before anything is computed: raises PromptError, ContextOverflowError, ImageError,
        ConstraintError.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed=seed)
        max_tokens = whole_number("max_tokens", max_tokens, 0)
        if constraint is not None and not isinstance(constraint, Grammar):
            raise TypeError(f"the constraint is {constraint!r:.60}; expected what granite4v.grammar_for returns.")
        if isinstance(stop, str):
            stop = (stop,)
        with self._lock:
            request = self._request(
                prompt, images, max_tokens=max_tokens, lora=lora, cancel=cancel, variables=template_variables or {}
            )
            task = repetition if isinstance(repetition, str) else constraint.task if constraint else ""
            pieces = generate(
                request,
                request.answer,
                self.engine.tokenizer().text_stream(),
                sampling=sampling,
                stop_tokens=frozenset() if ignore_eos else self.engine.stop_tokens,
                stop=stop,
                max_tokens=max_tokens,
                cancelled=cancel or _never,
                grammar=self._grammar_state(constraint),
                fast_forward=fast_forward,
                repetition=Repetition(task_or_question(task).rows) if repetition and not ignore_eos else None,
            )
        return AnswerStream(pieces, request.answer, self._lock)

    def _grammar_state(self, grammar: Grammar | None) -> GrammarState | None:
        if grammar is None:
            return None
        if self._compiler is None:
            n_vocab = self.files.text.n_texts(keys.TOKENS)
            self._compiler = Compiler(self.engine.tokenizer(), n_vocab, self.engine.stop_tokens)
        return self._compiler.begin(grammar)

    def clear_cache(self) -> None:
        """Forgets all pictures and prompts, so that the next request is computed from its beginning."""
        with self._lock:
            self.engine.clear()

    def forget_pictures(self) -> None:
        """Lets go of the embeddings of all pictures. What was decoded last is kept, and a request that begins alike
        still goes on from there."""
        with self._lock:
            self.engine.features.clear()

    def prepare(
        self,
        prompt: PromptLike | Prompt,
        images: Sequence[ImageSource] | ImageSource = (),
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt as the decoder gets it (text, token and image spans), without computing anything.

        All that takes a prompt takes what this returns, which then need not be rendered, split into tokens and
        opened again.
        """
        from granite4v.clip_projector import count_tokens, load_image

        if isinstance(prompt, Prompt):
            if _as_list(images) or template_variables:
                raise PromptError("a prepared prompt holds its images and variables; leave them out.")
            return prompt
        with self._lock:
            conversation = normalize(prompt, _as_list(images), self.engine.placeholder_text)
            _check_unicode(conversation.messages)
            if conversation.images:
                self.engine.need_vision()
            opened = [load_image(source) for source in conversation.images]
            config = self.files.vision_config

            def count(size: tuple[int, int]) -> int:
                assert config is not None
                return count_tokens(size, config)

            return build_prompt(
                conversation,
                opened,
                self.engine.template(),
                self.engine.tokenizer(),
                self.engine.placeholder,
                count,
                self.engine.check_length,
                **(template_variables or {}),
            )

    # --- one request ---

    def _request(
        self,
        prompt: PromptLike | Prompt,
        images: Sequence[ImageSource] | ImageSource,
        *,
        max_tokens: int,
        lora: bool | None,
        cancel: Cancel | None,
        variables: Mapping[str, Any],
    ) -> Request:
        self.engine.check_open()
        prepared = self.prepare(prompt, images, template_variables=variables)
        check_fits(prepared, max_tokens, self.n_ctx)
        adapter = self._adapter_for(prepared, lora)
        return Request(self.engine, prepared, max_tokens, adapter, cancel)

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

    def close(self) -> None:
        """Frees everything; a second call does nothing, nor does one in a forked process."""
        if self._lock.is_ours:
            with self._lock:
                self.engine.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses copy, deepcopy and pickle: a copy would free the same native memory."""
        raise TypeError(
            "a Model cannot be copied or pickled: it owns native memory and a thread. Share it between threads, which "
            "take turns, or load it again from its path in each process."
        )

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Turns:
    """A lock that callers of one model take turns by, and that only the process which loaded it may take."""

    def __init__(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()

    @property
    def is_ours(self) -> bool:
        return os.getpid() == self._pid

    def __enter__(self) -> None:
        if not self.is_ours:  # the lock may have been held at the fork, and the thread that computes is not here
            raise DeviceError(
                f"this model was loaded by process {self._pid} and cannot be used in process {os.getpid()}, which was "
                "forked from it: its threads stayed behind. Load the model after the fork, or start processes with "
                "multiprocessing.get_context('spawn')."
            )
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


class AnswerStream:
    """An iterator over the pieces of an answer. Closing it early, or dropping it, ends the answer."""

    def __init__(self, pieces: Iterator[str], answer: Answer, lock: _Turns) -> None:
        self.answer = answer
        self._pieces, self._lock = pieces, lock

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        with self._lock:
            return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()  # type: ignore[attr-defined]  # it is a generator


def _as_list(images: Any) -> list[Any]:
    """A single picture may be given without a list around it."""
    if isinstance(images, list | tuple):
        return list(images)
    return [images]


def _check_unicode(messages: Any) -> None:
    """Tokenizers take UTF-8: raises PromptError for the lone surrogates that Python reads other bytes as."""
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt holds {error.object[error.start]!r}, which is not Unicode text: bytes that are not UTF-8 are "
            "read as that. Convert the prompt to UTF-8."
        ) from None


def _never() -> bool:
    return False
