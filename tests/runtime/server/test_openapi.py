"""Tests that the served OpenAPI document describes what the server does, and that the page at '/' loads nothing from
elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import granite4v
from granite4v.runtime.server.options import ServerOptions
from tests.acceptance import openapi
from tests.helpers.served import Served, served, text
from tests.toy.spec import PRESETS

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
ASKED: dict[str, Any] = {
    "/v1/chat/completions": HELLO,
    "/v1/chat/completions/input_tokens": HELLO,
    "/v1/responses": {"input": "Hello", "max_output_tokens": 3},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 3},
    "/tokenize": {"content": "Hello", "with_pieces": True},
    "/v1/models": None,
    "/health": None,
}


@pytest.fixture(scope="module")
def document(tiny: Served) -> dict[str, Any]:
    found: dict[str, Any] = tiny.get("/openapi.json").json
    return found


def schema_of(document: dict[str, Any], path: str, status: int) -> dict[str, Any]:
    (operation,) = document["paths"][path].values()
    content = operation["responses"][str(status)]["content"]["application/json"]
    return {**content["schema"], "components": document["components"]}


@pytest.mark.parametrize("path", ASKED)
def test_replies_have_the_documented_schema(tiny: Served, document: dict[str, Any], path: str) -> None:
    body = ASKED[path]
    reply = tiny.get(path) if body is None else tiny.post(path, body)
    assert reply.status == 200, reply.body
    jsonschema.Draft202012Validator(schema_of(document, path, 200)).validate(reply.json)
    if body is not None:
        assert jsonschema.Draft202012Validator.check_schema(document["components"]["schemas"]) is None
        refused = tiny.post(path, {})
        assert refused.status == 400
        jsonschema.Draft202012Validator(schema_of(document, path, 400)).validate(refused.json)


def test_fields_that_replies_have_are_documented(tiny: Served, document: dict[str, Any]) -> None:
    """Validation alone lets undocumented fields pass."""
    reply = tiny.chat(text("Hello"), max_tokens=3).json
    schemas = document["components"]["schemas"]
    assert reply.keys() <= schemas["ChatCompletion"]["properties"].keys()
    assert reply["choices"][0].keys() <= schemas["ChatChoice"]["properties"].keys()
    assert reply["timings"].keys() == schemas["Timings"]["properties"].keys()


def test_a_key_is_documented_where_there_is_one(tiny_model: granite4v.Model, document: dict[str, Any]) -> None:
    assert "securitySchemes" not in document["components"]
    with served(tiny_model, ServerOptions(api_key="x")) as server:
        told = server.get("/openapi.json").json
    assert told["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert "401" in told["paths"]["/tokenize"]["post"]["responses"]
    assert "401" not in told["paths"]["/health"]["get"]["responses"]


def test_the_page(tiny: Served) -> None:
    for path in ("/", "/web/index.html"):
        reply = tiny.get(path)
        assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
        assert reply.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert reply.headers["x-content-type-options"] == "nosniff"
    for path in ("/web/nothing.js", "/web/../app.py", "/web/%2e%2e/app.py"):
        assert tiny.get(path).status == 404


@pytest.mark.slow
def test_the_check_with_schemathesis(make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    status = openapi.main(["--model", str(make_model(PRESETS["tiny"])), "--examples", "2"])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["cases"]
