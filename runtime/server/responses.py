"""POST /v1/responses: OpenAI's Responses API, without storage on the server."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from granite4v.runtime.server.accounts import ending, timings, usage
from granite4v.runtime.server.content import ContentReader, Turn
from granite4v.runtime.server.dispatcher import Ask, Dispatcher
from granite4v.runtime.server.errors import invalid
from granite4v.runtime.server.generation import Generation
from granite4v.runtime.server.logprobs import Spell, confidences, token_replies
from granite4v.runtime.server.replies import (
    CachedTokens,
    Incomplete,
    OutputMessage,
    OutputText,
    ResponseReply,
    ResponseUsage,
)
from granite4v.runtime.server.requests import ResponseRequest
from granite4v.runtime.server.sampling import check_foreign_fields, options_of, refuse_tools, wants_confidence
from granite4v.runtime.server.structure import form_of, with_prompt

LOGPROBS = "message.output_text.logprobs"  # the entry of `include` that asks for log-probabilities


def asked(body: ResponseRequest, reader: ContentReader) -> Ask:
    """Parses a request. Raises ApiError."""
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(body, name):
            raise invalid(
                f"'{name}' is not supported: the server keeps nothing between requests; send all messages in 'input'.",
                name,
                "unsupported",
            )
    check_foreign_fields(body)
    refuse_tools(body, "tools")
    turns = [] if not body.instructions else [Turn("system", {}, [body.instructions])]
    if isinstance(body.input, str):
        turns.append(Turn("user", {}, [body.input] if body.input else []))
    else:
        for i, item in enumerate(body.input):
            turns.append(Turn(item.role, {}, reader.parts(item.content, f"input[{i}].content")))
    response_format = None if body.text is None else body.text.format
    form = form_of(response_format, None, turns, unconstrained=bool(body.unconstrained))
    return Ask(
        turns=with_prompt(turns, form),
        variables=body.chat_template_kwargs or {},
        form=form,
        fields=options_of(body),
        max_tokens=body.max_output_tokens,
        seed=None if body.seed is None else body.seed % (1 << 63),
        n_top=(body.top_logprobs or 0) if body.top_logprobs or LOGPROBS in (body.include or ()) else None,
        confidence=wants_confidence(body, form),
    )


class ResponseWriter:
    """Writes the reply to one request, complete or as events."""

    def __init__(self, model: str, body: ResponseRequest) -> None:
        self._id, self._message_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created, self._model, self._body = int(time.time()), model, body
        self._n_events = 0

    async def whole(self, dispatcher: Dispatcher, ask: Ask) -> AsyncGenerator[bytes, None]:
        async with dispatcher.answering(ask) as generation:
            await generation.complete()
            yield self._complete(generation, ask, dispatcher.model.token_bytes).model_dump_json().encode()

    async def events(self, dispatcher: Dispatcher, ask: Ask) -> AsyncGenerator[bytes, None]:
        spell = dispatcher.model.token_bytes
        async with dispatcher.answering(ask) as generation:
            begun = self._response("in_progress").model_dump(mode="json")  # a schema may hold NaN, which JSON lacks
            yield self._event("response.created", response=begun)
            yield self._event("response.in_progress", response=begun)
            item = OutputMessage(id=self._message_id, status="in_progress", content=[]).model_dump()
            yield self._event("response.output_item.added", output_index=0, item=item)
            part = OutputText(text="").model_dump()
            yield self._event("response.content_part.added", **self._place(), part=part)
            async for piece in generation.pieces():
                if piece.text:
                    shown = (
                        [] if ask.n_top is None else [one.model_dump() for one in token_replies(piece.logprobs, spell)]
                    )
                    yield self._event("response.output_text.delta", **self._place(), delta=piece.text, logprobs=shown)
            whole = self._complete(generation, ask, spell)
            text = whole.output[0].content[0]
            yield self._event(
                "response.output_text.done", **self._place(), **text.model_dump(include={"text", "logprobs"})
            )
            yield self._event("response.content_part.done", **self._place(), part=text.model_dump())
            yield self._event("response.output_item.done", output_index=0, item=whole.output[0].model_dump())
            yield self._event(f"response.{whole.status}", response=whole.model_dump(mode="json"))

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()

    def _complete(self, generation: Generation, ask: Ask, spell: Spell) -> ResponseReply:
        answer = generation.answers[0]
        shown = [] if ask.n_top is None else token_replies(answer.logprobs or [], spell)
        ended = ending(generation, 0)
        is_whole = ended.pop("finish_reason") == "stop"
        message = OutputMessage(
            id=self._message_id,
            status="completed" if is_whole else "incomplete",
            content=[OutputText(text=answer.text, logprobs=shown)],
        )
        reply = self._response("completed" if is_whole else "incomplete")
        told = usage(generation)
        return reply.model_copy(
            update={
                "output": [message],
                "usage": ResponseUsage(
                    input_tokens=told.prompt_tokens,
                    input_tokens_details=CachedTokens(cached_tokens=told.prompt_tokens_details.cached_tokens),
                    output_tokens=told.completion_tokens,
                    total_tokens=told.total_tokens,
                ),
                "incomplete_details": None if is_whole else Incomplete(),
                "timings": timings(generation.answers),
                "confidence": confidences(answer, ask.form.task) if ask.confidence else None,
                **ended,
            }
        )

    def _response(self, status: Any) -> ResponseReply:
        body = self._body
        response_format = None if body.text is None or body.text.format is None else body.text.format
        shown = {"type": "text"} if response_format is None else response_format.model_dump(by_alias=True)
        return ResponseReply(
            id=self._id,
            created_at=self._created,
            status=status,
            model=self._model,
            output=[],
            usage=None,
            incomplete_details=None,
            instructions=body.instructions,
            metadata=body.metadata or {},
            temperature=body.temperature or 0.0,
            top_p=body.top_p or 1.0,
            text={"format": shown},
            max_output_tokens=body.max_output_tokens,
        )
