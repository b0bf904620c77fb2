"""Runs requests on the model: queues them, opens their attachments, builds their prompts and submits them.

A server has one Dispatcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.clip_projector import Image, Video
from granite4v.runtime.model import Model
from granite4v.runtime.options import GenerationOptions
from granite4v.runtime.prompt.spans import Prompt, TextSpan
from granite4v.runtime.server import errors
from granite4v.runtime.server.content import Attachment, Turn
from granite4v.runtime.server.errors import RETRY, ApiError, invalid
from granite4v.runtime.server.generation import Generation, News
from granite4v.runtime.server.media import MediaOpener
from granite4v.runtime.server.metrics import Metrics
from granite4v.runtime.server.options import ServerOptions
from granite4v.runtime.server.structure import Form

# Limit of an answer in tokens if the client sets none and the context has room: the family's own maximum
MAX_ANSWER = 4096
_AHEAD = 1  # requests that are prepared in advance while all sequences are in use
_N_PREPARING = 2  # threads that build prompts and grammars
_LONGEST_RETRY_S = 30.0  # openai's clients wait as long as Retry-After says


@dataclass(frozen=True)
class Ask:
    """A parsed request: messages, or raw text or tokens (`plain`); and how the answers are generated.

    `fields`: fields of `GenerationOptions`, except those that are attributes here. `n`: number of answers. `n_top`:
    how many alternatives of each token are returned with their log-probabilities; None returns no log-probabilities.
    `confidence`: whether the confidence of cells and fields is returned.
    """

    turns: Sequence[Turn] = ()
    plain: str | Sequence[int] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    form: Form = field(default_factory=Form)
    fields: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    seed: int | None = None
    n: int = 1
    n_top: int | None = None
    confidence: bool = False

    @property
    def logprobs(self) -> int | None:
        """The `logprobs` of `GenerationOptions`; confidences need log-probabilities even if none are returned."""
        return 0 if self.n_top is None and self.confidence else self.n_top

    @property
    def attachments(self) -> list[Attachment]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Attachment)]


class Dispatcher:
    """Runs requests in order of arrival: as many at once as the model has sequences, and prepares one more ahead."""

    def __init__(self, options: ServerOptions, metrics: Metrics) -> None:
        self.options, self.metrics = options, metrics
        self.ended = asyncio.Event()  # set when all requests in flight are cancelled
        self.is_ending = False  # True once new requests are refused
        self._model: Model | None = None
        self._media: MediaOpener | None = None
        self._pool = ThreadPoolExecutor(_N_PREPARING, thread_name_prefix="granite4v-prompts")
        self._turn = asyncio.Semaphore(1)
        self._n_in_flight = 0
        self._request_s = 1.0  # moving average of the duration of a request

    # --- the model ---

    def attach(self, model: Model) -> None:
        """Sets the loaded model; requests are accepted from now on."""
        view = model.files.vision_config if model.has_vision else None
        self._media = MediaOpener(self.options.limits, None if view is None else view.tiling)
        self._turn = asyncio.Semaphore(model.n_parallel + _AHEAD)
        self.metrics.watch(model, lambda: self._n_in_flight)
        self._model = model

    @property
    def model(self) -> Model:
        """The model. Raises ApiError while it is loading, and while the server is shutting down."""
        if self.is_ending:
            raise errors.shutting_down()
        if self._model is None:
            raise errors.loading()
        return self._model

    def close(self) -> None:
        self.is_ending = True
        self.ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._media is not None:
            self._media.close()

    # --- requests ---

    def take(self) -> Callable[[], None]:
        """Admits a request, and returns a function that must be called when it is finished.

        Raises ApiError if too many requests are waiting already, or if the model is not available.
        """
        model, n_waiting = self.model, self.options.limits.n_waiting
        if self._n_in_flight >= model.n_parallel + n_waiting:
            rounds = self._n_in_flight / model.n_parallel
            retry_s = min(_LONGEST_RETRY_S, max(1.0, rounds * self._request_s))
            raise ApiError(
                429,
                f"{self._n_in_flight} requests are in flight already, as many as this server takes; ask again later.",
                code="queue_full",
                headers={"retry-after": f"{retry_s:.0f}", **RETRY},
            )
        began = time.monotonic()
        self._n_in_flight += 1

        def leave() -> None:
            self._n_in_flight -= 1
            self._request_s += (time.monotonic() - began - self._request_s) / 8

        return leave

    @contextlib.asynccontextmanager
    async def answering(self, ask: Ask) -> AsyncIterator[Generation]:
        """Waits for a turn and starts the answers to a request; leaving the context cancels them.

        Raises ApiError, and the errors of `Model.submit`.
        """
        began = time.monotonic()
        async with self._turn:
            generation = await self._begin(ask)
            try:
                yield generation
            finally:
                generation.cancel()
                self.metrics.note_answers(generation, began)

    async def count(self, ask: Ask) -> Prompt:
        """Builds the prompt of a request without running the model. Raises the same errors as `answering`."""
        async with self._turn:
            images = await self._images(ask)
            return await self.in_thread(_prompt, self.model, ask, images)

    async def _begin(self, ask: Ask) -> Generation:
        images = await self._images(ask)
        news = News()
        return await self.in_thread(_submitted, self.model, ask, images, news)

    async def _images(self, ask: Ask) -> Sequence[Sequence[Image | Video]]:
        model, attachments, limits = self.model, ask.attachments, self.options.limits
        if not attachments:
            return []
        if not model.has_vision:
            raise invalid(
                "this model has no vision file, so it takes no images and documents.", attachments[0].param, "no_vision"
            )
        config, video = model.files.vision_config, next((one for one in attachments if one.video is not None), None)
        if video is not None and config is not None and not config.takes_video:
            raise invalid("this model takes no videos, only images and documents.", video.param, "no_video")
        if len(attachments) > limits.n_images:
            raise invalid(
                f"the request has {len(attachments)} images, documents and videos, but the server takes "
                f"{limits.n_images}; send fewer.",
                attachments[limits.n_images].param,
                "too_many_images",
            )
        assert self._media is not None
        return await self._media.open(attachments)

    async def in_thread(self, function: Any, *arguments: Any) -> Any:
        """Calls a function in a thread and returns its result.

        If this coroutine is cancelled, the call goes on, and a Generation that it returns is cancelled.
        """
        future = asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_give_up)
            raise


def _give_up(future: Future[Any] | asyncio.Future[Any]) -> None:
    if not future.cancelled() and future.exception() is None and isinstance(future.result(), Generation):
        future.result().cancel()


def _prompt(model: Model, ask: Ask, images: Sequence[Sequence[Image | Video]]) -> Prompt:
    if isinstance(ask.plain, str):
        prompt = model.prompts.plain(ask.plain)
    elif ask.plain is not None:
        prompt = _of_tokens(model, ask.plain)
    else:
        opened = iter(images)
        messages = [
            {
                "role": turn.role,
                **turn.others,
                "content": [inner for part in turn.parts for inner in _content(part, opened)],
            }
            for turn in ask.turns
        ]
        prompt = model.prepare(messages, template_variables=ask.variables)
    if not prompt.n_tokens:
        raise invalid("the prompt is empty; write something.", "prompt", "empty_prompt")
    return prompt


def _content(part: str | Attachment, opened: Iterator[Sequence[Image | Video]]) -> list[dict[str, Any]]:
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    return [
        {"type": "video", "video": item} if isinstance(item, Video) else {"type": "image", "image": item}
        for item in next(opened)
    ]


def _of_tokens(model: Model, tokens: Sequence[int]) -> Prompt:
    n_vocab = model.files.text.n_texts(keys.TOKENS)
    wrong = next((token for token in tokens if not 0 <= token < n_vocab), None)
    if wrong is not None:
        raise invalid(f"{wrong} is not a token of the model, which has {n_vocab:,}.", "prompt", "invalid_token")
    return Prompt("", (TextSpan(tuple(tokens)),), ())


def _submitted(model: Model, ask: Ask, images: Sequence[Sequence[Image | Video]], news: News) -> Generation:
    if ask.fields.get("lora") and not model.has_lora:
        raise invalid("this model has no separate adapter to apply; leave 'lora' out.", "lora", "no_adapter")
    prompt = _prompt(model, ask, images)
    n_room = model.n_ctx - prompt.n_tokens
    if n_room < 1:
        raise invalid(
            f"the prompt has {prompt.n_tokens:,} tokens ({prompt.n_image_tokens:,} of images), but the context is "
            f"{model.n_ctx:,}, answer included; send less, or start the server with a larger --ctx-size.",
            code="context_length_exceeded",
        )
    max_tokens = min(MAX_ANSWER if ask.max_tokens is None else ask.max_tokens, n_room)
    grammar, check = ask.form.compiled()
    streams = []
    try:
        for i in range(ask.n):
            options = GenerationOptions(
                max_tokens=max_tokens,
                constraint=grammar,
                repetition=ask.form.task or True,
                logprobs=ask.logprobs,
                seed=None if ask.seed is None else (ask.seed + i) % (1 << 63),
                **ask.fields,
            )
            streams.append(model.submit(prompt, options, listener=news))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return Generation(prompt, streams, news, check)
