"""POST /v1/chat/completions: OpenAI's chat completions, complete or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from granite4v.runtime.server.accounts import ending, timings
from granite4v.runtime.server.content import ContentReader
from granite4v.runtime.server.dispatcher import Ask, Dispatcher
from granite4v.runtime.server.generation import Generation
from granite4v.runtime.server.logprobs import Spell, chat_logprobs, confidences
from granite4v.runtime.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChunkChoice,
)
from granite4v.runtime.server.requests import ChatRequest
from granite4v.runtime.server.sampling import check_completion_fields, options_of, refuse_tools, wants_confidence
from granite4v.runtime.server.structure import form_of, with_prompt
from granite4v.runtime.server.writer import Writer


def asked(body: ChatRequest, reader: ContentReader, n_most: int) -> Ask:
    """Parses a request. `n_most`: answers to one request. Raises ApiError."""
    check_completion_fields(body, n_most)
    refuse_tools(body, "tools", "functions")
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


class ChatWriter(Writer):
    """Writes the reply to one request, complete or as events."""

    prefix, whole_kind, chunk_kind = "chatcmpl", ChatCompletion, ChatChunk

    def choice(self, index: int, generation: Generation, ask: Ask, spell: Spell) -> ChatChoice:
        answer = generation.answers[index]
        return ChatChoice(
            index=index,
            message=ChatMessage(content=answer.text),
            logprobs=None if ask.n_top is None else chat_logprobs(answer.logprobs or [], spell),
            confidence=confidences(answer, ask.form.task) if ask.confidence else None,
            **ending(generation, index),
        )

    async def events(self, dispatcher: Dispatcher, ask: Ask) -> AsyncGenerator[bytes, None]:
        spell = dispatcher.model.token_bytes
        async with dispatcher.answering(ask) as generation:
            for i in range(ask.n):
                yield self.chunk(ChunkChoice(index=i, delta=ChatDelta(role="assistant", content="")))
            n_left = ask.n
            async for piece in generation.pieces():
                if piece.text or (piece.logprobs and ask.n_top is not None):
                    shown = None if ask.n_top is None else chat_logprobs(piece.logprobs, spell)
                    delta = ChatDelta(content=piece.text)
                    yield self.chunk(ChunkChoice(index=piece.index, delta=delta, logprobs=shown))
                if piece.is_last:
                    n_left -= 1
                    took = None if n_left else timings(generation.answers)
                    yield self.chunk(self._end(piece.index, generation, ask), timings=took)
            yield self.last(generation)

    def _end(self, index: int, generation: Generation, ask: Ask) -> ChunkChoice:
        answer = generation.answers[index]
        return ChunkChoice(
            index=index,
            delta=ChatDelta(),
            confidence=confidences(answer, ask.form.task) if ask.confidence else None,
            **ending(generation, index),
        )
