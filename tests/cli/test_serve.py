"""`granite4v serve` as a process: it listens, answers, logs what it does, and ends in time."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pictures import text_picture
from tests.helpers.served import image, png, text
from tests.toy.spec import PRESETS

MESSAGES = [{"role": "user", "content": "Hello"}]


class Process:
    """A server process, and its log on standard error."""

    def __init__(self, *arguments: str, log: Path, **environment: str) -> None:
        self._log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "granite4v", "serve", "--port", "0", *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
            )
        self.port = int(self.wait_for(r"listening at http://127\.0\.0\.1:(\d+)"))

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str) -> str:
        until = time.monotonic() + 60
        while True:
            if found := re.search(pattern, self.log):
                return found[found.re.groups]
            assert self.process.poll() is None and time.monotonic() < until, self.log
            time.sleep(0.02)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def wait_until_ready(self) -> None:
        while self.ask("GET", "/health")[0] == 503:
            time.sleep(0.02)

    def end(self, number: int) -> int:
        """Sends a signal and returns the exit status. Takes at most three seconds, plus delays of a loaded machine."""
        self.process.send_signal(number)
        return self.process.wait(15)


@pytest.fixture
def model(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"])


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*arguments: str, **environment: str) -> Process:
        log = tmp_path / f"{len(started)}.log"
        started.append(Process("--model", str(model), "--device", "cpu", *arguments, log=log, **environment))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_it_answers_and_prints_nothing_of_what_is_asked(start: Callable[..., Process]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    server = start("-v", "--served-name", "toy", "--host", "127.1")
    signal.signal(signal.SIGHUP, before)
    server.wait_until_ready()
    server.process.send_signal(signal.SIGHUP)
    status, reply = server.ask("POST", "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3})
    assert status == 200 and reply["model"] == "toy" and reply["usage"]["completion_tokens"] == 3
    assert server.ask("GET", "/health", Host="evil.example")[0] == 421
    assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert server.process.stdout is not None and server.process.stdout.read() == b""
    assert re.search(r"POST '/v1/chat/completions' 200 \d", server.log) and "Hello" not in server.log
    assert server.log.count("listening at") == 1 and "Traceback" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_comes_in_time(start: Callable[..., Process], number: int) -> None:
    """Requests that would take longer than the remaining time get an error, including one that is not completely sent;
    short ones are finished."""
    server = start("--ctx-size", "4096")
    server.wait_until_ready()
    connections = []
    for n in (4000, 20):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps({"messages": MESSAGES, "max_tokens": n, "temperature": 3.0, "seed": 1})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        connections.append(connection)
    stalled = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    stalled.putrequest("POST", "/v1/chat/completions")
    for name, value in (("Content-Type", "application/json"), ("Content-Length", "1000")):
        stalled.putheader(name, value)
    stalled.endheaders(b'{"messages": ')
    connections.append(stalled)
    time.sleep(0.05)
    assert server.end(number) == 128 + number
    for connection in connections:
        response = connection.getresponse()
        reply = json.loads(response.read())
        assert "choices" in reply or reply["error"]["code"] == "shutting_down"
    assert "Traceback" not in server.log


def test_the_end_while_it_loads(start: Callable[..., Process]) -> None:
    server = start()
    assert server.end(signal.SIGINT) == 128 + signal.SIGINT
    assert "Traceback" not in server.log and "internal error" not in server.log


def test_a_page_is_read_once_for_all_servers(start: Callable[..., Process], tmp_path: Path) -> None:
    page = image(png(text_picture((300, 200))))
    body = {"messages": [{"role": "user", "content": [page, text("How much?")]}], "max_tokens": 4}
    cache = {"GRANITE4V_CACHE": str(tmp_path / "cache")}
    replies = []
    for arguments in ((), (), ("--no-page-store",)):
        server = start(*arguments, **cache)
        server.wait_until_ready()
        replies.append(server.ask("POST", "/v1/chat/completions", body)[1])
        assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM
    first, second, without = replies
    n_image = first["usage"]["prompt_tokens_details"]["image_tokens"]
    assert (
        second["timings"]["stored_n"] >= n_image > 0 == first["timings"]["stored_n"] == without["timings"]["stored_n"]
    )
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == second["timings"]["cache_n"]
    assert len({reply["choices"][0]["message"]["content"] for reply in replies}) == 1


def test_a_key_from_the_environment(start: Callable[..., Process]) -> None:
    server = start(GRANITE4V_API_KEY="geheim")
    server.wait_until_ready()
    assert server.ask("GET", "/v1/models")[0] == 401
    assert server.ask("GET", "/v1/models", Authorization="Bearer geheim")[0] == 200


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "granite4v", "serve", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_refused(tmp_path: Path, key: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[serve]\napi-key = "{key}"\n')
    for done, status in (
        (run("--api-key", key, "--port", "0"), 2),
        (run("--port", "0", GRANITE4V_API_KEY=key), 2),
        (run("--port", "0", GRANITE4V_CONFIG=str(config)), 1),
    ):
        assert done.returncode == status and "the key is empty" in done.stderr and "listening" not in done.stderr


@pytest.mark.parametrize("origin", ["foo", "http://a.example/", "localhost:3000", "http://"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    done = run("--cors-origin", "http://localhost:3000", "--cors-origin", origin, "--port", "0")
    assert done.returncode == 2 and "is not an origin" in " ".join(done.stderr.split())


def test_a_port_that_is_taken(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("--model", str(model), "--port", str(port))
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(rf"cannot listen at 127\.0\.0\.1, port {port}: .*--port", done.stderr)


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    done = run("--model", str(tmp_path / "nothing"), "--port", "0")
    assert done.returncode == 1 and "nothing' does not exist" in done.stderr and "listening" not in done.stderr
    assert "Traceback" not in done.stderr
