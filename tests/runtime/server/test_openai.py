"""Tests of the server with OpenAI's own client: chat, responses, completions, streams and parsed answers."""

from __future__ import annotations

import openai
import pydantic
import pytest

import granite4v
from scripts.nano import formats
from tests.acceptance.pages import draw_page
from tests.helpers.served import Served, data_url, png

TABLE, FORM = draw_page(0, 0, "table"), draw_page(0, 0, "form")
PAGE, FILLED = ({"type": "image_url", "image_url": {"url": data_url(png(one.picture))}} for one in (TABLE, FORM))
FIELDS = dict(FORM.truth.fields)
Fields = pydantic.create_model("Fields", **dict.fromkeys(FIELDS, (str | None, ...)))


@pytest.fixture(scope="module")
def client(nano: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0)


def test_chat_and_its_stream(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": [PAGE, {"type": "text", "text": "<tables_json>"}]}]
    whole = client.chat.completions.create(model="nano", messages=messages)
    assert whole.choices[0].finish_reason == "stop" and whole.usage.total_tokens > 100
    stream = client.chat.completions.create(model="nano", messages=messages, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 3
    with client.chat.completions.stream(model="nano", messages=messages) as events:
        final = events.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_parsed_answers(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": [FILLED]}]
    parsed = client.chat.completions.parse(model="nano", messages=messages, response_format=Fields)
    value = parsed.choices[0].message.parsed
    assert value.model_dump() == FIELDS
    item = {
        "role": "user",
        "content": [{"type": "input_image", "image_url": FILLED["image_url"]["url"], "detail": "auto"}],
    }
    answer = client.responses.parse(model="nano", input=[item], text_format=Fields)
    assert answer.output_parsed == value


def test_an_answer_closed_within_its_limit_is_parsed(client: openai.OpenAI) -> None:
    """`parse` would raise for 'length', even if the JSON is complete."""
    messages = [{"role": "user", "content": [FILLED]}]
    whole = client.chat.completions.parse(model="nano", messages=messages, response_format=Fields)
    n = whole.usage.completion_tokens - 2
    parsed = client.chat.completions.parse(model="nano", messages=messages, response_format=Fields, max_tokens=n)
    assert isinstance(parsed.choices[0].message.parsed, Fields)
    assert parsed.usage.completion_tokens <= n and parsed.choices[0].message.parsed.model_dump() != FIELDS


def test_responses_and_their_events(client: openai.OpenAI) -> None:
    item = {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": PAGE["image_url"]["url"], "detail": "auto"},
            {"type": "input_text", "text": "<tables_html>"},
        ],
    }
    whole = client.responses.create(model="nano", input=[item])
    assert whole.status == "completed" and whole.output_text == formats.answer_for("<tables_html>", TABLE.truth)
    assert whole.usage.output_tokens > 10 and whole.usage.input_tokens_details.cached_tokens >= 0
    events = list(client.responses.create(model="nano", input=[item], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text
    with client.responses.stream(model="nano", input=[item]) as stream:
        assert stream.get_final_response().output_text == whole.output_text
    cut = client.responses.create(model="nano", input=[item], max_output_tokens=9, extra_body={"unconstrained": True})
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_a_conversation_that_the_client_keeps(client: openai.OpenAI, nano_model: granite4v.Model) -> None:
    first = client.responses.create(model="nano", input="Hello", instructions="Be short.", max_output_tokens=8)
    items = [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in first.output)]
    items.append({"role": "user", "content": "And?"})
    second = client.responses.create(model="nano", input=items, instructions="Be short.", max_output_tokens=8)
    own = nano_model.generate(
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And?"},
        ],
        max_tokens=8,
    )
    assert second.output_text == own.text
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="nano", input="And?", previous_response_id=first.id)


def test_completions(client: openai.OpenAI, nano_model: granite4v.Model) -> None:
    whole = client.completions.create(model="nano", prompt="The total is", max_tokens=8)
    prepared = nano_model.prompts.plain("The total is")
    assert whole.choices[0].text == nano_model.generate(prepared, max_tokens=8).text
    stream = client.completions.create(model="nano", prompt="The total is", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    tokens = list(prepared.text_tokens)
    assert client.completions.create(model="nano", prompt=tokens, max_tokens=8).choices[0].text == whole.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("gpt-9")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "word " * 30_000}])
    assert caught.value.code == "context_length_exceeded"
