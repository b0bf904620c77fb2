"""Tests of answers to JSON schemas that a grammar cannot express in full: the reply says what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.served import Served, events, text

# of two equal items, whatever the model says
TWICE = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
ONCE = {**TWICE, "uniqueItems": False}
WARNING = "'uniqueItems' at '$' is not enforced during generation; the answer is checked against it afterwards."
WRONG = "at '$': [1, 1] has non-unique elements"


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def told(choice: dict[str, Any]) -> tuple[Any, Any]:
    return choice.get("warnings"), choice.get("schema_error")


def test_every_api_says_what_is_wrong_with_an_answer(tiny: Served) -> None:
    flat = {"type": "json_schema", "name": "x", "schema": TWICE}
    chat = tiny.chat(text("A"), response_format=form(TWICE), n=2).json["choices"]
    plain = tiny.post("/v1/completions", {"prompt": "A", "response_format": form(TWICE)}).json["choices"]
    state = tiny.post("/v1/responses", {"input": "A", "text": {"format": flat}}).json
    assert [json.loads(choice["message"]["content"]) for choice in chat] == [[1, 1]] * 2
    assert [told(one) for one in (*chat, *plain, state)] == [([WARNING], WRONG)] * 4
    assert chat[0]["finish_reason"] == plain[0]["finish_reason"] == "stop" and state["status"] == "completed"


def test_streams_say_it_at_their_end(tiny: Served) -> None:
    fields = {"response_format": form(TWICE), "stream": True}
    replies = [tiny.chat(text("A"), n=2, **fields), tiny.post("/v1/completions", {"prompt": "A", **fields})]
    for reply, n in zip(replies, (2, 1), strict=True):
        choices = [choice for event in events(reply.body)[:-1] for choice in event["choices"]]
        ended = [choice for choice in choices if choice["finish_reason"]]
        assert [told(choice) for choice in ended] == [([WARNING], WRONG)] * n
        assert not any("warnings" in choice for choice in choices if choice not in ended)
    body = {"input": "A", "text": {"format": {"type": "json_schema", "schema": TWICE}}, "stream": True}
    assert told(events(tiny.post("/v1/responses", body).body)[-1]["response"]) == ([WARNING], WRONG)


def test_an_answer_that_matches_and_one_without_a_schema(tiny: Served) -> None:
    (matching,) = tiny.chat(text("A"), response_format=form(ONCE)).json["choices"]
    (free,) = tiny.chat(text("A"), max_tokens=2).json["choices"]
    assert (told(matching), told(free)) == (([], None), (None, None))
    read = {**ONCE, "nullable": True}
    (noted,) = tiny.chat(text("A"), response_format=form(read)).json["choices"]
    assert noted["warnings"] == ["'nullable' of OpenAPI is read as \"or null\" at '$'."]


def test_an_answer_that_is_cut_is_no_instance(tiny: Served) -> None:
    (choice,) = tiny.chat(text("A"), response_format=form(ONCE), stop=",").json["choices"]
    assert choice["message"]["content"] == "[1" and choice["schema_error"].startswith("invalid JSON at character 2")


@pytest.mark.parametrize(
    "schema", [{"not": {}}, {"type": "object", "properties": {"a": {"not": True}}, "required": ["a"]}]
)
def test_a_schema_that_allows_nothing_is_refused(tiny: Served, schema: Any) -> None:
    reply = tiny.chat(text("A"), response_format=form(schema))
    assert (reply.status, reply.error["code"]) == (400, "invalid_schema")
    assert reply.error["message"].endswith(". Change the schema, or leave it out.")
