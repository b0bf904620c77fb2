"""Tests of fields that other servers have: those that would change the answer there are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.served import Served, text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("name", "value", "harmless", "advice"),
    [
        ("grammar", 'root ::= "a"', "", "'response_format'"),
        ("json_schema", {}, None, "'response_format'"),
        ("guided_json", {"type": "object"}, None, "'response_format'"),
        ("guided_regex", "a+", None, "'response_format'"),
        ("guided_choice", ["a"], None, "'response_format'"),
        ("guided_grammar", "root", None, "'response_format'"),
        ("structured_outputs", {"choice": ["a"]}, None, "'response_format'"),
        ("repetition_penalty", 1.1, 1.0, "'repeat_penalty'"),
        ("best_of", 2, 1, "'n'"),
    ],
)
def test_fields_of_other_servers(tiny: Served, path: str, name: str, value: Any, harmless: Any, advice: str) -> None:
    asked = {"messages": [{"role": "user", "content": "A"}], "prompt": "A", "input": "A"}
    asked |= {"max_output_tokens" if "responses" in path else "max_tokens": 1}
    reply = tiny.post(path, {**asked, name: value})
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "unsupported", name)
    assert advice in reply.error["message"]
    assert {tiny.post(path, {**asked, name: one}).status for one in (None, harmless)} == {200}


def test_tools_that_cannot_be_called_are_ignored(tiny: Served) -> None:
    for tools, choice, status in (([], None, 200), ([{}], "none", 200), ([{}], "auto", 400), ([{}], None, 400)):
        fields = {"tools": tools, "tool_choice": choice}
        assert tiny.chat(text("A"), max_tokens=1, **fields).status == status
        assert tiny.post("/v1/responses", {"input": "A", "max_output_tokens": 1, **fields}).status == status
