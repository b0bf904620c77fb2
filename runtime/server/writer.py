"""Writes answers, complete or as events; shared by the chat completions API and the completions API."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any

from granite4v.runtime.server.accounts import timings, usage
from granite4v.runtime.server.dispatcher import Ask, Dispatcher
from granite4v.runtime.server.generation import Generation
from granite4v.runtime.server.logprobs import Spell
from granite4v.runtime.server.replies import Reply

DONE = b"data: [DONE]\n\n"


class Writer(ABC):
    """Writes the answers to one request.

    `whole_kind` and `chunk_kind`: the reply models of a complete reply and of an event; both have the fields of
    `_head`, 'choices', 'usage' and 'timings'.
    """

    prefix: str
    whole_kind: type[Any]
    chunk_kind: type[Any]

    def __init__(self, model: str, fingerprint: str, *, include_usage: bool = False) -> None:
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._include_usage = include_usage

    async def whole(self, dispatcher: Dispatcher, ask: Ask) -> AsyncGenerator[bytes, None]:
        spell = dispatcher.model.token_bytes
        async with dispatcher.answering(ask) as generation:
            await generation.complete()
            reply: Reply = self.whole_kind(
                **self._head,
                choices=[self.choice(i, generation, ask, spell) for i in range(ask.n)],
                usage=usage(generation),
                timings=timings(generation.answers),
            )
            yield reply.model_dump_json().encode()

    @abstractmethod
    def choice(self, index: int, generation: Generation, ask: Ask, spell: Spell) -> Reply:
        """The choice for one complete answer."""

    @abstractmethod
    def events(self, dispatcher: Dispatcher, ask: Ask) -> AsyncGenerator[bytes, None]: ...

    def chunk(self, *choices: Reply, **more: Any) -> bytes:
        """Encodes an event. `more`: 'usage' or 'timings'."""
        data = self.chunk_kind(**self._head, choices=choices, **more).model_dump(exclude_none=True)
        for choice in data["choices"]:
            choice.setdefault("finish_reason", None)  # many clients read it in every chunk
        return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"

    def last(self, generation: Generation) -> bytes:
        """The events after all choices: the usage, if requested, and '[DONE]'."""
        if not self._include_usage:
            return DONE
        return self.chunk(usage=usage(generation)) + DONE  # OpenAI's clients expect no choices with it
