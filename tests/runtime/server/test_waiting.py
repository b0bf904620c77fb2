"""Tests of clients that wait, and of clients that disconnect before anything is computed, in encoding, in prefill or
while decoding."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

import granite4v
from granite4v.runtime.server import live_response
from granite4v.runtime.server.options import Limits, ServerOptions
from tests.helpers.pictures import text_picture
from tests.helpers.served import Served, events, image, png, served, text

LONG = "word " * 1500


def request_bytes(**fields: Any) -> bytes:
    body = json.dumps(fields).encode()
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def impatient(tiny_model: granite4v.Model) -> Iterator[Served]:
    """A server that keeps sending signs of life."""
    with served(tiny_model, ServerOptions(patience_s=0.02, keepalive_s=0.02)) as server:
        yield server


def test_white_space_before_a_slow_answer(impatient: Served, tiny_model: granite4v.Model) -> None:
    tiny_model.clear_cache()
    reply = impatient.chat(text(LONG), max_tokens=60)
    assert reply.status == 200 and reply.headers["transfer-encoding"] == "chunked"
    assert reply.body.startswith(b"\n") and reply.json["choices"][0]["finish_reason"]


def test_comments_before_and_between_events(impatient: Served, tiny_model: granite4v.Model) -> None:
    tiny_model.clear_cache()
    reply = impatient.chat(text(LONG), max_tokens=20, stream=True)
    assert b"\n\n: waiting\n\n" in b"\n\n" + reply.body and events(reply.body)[-1] == "[DONE]"


def test_errors_after_the_headers(tiny_model: granite4v.Model) -> None:
    """They are sent as an error object, or as an event that OpenAI's clients raise."""
    options = ServerOptions(patience_s=0.02, keepalive_s=0.02, limits=Limits(time_s=0.3))
    with served(tiny_model, options) as server:
        whole = server.chat(text("A"), max_tokens=4000)
        assert whole.status == 200 and whole.error["code"] == "timeout"
        streamed = server.chat(text("A"), max_tokens=4000, stream=True)
        *chunks, last = events(streamed.body)
        assert streamed.status == 200 and last["error"]["code"] == "timeout" and chunks


def test_a_cut_stream_can_be_told_from_a_complete_one(tiny: Served) -> None:
    assert tiny.chat(text("A"), max_tokens=3, stream=True).headers["transfer-encoding"] == "chunked"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
def test_a_client_that_goes_away(tiny: Served, tiny_model: granite4v.Model, stage: str, stream: bool) -> None:
    """Its request is cancelled, whatever is being computed, and others are answered as before."""
    expected = tiny_model.generate("Hello", max_tokens=30).text
    parts = {"encode": [image(png(text_picture((900, 700), seed=31))), text("?")], "prefill": [text(LONG)]}
    asked = request_bytes(messages=user(*parts.get(stage, [text("Hello")])), max_tokens=3000, stream=stream)
    tiny_model.clear_cache()
    before = tiny_model.counters
    with socket.create_connection(("127.0.0.1", tiny.port)) as connection:
        connection.sendall(asked)
        until = time.monotonic() + 20
        while tiny.metrics()["granite4v_sequences_in_use"] == 0 and stage != "encode":
            assert time.monotonic() < until
        if stage == "decode":
            while tiny_model.counters.n_decoded - before.n_decoded < 3:
                assert time.monotonic() < until
    tiny.wait_until_idle()
    after = tiny_model.counters
    assert after.n_decoded - before.n_decoded < 2900
    assert tiny.chat(text("Hello"), max_tokens=30).json["choices"][0]["message"]["content"] == expected


def test_clients_that_go_away_before_they_have_asked(tiny: Served) -> None:
    asked = request_bytes(messages=user(text("Hello")), max_tokens=5)
    for n in (0, 10, len(asked) - 4):
        with socket.create_connection(("127.0.0.1", tiny.port)) as connection:
            connection.sendall(asked[:n])
    with contextlib.closing(tiny.connect()) as connection:
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    tiny.wait_until_idle()


def test_a_client_that_reads_nothing_any_more_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer ends, and its turn is given back."""
    monkeypatch.setattr(live_response, "LAST_WORDS_S", 0.05)
    done: list[str] = []

    async def content() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: more\n\n"
        finally:
            done.append("answer")

    async def send(message: Any) -> None:
        done.append(message["type"])
        if len(done) > 3:
            await asyncio.Event().wait()

    async def receive() -> Any:
        return await asyncio.Event().wait()

    async def request() -> None:
        pace = live_response.Pace(1.0, 1.0, 0.1, asyncio.Event())
        reply = live_response.LiveResponse(content(), pace, is_stream=True, leave=lambda: done.append("turn"))
        await asyncio.wait_for(reply({"type": "http"}, receive, send), 20)

    asyncio.run(request())
    assert done == ["http.response.start", *["http.response.body"] * 3, "answer", "turn"]


def test_a_client_that_does_not_read(tiny: Served) -> None:
    """Its answer is generated and waits; other requests do not wait."""
    with socket.create_connection(("127.0.0.1", tiny.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(request_bytes(messages=user(text("Hello")), max_tokens=400, stream=True))
        assert tiny.chat(text("Hi"), max_tokens=5).status == 200
    tiny.wait_until_idle()


SILENT_SERVER = """
import time
from granite4v.runtime.server import ServerOptions, create_app, run
from granite4v.runtime.server.serving import listen

options = ServerOptions(stall_s=1.0)
run(create_app(lambda: time.sleep(1000), options), listen("127.0.0.1", 0), lambda address: print(address, flush=True))
"""


def test_connections_without_a_request_are_closed() -> None:
    """Closes connections that send nothing, or that stop in the head of their first or a later request; one that is
    answered meanwhile stays open."""
    asked = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(
            subprocess.Popen([sys.executable, "-c", SILENT_SERVER], stdout=subprocess.PIPE, text=True)
        )
        opened.callback(server.kill)
        assert server.stdout is not None
        port = int(server.stdout.readline().rpartition(":")[2])

        def connect() -> socket.socket:
            return opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))

        waiting = [(begun, connect()) for begun in (b"", b"GET", asked, asked + b"\r\n" + asked)]
        for begun, connection in waiting:
            connection.sendall(begun)
        for begun, connection in waiting:
            answer = connection.makefile("rb").read()  # to its end
            assert answer.count(b"HTTP/1.1 503") == begun.count(b"\r\n\r\n")
        patient = opened.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)))
        kept = set()
        for _ in range(8):
            patient.request("GET", "/health")
            kept.add(patient.sock)
            response = patient.getresponse()
            assert response.status == 503 and response.read()
            time.sleep(0.2)
        assert len(kept) == 1
