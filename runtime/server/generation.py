"""Passes answers from the engine's thread to the event loop, without a thread per answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from granite4v.runtime.answer import Answer, TokenLogprob
from granite4v.runtime.engine.stream import Stream
from granite4v.runtime.prompt.spans import Prompt
from granite4v.runtime.server.structure import SchemaCheck


class News:
    """The listener of streams: wakes the event loop from the engine's thread."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def __call__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody is waiting
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()


@dataclass(frozen=True)
class Piece:
    """New text of one answer, by its index. `logprobs`: those of the new tokens, if requested."""

    index: int
    text: str
    logprobs: list[TokenLogprob]
    is_last: bool


class Generation:
    """The answers to one request.

    `schema_errors`: why a complete answer is not an instance of the requested schema; None if it is, and without a
    schema. `warnings`: those of the schema; None without one.
    """

    def __init__(self, prompt: Prompt, streams: Sequence[Stream], news: News, check: SchemaCheck | None = None) -> None:
        self.prompt, self._streams, self._news, self._check = prompt, list(streams), news, check
        self.warnings = None if check is None else check.warnings
        self.schema_errors: list[str | None] = [None] * len(self._streams)
        self.first_text_at: float | None = None
        for stream in streams:
            stream.let_run()

    @property
    def answers(self) -> list[Answer]:
        return [stream.answer for stream in self._streams]

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields new text as it arrives, until all answers are complete. Raises the error that ended one of them."""
        n_characters = [0] * len(self._streams)
        n_tokens = [0] * len(self._streams)
        left = set(range(len(self._streams)))
        while left:
            for i in sorted(left):
                stream, answer = self._streams[i], self._streams[i].answer
                done = stream.poll() or (stream.is_done and stream.poll())  # may have ended since the first
                text = answer.text[n_characters[i] :]
                logprobs = (answer.logprobs or [])[n_tokens[i] :]
                if done and self._check is not None:  # takes up to a second
                    self.schema_errors[i] = await asyncio.to_thread(self._check.problem, answer.text)
                if text or done:
                    if text and self.first_text_at is None:
                        self.first_text_at = time.monotonic()
                    yield Piece(i, text, logprobs, done)
                    n_characters[i] += len(text)
                    n_tokens[i] += len(logprobs)
                if done:
                    left.discard(i)
            if left:
                await self._news.wait()

    async def complete(self) -> None:
        """Waits until all answers are complete."""
        async for _ in self.pieces():
            pass

    def cancel(self) -> None:
        """Stops all incomplete answers, within one token."""
        for stream in self._streams:
            stream.cancel()
