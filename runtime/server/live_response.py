"""A response with slow content: it sends keep-alives while the client waits, and notices when the client disconnects.

The content comes from an asynchronous generator. When the client disconnects, the time limit passes or the server
shuts down, the generator is cancelled where it waits. That stops its work: opening a document, waiting for a turn, or
generating an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from granite4v.runtime.server import errors
from granite4v.runtime.server.errors import ApiError

LAST_WORDS_S = 2.0  # for sending the error after the time limit of a request has passed
JSON, EVENTS = "application/json", "text/event-stream"
# keep-alives: white space before a JSON document, and a comment between server-sent events
_BEAT, _COMMENT = b"\n", b": waiting\n\n"


@dataclass(frozen=True)
class Pace:
    """The timing of a response.

    `patience_s`: time until headers are sent ahead of the content. `keepalive_s`: time between two keep-alives.
    `time_s`: time limit of the request, including sending to a client that does not read. `ended`: set when the server
    cancels all requests.
    """

    patience_s: float
    keepalive_s: float
    time_s: float
    ended: asyncio.Event


class LiveResponse(Response):
    """Sends what `content` yields: server-sent events with `is_stream`, otherwise a single JSON document."""

    def __init__(
        self, content: AsyncGenerator[bytes, None], pace: Pace, *, is_stream: bool, leave: Callable[[], None]
    ) -> None:
        """`leave` is always called at the end, even when the request fails or is cancelled."""
        super().__init__(media_type=EVENTS if is_stream else JSON)
        self._content, self._pace, self._is_stream = content, pace, is_stream
        self._is_begun, self._leave = False, leave
        self._began = asyncio.get_running_loop().time()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_until_gone(receive))
        ended = asyncio.ensure_future(self._pace.ended.wait())
        try:
            async with contextlib.aclosing(self._content):
                with contextlib.suppress(_Gone):
                    await self._send_all(self._in_time(send), gone, ended)
        finally:
            gone.cancel()
            ended.cancel()
            self._leave()

    def _in_time(self, send: Send) -> Send:
        """Wraps `send` with a timeout: the rest of the request's time, but at least `LAST_WORDS_S`.

        A client that does not read in time counts as disconnected (_Gone).
        """

        async def timed(message: Message) -> None:
            left_s = self._began + self._pace.time_s - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(send(message), max(left_s, LAST_WORDS_S))
            except asyncio.TimeoutError:
                raise _Gone from None

        return timed

    async def _send_all(self, send: Send, gone: asyncio.Future[Any], ended: asyncio.Future[Any]) -> None:
        try:
            async with contextlib.aclosing(self._with_beats(gone, ended)) as pieces:
                async for piece in pieces:
                    if self._is_begun or self._is_stream or piece == _BEAT:
                        await self._put(send, piece)
                    else:
                        await self._whole(send, 200, piece, {})
                        return
        except _Gone:
            raise
        except Exception as raised:
            error = errors.of(raised)
            if not self._is_begun:
                await self._whole(send, error.status, error.json(), error.headers)
                return
            await self._put(send, b"data: " + error.json() + b"\n\n" if self._is_stream else error.json())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_beats(self, gone: asyncio.Future[Any], ended: asyncio.Future[Any]) -> AsyncGenerator[bytes, None]:
        """Yields the content, with keep-alives between its pieces. Raises _Gone, ApiError, and the content's errors."""
        loop, pace = asyncio.get_running_loop(), self._pace
        next_beat, deadline = self._began + pace.patience_s, self._began + pace.time_s
        while True:
            step = asyncio.ensure_future(_next(self._content))
            try:
                while not step.done():
                    timeout = max(0.0, min(next_beat, deadline) - loop.time())
                    await asyncio.wait({step, gone, ended}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                    if step.done():
                        break
                    if gone.done():
                        raise _Gone
                    if ended.done():
                        raise errors.shutting_down()
                    if loop.time() >= deadline:
                        raise errors.took_too_long(pace.time_s)
                    if loop.time() >= next_beat:
                        next_beat = loop.time() + pace.keepalive_s
                        yield _COMMENT if self._is_stream else _BEAT
            finally:
                await _ended(step)
            try:
                piece = step.result()
            except StopAsyncIteration:
                return
            next_beat = loop.time() + pace.keepalive_s
            yield piece

    async def _put(self, send: Send, piece: bytes) -> None:
        if not self._is_begun:
            self._is_begun = True
            headers = [(b"content-type", str(self.media_type).encode()), (b"cache-control", b"no-store")]
            if self._is_stream:
                headers.append((b"x-accel-buffering", b"no"))  # otherwise proxies buffer events
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _whole(self, send: Send, status: int, body: bytes, more: dict[str, str]) -> None:
        self._is_begun = True
        headers = {"content-type": JSON, "content-length": str(len(body)), "cache-control": "no-store", **more}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class _Gone(Exception):
    """The client has disconnected, or does not read."""


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(content: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(content)


async def _ended(step: asyncio.Future[Any]) -> None:
    """Cancels a step that is still running, and waits until it has released its resources."""
    if not step.done():
        step.cancel()
        await asyncio.wait({step})
        if not step.cancelled():
            step.exception()  # retrieved, so that asyncio does not log it


def json_error(error: ApiError) -> Response:
    """Builds the JSON response to a refused request."""
    return Response(error.json(), error.status, {"cache-control": "no-store", **error.headers}, JSON)
