"""Checks the API key, the Host header and the size of the body before anything else handles a request."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from granite4v.runtime.server.errors import ApiError
from granite4v.runtime.server.live_response import json_error
from granite4v.runtime.server.metrics import Metrics
from granite4v.runtime.server.options import ServerOptions

ACCESS = logging.getLogger("granite4v.server.access")
_OPEN = ("/", "/health", "/openapi.json")  # paths that need no key, in addition to the files of the web page


class Guard:
    """ASGI middleware that checks, counts and logs requests; their content is never logged."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics, paths: Collection[str]) -> None:
        """`paths`: the paths that may be metric labels; all others count as 'other', since clients can make up any
        number of them."""
        self._app, self._options, self._metrics, self._paths = app, options, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, request_id, status = time.monotonic(), uuid.uuid4().hex, 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refused = self._refused(scope)
            await (self._app if refused is None else json_error(refused))(scope, receive, send_counted)
        finally:
            path = scope["path"]
            self._metrics.note_request(path if path in self._paths else "other", status)
            took_s = time.monotonic() - began
            ACCESS.info("%s %s %.200r %d %.3fs", request_id, scope["method"], path, status, took_s)

    def _refused(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        hosts = self._options.hosts
        if hosts and _host(headers.get("host", "")) not in hosts:
            return ApiError(
                421,
                f"the server does not answer for the host {headers.get('host', '')!r:.80}; start it with "
                "--allowed-host if it should.",
                code="unknown_host",
            )
        is_open = scope["path"] in _OPEN or scope["path"].startswith("/web/")
        if not is_open and not self._has_key(headers):
            return ApiError(
                401,
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._options.limits.body_bytes:
            return too_large(self._options.limits.body_bytes)
        return None

    def _has_key(self, headers: Headers) -> bool:
        if self._options.api_key is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        is_equal = hmac.compare_digest(key.strip().encode("latin-1"), self._options.api_key.encode())
        return is_equal and scheme.lower() == "bearer"


def too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {most:,} bytes, the server's limit; send smaller images, or raise --max-body.",
        code="body_too_large",
        headers={"connection": "close"},
    )


def _host(value: str) -> str:
    """The host name of a Host header, without the port, in lower case."""
    name, colon, port = value.rpartition(":")
    return (name if colon and port.isdecimal() else value).strip("[]").lower()
