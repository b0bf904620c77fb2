"""A server in its own thread on a real socket, and requests to it without a client library."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import PIL.Image
import uvicorn

from granite4v.runtime.server import create_app
from granite4v.runtime.server.app import Application
from granite4v.runtime.server.options import ServerOptions


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a reply, which must have OpenAI's error format and no other keys."""
        content = self.json
        assert content.keys() == {"error"} and content["error"].keys() == {"message", "type", "param", "code"}
        error: dict[str, Any] = content["error"]
        return error


@dataclass(frozen=True)
class Served:
    """A running server."""

    app: Application
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 120) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path: str, **headers: str) -> Reply:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """Sends a POST request. `body`: JSON data, or bytes to send unchanged."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask("POST", path, content, {"Content-Type": "application/json", **headers})

    def _ask(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> Reply:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, content, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            told = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, told, response.read())

    def chat(self, *parts: Any, **fields: Any) -> Reply:
        """Sends a chat request with one user message."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": list(parts)}], **fields})

    def wait_until_idle(self, timeout: float = 20) -> None:
        """Waits until no request is in flight and no sequence in use; fails after `timeout` seconds."""
        until = time.monotonic() + timeout
        while True:
            metrics = self.metrics()
            busy = metrics["granite4v_requests_in_flight"], metrics["granite4v_sequences_in_use"]
            if busy == (0, 0):
                return
            assert time.monotonic() < until, busy
            time.sleep(0.02)

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").body.decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}


@contextlib.contextmanager
def served(model: Any, options: ServerOptions | None = None) -> Iterator[Served]:
    """Serves a model until the block ends. `model`: as for `create_app`."""
    app = create_app(model, options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(app, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def events(body: bytes) -> list[Any]:
    """Returns the data of server-sent events. Comments are left out, and '[DONE]' stays text."""
    found = []
    for block in body.decode().split("\n\n"):
        data = [line.removeprefix("data: ") for line in block.splitlines() if line.startswith("data: ")]
        if data:
            found.append(data[0] if data[0] == "[DONE]" else json.loads(data[0]))
    return found
