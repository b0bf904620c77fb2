"""Tests of every limit and of the reply to a client that exceeds it, and of keys, hosts and origins."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pikepdf
import pytest
from PIL import Image

import granite4v
from granite4v.runtime.server.bodies import N_BODIES
from granite4v.runtime.server.endpoints import MAX_VALUES
from granite4v.runtime.server.options import Limits, ServerOptions
from tests.helpers.pdfs import pdf_bytes, text_pdf
from tests.helpers.pictures import text_picture
from tests.helpers.served import Served, data_url, image, png, served, text

PICTURE = png(text_picture((60, 40)))
PDF = data_url(pdf_bytes(text_pdf("one", "two", "three")), "application/pdf")
LOCK = pikepdf.Encryption(owner="boss", user="hush")
LOCKED = data_url(pdf_bytes(text_pdf("one", "two", "three"), encryption=LOCK), "application/pdf")


def pdf(**fields: str) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": PDF, **fields}}


@pytest.fixture(scope="module")
def strict(tiny_model: granite4v.Model) -> Iterator[Served]:
    """A server with low limits."""
    limits = Limits(body_bytes=40_000, n_images=2, n_pixels=60 * 40 + 10, n_pages=2, n_choices=2)
    with served(tiny_model, ServerOptions(limits=limits)) as server:
        yield server


@pytest.mark.parametrize(
    ("parts", "fields", "status", "code", "param"),
    [
        ([text("x" * 50_000)], {}, 413, "body_too_large", None),
        ([image(PICTURE)] * 3, {}, 400, "too_many_images", "messages[0].content[2].image_url"),
        ([image(PICTURE)] * 2, {}, 400, "too_many_pixels", "messages[0].content[1].image_url"),
        ([pdf()], {}, 400, "too_many_pages", "messages[0].content[0].file.file_data"),
        ([pdf(pages="2,9")], {}, 400, "invalid_pages", "messages[0].content[0].file.file_data"),
        ([pdf(pages="first")], {}, 400, "invalid_pages", "messages[0].content[0].file.pages"),
        ([text("A")], {"n": 3}, 400, "too_many", "n"),
        ([text("word " * 6000)], {}, 400, "context_length_exceeded", None),
        ([text("A")], {"tools": [{}]}, 400, "unsupported", "tools"),
        ([text("A")], {"presence_penalty": 1.0}, 400, "unsupported", "presence_penalty"),
        ([text("A")], {"logit_bias": {"3": 1.0}}, 400, "unsupported", "logit_bias"),
        ([text("A")], {"lora": True}, 400, "no_adapter", "lora"),
        ([text("A")], {"temperature": -1.0}, 400, "greater_than_equal", "temperature"),
        ([text("A")], {"temperature": "0"}, 400, "float_type", "temperature"),
        ([text("A")], {"response_format": {"type": "json_schema"}}, 400, "missing_schema", "response_format"),
        ([text("A")], {"format": {"type": "nonsense"}}, 400, "invalid_schema", None),
        ([text("A"), {"type": "audio"}], {}, 400, "union_tag_invalid", None),
        ([{"type": "video_url", "video_url": data_url(b"?", "video/mp4")}], {}, 400, "no_video",
         "messages[0].content[0].video_url"),
        ([text("<image>")], {}, 400, "invalid_prompt", None),
    ],
)  # fmt: skip
def test_what_is_too_much_or_makes_no_sense(
    strict: Served, parts: list[Any], fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    reply = strict.chat(*parts, **fields)
    assert (reply.status, reply.error["code"]) == (status, code), reply.body
    assert param is None or reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error" and len(reply.error["message"]) > 20
    strict.wait_until_idle()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (image(b"hello there"), "the image at 'messages[0].content[0].image_url' holds text, "),
        (image(PICTURE[:-30]), "the image at 'messages[0].content[0].image_url' cannot be read as an image: "),
        (image(png(Image.new("1", (1, 1_000_001)))), "image_url' has 1x1,000,001 pixels, and a side may have "),
        ({"type": "file", "file": {"file_data": data_url(bytes(99))}}, "the document at 'messages[0].content[0].file."),
        ({"type": "file", "file": {"file_data": data_url(b"%PDF-1.7"), "filename": "a.pdf"}}, "'a.pdf' is cut short: "),
    ],
)  # fmt: skip
def test_files_that_are_none_are_called_by_their_places(strict: Served, part: Any, message: str) -> None:
    reply = strict.chat(part, text("A"))
    assert reply.status == 400 and message in reply.error["message"], reply.body


@pytest.mark.parametrize(
    ("part", "code", "place", "message"),
    [
        ({"file_data": LOCKED}, "invalid_password", "password", "is encrypted; send its password as 'password', "),
        ({"file_data": LOCKED, "password": "no"}, "invalid_password", "password", "and its 'password' does not open "),
        (data_url(png(Image.new("1", (10_000, 10_000)))), "invalid_image", "", "decompression bomb; scale it down."),
        (PDF, "invalid_image", "", "is a PDF, not an image; send it as a part of the type 'file'"),
    ],
)  # fmt: skip
def test_advice_is_for_clients(strict: Served, part: Any, code: str, place: str, message: str) -> None:
    is_image = isinstance(part, str)
    sent = {"type": "image_url", "image_url": part} if is_image else {"type": "file", "file": part}
    reply = strict.chat(sent, text("A"))
    where = "messages[0].content[0]." + ("image_url" if is_image else f"file.{place}")
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, code, where)
    assert message in reply.error["message"] and "--" not in reply.error["message"]


def test_the_password_of_a_document(tiny: Served) -> None:
    pages = [{"type": "file", "file": {"file_data": LOCKED, "password": "hush", "pages": "1"}}, pdf(pages="1")]
    answers = [tiny.chat(page, text("A"), max_tokens=4) for page in pages]
    assert [answer.status for answer in answers] == [200, 200]
    first, second = (answer.json["choices"][0]["message"]["content"] for answer in answers)
    assert first == second


CHAT, RESPONSES, COMPLETIONS = "/v1/chat/completions", "/v1/responses", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "fields", "param", "expected"),
    [
        (CHAT, {"stop": 5}, "stop", "expected a text, or a list of at most 16 texts"),
        (CHAT, {"stop": ["a", 5]}, "stop[1]", "Input should be a valid string"),
        (CHAT, {"stop": ["a"] * 17}, "stop", "at most 16 items"),
        (CHAT, {"format": [1]}, "format", "expected 'json', or a JSON Schema"),
        (CHAT, {"format": "xml"}, "format", "Input should be 'json'"),
        (CHAT, {"response_format": {}}, "response_format", "'type' is missing"),
        (CHAT, {"response_format": {"type": "x"}}, "response_format", "'type' is 'x', expected one of 'text', 'json_o"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
         "response_format.json_schema.schema", "should be an object"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content",
         "expected a text, or a list of parts"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url",
         "Field required"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].image_url.url", "Field required"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}]},
         "messages[0].content[0].image_url", "expected a data URL, alone or as {'url': ...}"),
        (RESPONSES, {"input": 5}, "input", "expected a text, or a list of messages"),
        (RESPONSES, {"input": [{"role": "user"}]}, "input[0].content", "Field required"),
        (COMPLETIONS, {"prompt": {}}, "prompt", "expected a text, or a list of tokens"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt[1]", "Input should be a valid integer"),
        ("/parse", {"task": "kvp", "text": "x" * 1_000_001}, "text", "at most 1000000 characters"),
        ("/tokenize", {"content": "x" * 1_000_001}, "content", "at most 1000000 characters"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type(tiny: Served, path: str, fields: dict[str, Any], param: str, expected: str) -> None:
    body = {"messages": [{"role": "user", "content": "A"}], **fields}
    reply = tiny.post(path, body)
    assert reply.status == 400 and reply.error["param"] == param
    message = reply.error["message"]
    assert message.startswith(f"'{param}': ") and expected in message and "more problem" not in message


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1:9/x.png", "no_fetch"),
        ("ftp://localhost/x.png", "no_fetch"),
        ("http://[", "no_fetch"),
        ("/etc/passwd", "no_path"),
        ("file:///etc/passwd", "no_path"),
        ("data:image/png,abc", "invalid_data_url"),
        (base64.b64encode(PICTURE).decode(), "invalid_data_url"),
        ("A/" * 5000, "invalid_data_url"),
        ("data:image/png;base64,%%%", "invalid_base64"),
        ("data:image/png;base64,", "empty_file"),
    ],
)
def test_nothing_is_fetched_and_no_path_opened(strict: Served, url: str, code: str) -> None:
    reply = strict.chat({"type": "image_url", "image_url": url}, text("?"))
    assert (reply.status, reply.error["code"]) == (400, code)


def test_paths_that_are_allowed(tiny_model: granite4v.Model, tmp_path: Path) -> None:
    open_folder, closed = tmp_path / "open", tmp_path / "closed"
    for folder in (open_folder, closed):
        folder.mkdir()
        (folder / "page.png").write_bytes(PICTURE)
    (open_folder / "link.png").symlink_to(closed / "page.png")
    with served(tiny_model, ServerOptions(media_paths=(open_folder,))) as server:

        def status(path: str) -> int:
            return server.chat({"type": "image_url", "image_url": path}, text("?"), max_tokens=1).status

        assert status(f"{open_folder}/page.png") == 200 == status((open_folder / "page.png").as_uri())
        assert status(f"{closed}/page.png") == status(f"{open_folder}/../closed/page.png") == 400
        assert status(f"{open_folder}/link.png") == status(f"{open_folder}/none.png") == 400


def test_a_pipe_that_nobody_writes_to_is_refused(tiny_model: granite4v.Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with served(tiny_model, ServerOptions(media_paths=(tmp_path,))) as server:
        reply = server.chat({"type": "image_url", "image_url": f"{tmp_path}/pipe"}, text("?"))
        assert (reply.status, reply.error["code"]) == (400, "invalid_image")
        assert "image_url' is not a regular file; name one that is." in reply.error["message"]
        server.wait_until_idle()


def test_a_text_that_is_too_long_is_no_fault_of_the_server(tiny: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise any client could fill the log with tracebacks."""
    reply = tiny.post("/tokenize", {"content": "a " * 200_000})
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"
    assert tiny.get("/health").status == 200  # what is logged after a reply is logged by now
    assert not [record for record in caplog.records if record.exc_info]


def test_bodies_that_are_none(strict: Served) -> None:
    for body in (b"", b"{", b"[]", b"\xff", b'{"messages": []}', b"[" * 30_000, b'{"messages": "\\ud800"}'):
        reply = strict.post("/v1/chat/completions", body)
        assert reply.status == 400 and reply.error["type"] == "invalid_request_error"
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert strict.post("/v1/chat/completions", b"{}", Content_Type=kind).status == 415
    with contextlib.closing(strict.connect()) as connection:  # chunked, so its size is not known beforehand
        parts = (b"x" * 10_000 for _ in range(10))
        headers = {"Content-Type": "application/json"}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", "/tokenize", parts, headers, encode_chunked=True)
        with contextlib.suppress(ConnectionResetError):
            assert connection.getresponse().status == 413


def test_a_body_of_very_many_values(tiny: Served) -> None:
    """Parsed, and again as errors, they would take a thousand times the memory of the body."""
    for values in (b"1," * (MAX_VALUES + 1), b"[" * 100 + b"]" * 100 + b",{}" * MAX_VALUES):
        reply = tiny.post("/v1/chat/completions", b'{"messages": [' + values.strip(b",") + b"]}")
        assert (reply.status, reply.error["code"]) == (400, "too_many_values"), reply.body[:200]
    few = b'{"messages": [' + b",".join([b"1"] * 1000) + b"]}"
    assert "(999 more problems)" in tiny.post("/v1/chat/completions", few).error["message"]


def test_the_place_of_a_problem_is_cut(tiny: Served) -> None:
    reply = tiny.post("/v1/responses", {"input": "A", "metadata": {"k" * 100_000: 1}})
    assert reply.status == 400 and reply.error["param"] == "metadata." + "k" * 191 and len(reply.body) < 1000


def test_names_that_no_reply_can_carry(tiny_model: granite4v.Model) -> None:
    """Names of directories may hold any bytes."""
    with served(tiny_model, ServerOptions(model_name="caf\udce9\x1b")) as server:
        for fields in ({}, {"stream": True}):
            reply = server.chat(text("A"), max_tokens=1, **fields)
            assert reply.status == 200 and rb"caf\\xe9\\x1b" in reply.body
        assert server.get("/v1/models").json["data"][0]["id"] == r"caf\xe9\x1b"


def test_numbers_that_json_lacks_are_sent_to_nobody(tiny: Served) -> None:
    """If a schema is given twice, the second is not read, but it is part of the reply."""
    form = b'{"type": "json_schema", "schema": {"type": "object"}, "json_schema": {"schema": {"x": NaN}}}'
    body = b'{"input": "A", "max_output_tokens": 2, "stream": true, "text": {"format": ' + form + b"}}"
    reply = tiny.post("/v1/responses", body)
    assert reply.status == 200 and b'"x": null' in reply.body and b"NaN" not in reply.body


def test_a_penalty_beyond_what_floats_hold(tiny: Served) -> None:
    reply = tiny.chat(text("A"), max_tokens=8, repeat_penalty=1e-300, temperature=1.0, ignore_eos=True)
    assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == 8


def test_other_paths_and_methods(strict: Served) -> None:
    for path, advice in (
        ("/nothing", "expected one of /v1/chat/completions, "),
        ("/chat/completions", "did you mean '/v1/chat/completions'?"),
        ("/v1/chat/completion", "did you mean '/v1/chat/completions'?"),
        ("/models/", "did you mean '/v1/models'?"),
    ):
        reply = strict.get(path)
        assert reply.status == 404 and reply.error["message"].startswith(f"there is no path '{path.rstrip('/')}' here")
        assert advice in reply.error["message"]
    reply = strict.get("/v1/chat/completions")
    assert reply.status == 405 and reply.headers["allow"] == "POST" and reply.error


def test_the_key(tiny_model: granite4v.Model) -> None:
    with served(tiny_model, ServerOptions(api_key="geheim-é")) as server:
        for path in ("/v1/models", "/v1/models/x", "/metrics", "/nothing"):
            for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "geheim"}):
                reply = server.get(path, **sent)
                assert reply.status == 401 and reply.error["type"] == "authentication_error"
                assert reply.headers["www-authenticate"] == "Bearer"
        right = "Bearer geheim-é".encode().decode("latin-1")
        assert server.get("/v1/models", Authorization=right).status == 200
        assert server.get("/health").status == server.get("/").status == 200
        reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "A"}]})
        assert reply.status == 401


def test_hosts(tiny_model: granite4v.Model) -> None:
    """A web page whose host name resolves to this address cannot send requests (DNS rebinding)."""
    with served(tiny_model, ServerOptions(hosts=("127.0.0.1", "::1", "localhost"))) as server:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]", "[::1]:8080"):
            assert server.get("/health", Host=host).status == 200
        for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example"):
            assert server.get("/health", Host=host).status == 421


def test_origins(tiny: Served, tiny_model: granite4v.Model) -> None:
    asked = {"Origin": "https://app.example", "Access_Control_Request_Method": "POST"}

    def preflight(server: Served) -> http.client.HTTPResponse:
        with contextlib.closing(server.connect()) as connection:
            headers = {name.replace("_", "-"): value for name, value in asked.items()}
            connection.request("OPTIONS", "/v1/chat/completions", headers=headers)
            return connection.getresponse()

    assert preflight(tiny).getheader("access-control-allow-origin") is None
    with served(tiny_model, ServerOptions(cors_origins=("https://app.example",))) as server:
        assert preflight(server).getheader("access-control-allow-origin") == "https://app.example"
        asked["Origin"] = "https://other.example"
        assert preflight(server).getheader("access-control-allow-origin") is None


def test_the_queue(tiny_model: granite4v.Model) -> None:
    """A request beyond those that the model answers and the queue holds is refused with a time to retry."""
    limits = Limits(n_waiting=0)
    body = json.dumps({"messages": [{"role": "user", "content": "A"}], "max_tokens": 2000, "seed": 1}).encode()
    with served(tiny_model, ServerOptions(limits=limits)) as server:
        held = [server.connect() for _ in range(tiny_model.n_parallel)]
        for connection in held:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        while server.metrics()["granite4v_requests_in_flight"] < len(held):
            pass
        reply = server.chat(text("B"))
        assert reply.status == 429 and reply.error["code"] == "queue_full"
        assert 1 <= int(reply.headers["retry-after"]) <= 30 and reply.headers["x-should-retry"] == "true"
        for connection in held:
            connection.close()
        server.wait_until_idle()
        assert server.chat(text("B"), max_tokens=1).status == 200


def test_the_time(tiny_model: granite4v.Model) -> None:
    limits = Limits(time_s=0.3)
    with served(tiny_model, ServerOptions(limits=limits)) as server:
        reply = server.chat(text("A"), max_tokens=4000)
        assert reply.status == 504 and reply.error["code"] == "timeout"
        assert reply.headers["x-should-retry"] == "false"
        server.wait_until_idle()


def test_a_model_that_is_loading(tiny_model: granite4v.Model) -> None:
    go_on = threading.Event()

    def load() -> granite4v.Model:
        go_on.wait(20)
        return granite4v.load(tiny_model.files.text.path, mmproj=tiny_model.files.vision.path, device="cpu")

    with served(load) as server:
        for reply in (server.get("/health"), server.get("/v1/models"), server.chat(text("A"))):
            assert reply.status == 503 and reply.error["code"] == "model_loading"
            assert reply.headers["retry-after"] == "2"
        go_on.set()
        while (reply := server.get("/health")).status == 503:
            pass
        assert reply.json == {"status": "ok"}
        assert server.chat(text("A"), max_tokens=1).status == 200


def test_requests_that_are_not_http(tiny: Served) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as connection:
        connection.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        assert b"400" in connection.recv(1000)
    assert tiny.get("/health").status == 200


@pytest.mark.parametrize("sent", [b"", b'{"messages": ['])
def test_a_body_that_stops_is_refused(tiny_model: granite4v.Model, sent: bytes) -> None:
    """The client gets an error and takes no turn; a body that keeps coming, however slowly, is answered."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).encode()
    with served(tiny_model, ServerOptions(stall_s=1.0)) as server:
        with contextlib.closing(server.connect()) as connection:
            _begin(connection, len(body))
            connection.send(sent)
            response = connection.getresponse()
            told = json.loads(response.read())["error"]
        assert (response.status, told["code"], response.getheader("connection")) == (408, "body_timeout", "close")
        assert f"nothing came for 1 s; {len(sent)} bytes had come" in told["message"]
        with contextlib.closing(server.connect()) as connection:
            _begin(connection, len(body))
            for start in range(0, len(body), 10):
                connection.send(body[start : start + 10])
                time.sleep(0.15)
            assert json.loads(connection.getresponse().read())["usage"]["completion_tokens"] == 2
        server.wait_until_idle()


def test_a_body_that_takes_too_long_is_refused(tiny_model: granite4v.Model) -> None:
    """Even if it never stops."""
    with (
        served(tiny_model, ServerOptions(limits=Limits(time_s=0.5))) as server,
        contextlib.closing(server.connect()) as connection,
    ):
        _begin(connection, 1000)
        while not select.select([connection.sock], [], [], 0.05)[0]:
            connection.send(b" ")
        response = connection.getresponse()
        told = json.loads(response.read())["error"]
        assert (response.status, told["code"]) == (408, "body_timeout") and "longer than 0.5 s" in told["message"]


def test_bodies_that_do_not_end_cannot_fill_the_memory(tiny_model: granite4v.Model) -> None:
    """While several bodies of the largest size are pending, others are refused; later they are accepted again."""
    limits = Limits(body_bytes=100_000)
    with served(tiny_model, ServerOptions(limits=limits)) as server, contextlib.ExitStack() as opened:
        for _ in range(N_BODIES):
            connection = opened.enter_context(contextlib.closing(server.connect()))
            _begin(connection, 100_000)
            connection.send(b" " * 99_000)
        asked = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).encode()
        asked += b" " * 20_000
        until = time.monotonic() + 20
        while (reply := server.post(CHAT, asked)).status != 429:
            assert time.monotonic() < until  # some of those bytes are still in flight
        assert reply.error["code"] == "too_busy" and reply.headers["retry-after"] == "5"
        opened.close()
        until = time.monotonic() + 20
        while server.post(CHAT, asked).status != 200:
            assert time.monotonic() < until
        server.wait_until_idle()


def _begin(connection: http.client.HTTPConnection, length: int) -> None:
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(length))
    connection.endheaders()
