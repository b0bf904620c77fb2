"""Requests for a server: about synthetic documents, in every form that clients use, and ones that must be refused."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from scripts.nano import formats
from scripts.nano.documents import Document
from scripts.nano.truth import Form
from tests.acceptance.harness import Json
from tests.acceptance.pages import draw_page

TYPE = {"Content-Type": "application/json"}
CHAT, RESPONSES, COMPLETIONS = "/v1/chat/completions", "/v1/responses", "/v1/completions"


def whole_chat(body: bytes) -> str:
    return str(json.loads(body)["choices"][0]["message"]["content"])


@dataclass(frozen=True)
class Question:
    """A request. `text`: extracts the answer from its reply; `status` and `code`: expected for one that must be
    refused."""

    name: str
    path: str
    body: bytes | None
    text: Callable[[bytes], str] = whole_chat
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(TYPE))
    status: int = 200
    code: str = ""


def good_questions(n_documents: int, seed: int) -> list[Question]:
    found = [
        Question("the models", "/v1/models", None, lambda body: str(json.loads(body)["data"][0]["id"]), "GET", {}),
        Question("tokens", "/tokenize", encoded({"content": "a table of 12"}), lambda body: body.decode()),
        Question("text", COMPLETIONS, encoded({"prompt": "The total is", "max_tokens": 20}), whole_completion),
    ]
    for kind in ("table", "chart", "form"):
        for i in range(n_documents):
            document = draw_page(i, seed, kind)
            found += about(document, f"{kind} {i}", ("whole", "stream", "response", "pdf")[i % 4])
    return found


def about(document: Document, name: str, manner: str) -> list[Question]:
    """Returns a request about a document, and the same in another form."""
    if isinstance(document.truth, Form):
        schema = formats.form_schema(document.truth)
        asked, form = formats.kvp_prompt(schema), {"type": "json_schema", "json_schema": {"schema": schema}}
    else:
        asked, form = ("<chart2csv>" if document.kind == "chart" else "<tables_html>"), {"type": "text"}
    url = data_url(document.picture, "PNG")
    page = {"type": "image_url", "image_url": {"url": url}}
    text = {"type": "text", "text": asked}
    messages = [{"role": "user", "content": [page, text]}]
    body: Json = {"messages": messages, "response_format": form, "max_tokens": 300}
    found = [Question(f"{name} whole", CHAT, encoded(body))]
    if manner == "stream":
        found.append(Question(f"{name} stream", CHAT, encoded({**body, "stream": True}), streamed_chat))
    elif manner == "response":
        parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": asked}]
        item = {"role": "user", "content": parts}
        other = {"input": [item], "text": {"format": form}, "max_output_tokens": 300, "stream": True}
        found.append(Question(f"{name} response", RESPONSES, encoded(other), streamed_response))
    elif manner == "pdf":
        file = {"filename": "page.pdf", "file_data": data_url(document.picture, "PDF")}
        message = {"role": "user", "content": [{"type": "file", "file": file}, text]}
        found.append(Question(f"{name} pdf", CHAT, encoded({**body, "messages": [message], "max_tokens": 100})))
    return found


def bad_questions() -> list[Question]:
    picture = data_url(Image.new("RGB", (30, 20)), "PNG")
    page = {"type": "image_url", "image_url": picture}
    damaged = {"type": "image_url", "image_url": picture[:60]}
    bomb = {"type": "file", "file": {"file_data": base64.b64encode(b"%PDF-1.7 and nothing more").decode()}}
    no_schema = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    words = [{"role": "user", "content": "Hello"}]
    cases: list[tuple[str, Any, int, str]] = [
        ("no JSON", b"{", 400, "json_invalid"),
        ("no messages", {"messages": []}, 400, "too_short"),
        ("an unknown role", {"messages": [{"role": "robot", "content": "A"}]}, 400, "literal_error"),
        ("too long", {"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context_length_exceeded"),
        ("many answers", {"messages": words, "n": 99}, 400, "too_many"),
        ("a temperature", {"messages": words, "temperature": -1}, 400, "greater_than_equal"),
        ("a schema", {"messages": words, "format": no_schema}, 400, "invalid_schema"),
        ("tools", {"messages": words, "tools": [{"type": "function"}]}, 400, "unsupported"),
        ("many images", with_parts([page] * 4), 400, "too_many_images"),
        ("a damaged image", with_parts([damaged]), 400, "invalid_"),
        ("a damaged PDF", with_parts([bomb]), 400, "invalid_document"),
        ("a URL", with_parts([{"type": "image_url", "image_url": "http://localhost/a.png"}]), 400, "no_fetch"),
        ("a path", with_parts([{"type": "image_url", "image_url": "/etc/passwd"}]), 400, "no_path"),
        ("a placeholder", {"messages": [{"role": "user", "content": "<image>"}]}, 400, "invalid_prompt"),
    ]
    found = [
        Question(name, CHAT, body if isinstance(body, bytes) else encoded(body), status=status, code=code)
        for name, body, status, code in cases
    ]
    found.append(Question("another type", CHAT, b"{}", headers={"Content-Type": "text/plain"}, status=415, code="JSON"))
    found.append(Question("another path", "/v1/nothing", b"{}", status=404, code="error"))
    found.append(Question("another method", CHAT, None, method="GET", headers={}, status=405, code="error"))
    found.append(
        Question("another host", "/health", None, method="GET", headers={"Host": "a.b"}, status=421, code="host")
    )
    return found


def with_parts(parts: list[Json]) -> Json:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]}


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def data_url(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    media = "image/png" if kind == "PNG" else "application/pdf"
    return f"data:{media};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def whole_completion(body: bytes) -> str:
    return str(json.loads(body)["choices"][0]["text"])


def events(body: bytes) -> list[Json]:
    lines = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def streamed_chat(body: bytes) -> str:
    """Returns the text of a stream; empty for an incomplete one."""
    if not body.endswith(b"data: [DONE]\n\n"):
        return ""
    return "".join(one["choices"][0]["delta"].get("content", "") for one in events(body) if one.get("choices"))


def streamed_response(body: bytes) -> str:
    found = events(body)
    if found[-1]["type"] not in ("response.completed", "response.incomplete"):
        return ""
    return "".join(one["delta"] for one in found if one["type"] == "response.output_text.delta")
