"""Tests of log-probabilities and confidences over HTTP: those of the model, in each API's own form."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

import granite4v
from scripts.nano import formats
from tests.acceptance.pages import draw_page
from tests.helpers.served import Served, data_url, events, image, png, text

TABLE, FORM = draw_page(0, 0, "table"), draw_page(0, 0, "form")
PAGE, FILLED = png(TABLE.picture), png(FORM.picture)
SCHEMA = formats.form_schema(FORM.truth)
PROMPT = formats.kvp_prompt(SCHEMA)


@pytest.fixture(scope="module")
def own(nano_model: granite4v.Model) -> granite4v.Answer:
    return nano_model.generate("Hello", max_tokens=12, logprobs=3, ignore_eos=True)


def test_every_token_of_a_chat(nano: Served, nano_model: granite4v.Model, own: granite4v.Answer) -> None:
    reply = nano.chat(text("Hello"), max_tokens=12, logprobs=True, top_logprobs=3, ignore_eos=True)
    found = reply.json["choices"][0]["logprobs"]["content"]
    assert own.logprobs is not None and len(found) == len(own.tokens) == 12
    for one, expected in zip(found, own.logprobs, strict=True):
        assert one["token"] == expected.text and bytes(one["bytes"]) == expected.utf8
        assert one["logprob"] == pytest.approx(expected.logprob, abs=1e-3)
        tops = [(nano_model.token_bytes(token), logprob) for token, logprob in expected.top]
        assert [bytes(top["bytes"]) for top in one["top_logprobs"]] == [utf8 for utf8, _ in tops]
    whole = b"".join(bytes(one["bytes"]) for one in found).decode()
    assert whole.replace("<|end_of_text|>", "") == reply.json["choices"][0]["message"]["content"]


def test_a_stream_has_each_token_once(nano: Served) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "logprobs": True, "top_logprobs": 1, "ignore_eos": True}
    whole = nano.chat(text("Hello"), **fields).json["choices"][0]["logprobs"]["content"]
    chunks = events(nano.chat(text("Hello"), stream=True, **fields).body)[:-1]
    shown = [chunk["choices"][0].get("logprobs") for chunk in chunks]
    tokens = [token["token"] for one in shown if one for token in one["content"]]
    assert tokens == [token["token"] for token in whole]


def test_none_without_being_asked(nano: Served) -> None:
    choice = nano.chat(text("Hello"), max_tokens=3).json["choices"][0]
    assert choice["logprobs"] is None and choice["confidence"] is None


def test_fields_and_cells_have_their_confidence(nano: Served, nano_model: granite4v.Model) -> None:
    grammar = granite4v.grammar_for("kvp", SCHEMA)
    form = nano_model.generate(PROMPT, [FILLED], constraint=grammar, logprobs=0)
    expected = granite4v.confidence(form, "kvp")
    found = nano.chat(image(FILLED), format=SCHEMA).json["choices"][0]["confidence"]
    assert found.keys() == expected.keys() == {f"/{name}" for name, _ in FORM.truth.fields}
    for name, one in found.items():
        assert 0 < one["least"] <= one["mean"] <= 1
        assert one["mean"] == pytest.approx(expected[name].mean, abs=1e-3)
    cells = nano.chat(image(PAGE), text("<tables_html>")).json["choices"][0]["confidence"]
    assert cells.keys() == {f"0/{cell.row}/{cell.col}" for cell in TABLE.truth.cells}
    off = nano.chat(image(PAGE), text("<tables_html>"), confidence=False).json["choices"][0]
    assert off["confidence"] is None and off["logprobs"] is None
    last = events(nano.chat(image(PAGE), text("<tables_html>"), stream=True).body)[-2]
    assert last["choices"][0]["confidence"].keys() == cells.keys()


def test_responses(nano: Served, own: granite4v.Answer) -> None:
    client = openai.OpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0)
    include = ["message.output_text.logprobs"]
    asked = {"model": "nano", "input": "Hello", "max_output_tokens": 12, "extra_body": {"ignore_eos": True}}
    reply = client.responses.create(**asked, top_logprobs=2, include=include)
    shown = reply.output[0].content[0].logprobs
    assert own.logprobs is not None
    assert [one.token for one in shown] == [one.text for one in own.logprobs]
    assert all(len(one.top_logprobs) == 2 for one in shown)
    parts = [{"type": "input_image", "image_url": data_url(FILLED), "detail": "auto"}]
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    structured = client.responses.create(model="nano", input=[{"role": "user", "content": parts}], text=form)
    assert structured.confidence.keys() == {f"/{name}" for name, _ in FORM.truth.fields}


def test_completions(nano: Served, nano_model: granite4v.Model) -> None:
    body = {"prompt": "The total is", "max_tokens": 8, "logprobs": 2}
    reply = nano.post("/v1/completions", body).json["choices"][0]
    shown = reply["logprobs"]
    prompt = nano_model.prompts.plain("The total is")
    own = nano_model.generate(prompt, max_tokens=8, logprobs=2)
    assert own.logprobs is not None and shown["tokens"] == [one.text for one in own.logprobs]
    assert all(math.exp(logprob) <= 1 for logprob in shown["token_logprobs"])
    for token, offset in zip(shown["tokens"], shown["text_offset"], strict=True):
        assert reply["text"][offset:].startswith(token)
    chunks = events(nano.post("/v1/completions", {**body, "stream": True}).body)[:-1]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for one in streamed for value in one[name]] == pytest.approx(shown[name])
