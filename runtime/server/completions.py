"""POST /v1/completions: continues raw text or tokens, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from granite4v.runtime.server.accounts import ending, timings
from granite4v.runtime.server.dispatcher import Ask, Dispatcher
from granite4v.runtime.server.errors import invalid
from granite4v.runtime.server.generation import Generation
from granite4v.runtime.server.logprobs import Spell, completion_logprobs
from granite4v.runtime.server.replies import Completion, CompletionChoice
from granite4v.runtime.server.requests import CompletionRequest
from granite4v.runtime.server.sampling import check_completion_fields, options_of, refuse
from granite4v.runtime.server.structure import form_of
from granite4v.runtime.server.writer import Writer

DEFAULT_TOKENS = 16  # OpenAI's default of `max_tokens`


def asked(body: CompletionRequest, n_most: int) -> Ask:
    """Parses a request. `n_most`: answers to one request. Raises ApiError."""
    check_completion_fields(body, n_most)
    refuse(body, "echo", "suffix")
    return Ask(
        plain=_only(body.prompt),
        form=form_of(body.response_format, None, (), unconstrained=False),
        fields=options_of(body, body.stop),
        max_tokens=body.max_tokens or DEFAULT_TOKENS,
        seed=None if body.seed is None else body.seed % (1 << 63),
        n=body.n or 1,
        n_top=body.logprobs,
    )


def _only(prompt: str | Sequence[Any]) -> str | Sequence[int]:
    """The only prompt of a request, which may be in a list. Raises ApiError for several."""
    if isinstance(prompt, str) or (prompt and all(isinstance(token, int) for token in prompt)):
        return prompt
    if len(prompt) != 1:
        raise invalid(f"{len(prompt)} prompts; send one with each request.", "prompt", "unsupported")
    only: str | list[int] = prompt[0]
    return only


class CompletionWriter(Writer):
    """Writes the reply to one request, complete or as events."""

    prefix, whole_kind, chunk_kind = "cmpl", Completion, Completion

    def choice(self, index: int, generation: Generation, ask: Ask, spell: Spell) -> CompletionChoice:
        answer = generation.answers[index]
        shown = None if ask.n_top is None else completion_logprobs(answer.logprobs or [], 0, spell)
        return CompletionChoice(index=index, text=answer.text, logprobs=shown, **ending(generation, index))

    async def events(self, dispatcher: Dispatcher, ask: Ask) -> AsyncGenerator[bytes, None]:
        spell, offsets = dispatcher.model.token_bytes, [0] * ask.n
        async with dispatcher.answering(ask) as generation:
            n_left = ask.n
            async for piece in generation.pieces():
                ended: dict[str, Any] = {"finish_reason": None}
                took = None
                if piece.is_last:
                    n_left -= 1
                    ended = ending(generation, piece.index)
                    took = None if n_left else timings(generation.answers)
                shown = None
                if ask.n_top is not None:
                    shown = completion_logprobs(piece.logprobs, offsets[piece.index], spell)
                    offsets[piece.index] = piece.logprobs[-1].end if piece.logprobs else offsets[piece.index]
                choice = CompletionChoice(index=piece.index, text=piece.text, logprobs=shown, **ended)
                yield self.chunk(choice, timings=took)
            yield self.last(generation)
