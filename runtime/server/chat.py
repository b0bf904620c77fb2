"""POST /v1/chat/completions: OpenAI's chat completions, whole and as a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from granite4v.runtime.answer import Answer
from granite4v.runtime.server.accounts import finish_reason, stopped_by, timings, usage
from granite4v.runtime.server.content import ContentReader
from granite4v.runtime.server.dispatcher import Ask, Dispatcher
from granite4v.runtime.server.logprobs import Spell, chat_logprobs, confidences
from granite4v.runtime.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChunkChoice,
    Reply,
    Timings,
)
from granite4v.runtime.server.requests import ChatRequest
from granite4v.runtime.server.sampling import check_completion_fields, options_of, refuse, wants_confidence
from granite4v.runtime.server.structure import form_of, with_prompt

DONE = b"data: [DONE]\n\n"


def asked(body: ChatRequest, reader: ContentReader, n_most: int) -> Ask:
    """What a request asks for. `n_most`: answers to one request. Raises ApiError."""
    check_completion_fields(body, n_most)
    refuse(body, "tools", "functions")
    turns = reader.turns(body.messages)
    form = form_of(body.response_format, body.format, turns, unconstrained=bool(body.unconstrained))
    limits = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None]
    return Ask(
        turns=with_prompt(turns, form),
        variables=body.chat_template_kwargs or {},
        form=form,
        fields=options_of(body, body.stop),
        max_tokens=min(limits, default=None),
        seed=None if body.seed is None else body.seed % (1 << 63),
        n=body.n or 1,
        n_top=(body.top_logprobs or 0) if body.logprobs else None,
        confidence=wants_confidence(body, form),
    )


class ChatWriter:
    """Writes the answers to one request."""

    def __init__(self, model: str, fingerprint: str, *, include_usage: bool = False) -> None:
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._model, self._fingerprint, self._include_usage = model, fingerprint, include_usage

    async def whole(self, dispatcher: Dispatcher, ask: Ask) -> AsyncGenerator[bytes, None]:
        spell = dispatcher.model.token_bytes
        async with dispatcher.answering(ask) as generation:
            await generation.complete()
            yield (
                ChatCompletion(
                    id=self._id,
                    created=self._created,
                    model=self._model,
                    choices=[self._choice(i, answer, ask, spell) for i, answer in enumerate(generation.answers)],
                    usage=usage(generation),
                    timings=timings(generation.answers),
                    system_fingerprint=self._fingerprint,
                )
                .model_dump_json()
                .encode()
            )

    def _choice(self, index: int, answer: Answer, ask: Ask, spell: Spell) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(content=answer.text),
            logprobs=None if ask.n_top is None else chat_logprobs(answer.logprobs or [], spell),
            finish_reason=finish_reason(answer),
            stopped_by=stopped_by(answer),
            confidence=confidences(answer, ask.form.task) if ask.confidence else None,
        )

    async def events(self, dispatcher: Dispatcher, ask: Ask) -> AsyncGenerator[bytes, None]:
        spell = dispatcher.model.token_bytes
        async with dispatcher.answering(ask) as generation:
            for i in range(ask.n):
                yield self._chunk(ChunkChoice(index=i, delta=ChatDelta(role="assistant", content="")))
            n_left = ask.n
            async for piece in generation.pieces():
                if piece.text or (piece.logprobs and ask.n_top is not None):
                    shown = None if ask.n_top is None else chat_logprobs(piece.logprobs, spell)
                    delta = ChatDelta(content=piece.text)
                    yield self._chunk(ChunkChoice(index=piece.index, delta=delta, logprobs=shown))
                if piece.is_last:
                    n_left -= 1
                    took = None if n_left else timings(generation.answers)
                    yield self._chunk(self._end(piece.index, generation.answers[piece.index], ask), took)
            if self._include_usage:  # OpenAI's clients expect no choice beside it
                yield event(ChatChunk(**self._head(), choices=[], usage=usage(generation)))
            yield DONE

    def _end(self, index: int, answer: Answer, ask: Ask) -> ChunkChoice:
        return ChunkChoice(
            index=index,
            delta=ChatDelta(),
            finish_reason=finish_reason(answer),
            stopped_by=stopped_by(answer),
            confidence=confidences(answer, ask.form.task) if ask.confidence else None,
        )

    def _chunk(self, choice: ChunkChoice, took: Timings | None = None) -> bytes:
        return event(ChatChunk(**self._head(), choices=[choice], timings=took))

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }


def event(reply: Reply) -> bytes:
    """A server-sent event."""
    data = reply.model_dump(exclude_none=True)
    for choice in data.get("choices", ()):
        choice.setdefault("finish_reason", None)  # many clients look at it in every chunk
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
