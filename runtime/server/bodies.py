"""Reads complete request bodies within limits of size and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import ClientDisconnect, Request

from granite4v.runtime.server import errors
from granite4v.runtime.server.errors import ApiError
from granite4v.runtime.server.guard import too_large

N_BODIES = 8  # all bodies being received may together hold as many bytes as this number of the largest size


class BodyReader:
    """Reads the bodies of all requests of one server."""

    def __init__(self, most_bytes: int, stall_s: float, time_s: float, ended: asyncio.Event) -> None:
        """`most_bytes`: largest size of a body. `stall_s`: longest time without new bytes. `time_s`: longest time to
        receive a body. `ended`: set when the server cancels all requests."""
        self._most_bytes, self._stall_s, self._time_s, self._ended = most_bytes, stall_s, time_s, ended
        self._n_held = 0  # bytes of bodies that are not complete yet

    async def read(self, request: Request) -> bytearray:
        """Reads the complete body. Raises ApiError."""
        content = bytearray()
        try:
            async with contextlib.aclosing(self._parts(request, content)) as parts:
                async for part in parts:
                    content += part
                    self._n_held += len(part)
                    if len(content) > self._most_bytes:
                        raise too_large(self._most_bytes)
                    if self._n_held > N_BODIES * self._most_bytes:  # bodies are read before the queue
                        raise errors.too_busy()
            return content
        except ClientDisconnect:
            raise ApiError(400, "the body is not complete.") from None
        finally:
            self._n_held -= len(content)

    async def _parts(self, request: Request, content: bytearray) -> AsyncGenerator[bytes, None]:
        loop, parts = asyncio.get_running_loop(), request.stream()
        deadline = loop.time() + self._time_s
        ended = asyncio.ensure_future(self._ended.wait())
        part: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                part = asyncio.ensure_future(_next(parts))
                left_s = max(0.0, deadline - loop.time())
                await asyncio.wait(
                    {part, ended}, timeout=min(self._stall_s, left_s), return_when=asyncio.FIRST_COMPLETED
                )
                if not part.done():
                    raise errors.shutting_down() if ended.done() else self._stopped(len(content), left_s)
                found = part.result()
                if found is None:
                    return
                yield found
        finally:
            ended.cancel()
            if part is not None:
                part.cancel()

    def _stopped(self, n_bytes: int, left_s: float) -> ApiError:
        why = f"stopped, and nothing came for {self._stall_s:g} s"
        if left_s < self._stall_s:
            why = f"took longer than {self._time_s:g} s, the server's limit"
        return ApiError(
            408,
            f"the body {why}; {n_bytes:,} bytes had come. Send it again.",
            code="body_timeout",
            headers={"connection": "close"},
        )


async def _next(parts: AsyncGenerator[bytes, None]) -> bytes | None:
    """The next part; None at the end."""
    return await anext(parts, None)
