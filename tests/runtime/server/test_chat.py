"""Tests of chat completions over HTTP: the same answers as from the model itself, complete and as a stream."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from PIL import Image

import granite4v
from scripts.nano import formats
from tests.acceptance.pages import draw_page
from tests.helpers.pdfs import pdf_bytes, text_pdf
from tests.helpers.pictures import text_picture
from tests.helpers.served import Served, data_url, events, image, png, served, text

TABLE, FORM = draw_page(0, 0, "table"), draw_page(0, 0, "form")
PAGE, FILLED = png(TABLE.picture), png(FORM.picture)
SCHEMA = formats.form_schema(FORM.truth)
PICTURES = [text_picture((200, 150), seed) for seed in range(3)]


def test_a_table_is_read_right(nano: Served) -> None:
    reply = nano.chat(image(PAGE), text("<tables_html>"))
    choice, usage = reply.json["choices"][0], reply.json["usage"]
    expected = formats.answer_for("<tables_html>", TABLE.truth)
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_answer_is_the_models_own(nano: Served, nano_model: granite4v.Model) -> None:
    reply = nano.chat(image(PAGE), text("<tables_json>"))
    own = nano_model.generate("<tables_json>", [PAGE], constraint=granite4v.grammar_for("tables_json"))
    assert reply.json["choices"][0]["message"]["content"] == own.text
    assert reply.json["usage"]["prompt_tokens"] == own.timings.n_prompt
    assert reply.json["usage"]["completion_tokens"] == len(own.tokens)


def test_a_stream_adds_up_to_the_answer(nano: Served) -> None:
    whole = nano.chat(image(PAGE), text("<tables_html>")).json["choices"][0]["message"]["content"]
    options = {"include_usage": True}
    reply = nano.chat(image(PAGE), text("<tables_html>"), stream=True, stream_options=options)
    *chunks, last, done = events(reply.body)
    assert reply.headers["content-type"].startswith("text/event-stream") and done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 3 and last["choices"] == [] and last["usage"]["completion_tokens"] > 10
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"format": SCHEMA},
    ],
    ids=["strict", "nested", "flat", "llama.cpp", "ollama"],
)
def test_every_way_to_send_a_schema(nano: Served, form: dict[str, object]) -> None:
    """An image without a question gets the prompt for fields that models were trained with."""
    reply = nano.chat(image(FILLED), **form)
    assert reply.json["choices"][0]["message"]["content"] == formats.form_json(FORM.truth)


def test_any_json_object(tiny: Served) -> None:
    for form in ({"response_format": {"type": "json_object"}}, {"format": "json"}):
        reply = tiny.chat(text("Hello"), max_tokens=60, **form)
        choice = reply.json["choices"][0]
        assert isinstance(json.loads(choice["message"]["content"]), dict)
        assert choice["finish_reason"] == "stop"  # closed within its limit


def test_a_table_closed_within_its_limit_is_not_the_whole_answer(nano: Served) -> None:
    """Its last rows are missing; only JSON for `response_format` ends with 'stop' then."""
    asked, n = (image(PAGE), text("<tables_html>")), 30
    (choice,) = nano.chat(*asked, max_tokens=n).json["choices"]
    assert choice["message"]["content"].endswith("</table>")
    assert (choice["finish_reason"], choice["stopped_by"]) == ("length", "closed")
    *_, last = events(nano.chat(*asked, max_tokens=n, stream=True).body)[:-1]
    assert (last["choices"][0]["finish_reason"], last["choices"][0]["stopped_by"]) == ("length", "closed")
    item = {"role": "user", "content": [{"type": "input_image", "image_url": data_url(PAGE)}, asked[1]]}
    body = {"input": [item], "max_output_tokens": n}
    state = nano.post("/v1/responses", body).json
    streamed = events(nano.post("/v1/responses", {**body, "stream": True}).body)[-1]
    assert streamed["type"] == "response.incomplete"
    for reply in (state, streamed["response"]):
        assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert reply["stopped_by"] == "closed"


def test_images_of_every_turn_and_form(tiny: Served, tiny_model: granite4v.Model) -> None:
    first, second, third = map(png, PICTURES)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [image(first), {"type": "input_image", "image_url": data_url(second)}, text("A")]},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": [{"type": "image_url", "image_url": data_url(third)}, text("C")]},
    ]
    reply = tiny.post("/v1/chat/completions", {"messages": messages, "max_tokens": 20})
    own = tiny_model.generate(
        [
            messages[0],
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}, text("A")]},
            messages[2],
            {"role": "user", "content": [{"type": "image"}, text("C")]},
        ],
        PICTURES,
        max_tokens=20,
    )
    assert reply.json["choices"][0]["message"]["content"] == own.text
    details = reply.json["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] == own.timings.n_image > 0


def test_pages_of_a_pdf(tiny: Served) -> None:
    pdf = data_url(pdf_bytes(text_pdf("one", "two", "three")), "application/pdf")

    def n_images(**file: str) -> int:
        part = {"type": "file", "file": {"filename": "x.pdf", "file_data": pdf, **file}}
        reply = tiny.post(
            "/v1/chat/completions/input_tokens", {"messages": [{"role": "user", "content": [part, text("?")]}]}
        )
        assert reply.status == 200, reply.body
        tokens: int = reply.json["image_tokens"]
        return tokens

    one = n_images(pages="2")
    assert one > 0 and n_images(pages="1,3") == 2 * one and n_images() == 3 * one
    bare = pdf.partition(",")[2]
    part = {"type": "input_file", "file_data": bare, "pages": "1"}
    assert tiny.chat(part, text("?"), max_tokens=1).status == 200


def test_the_same_page_again_is_cached(tiny: Served) -> None:
    page = png(text_picture((220, 160), seed=9))
    first = tiny.chat(image(page), text("How much?"), max_tokens=4).json
    again = tiny.chat(image(page), text("How many?"), max_tokens=4).json
    n_image = first["usage"]["prompt_tokens_details"]["image_tokens"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= n_image
    assert again["timings"]["encode_ms"] < first["timings"]["encode_ms"]


def test_clients_that_take_turns_keep_their_pages(tiny_model: granite4v.Model) -> None:
    """A model's context has one sequence until two requests overlap, and would hold only the latest page. So the server
    begins with two overlapping requests, which overlap even if the submitting thread is not scheduled for a while."""
    files = tiny_model.files

    def load() -> granite4v.Model:
        model = granite4v.load(files.text.path, mmproj=files.vision.path, device="cpu", exact=False)
        submit, pauses = model.submit, iter([0.3])

        def submit_and_pause_once(*arguments: Any, **options: Any) -> granite4v.Stream:
            stream = submit(*arguments, **options)
            time.sleep(next(pauses, 0))
            return stream

        model.submit = submit_and_pause_once  # type: ignore[method-assign]
        return model

    with served(load) as server:
        while server.get("/health").status == 503:
            time.sleep(0.02)
        pages = [png(text_picture((200, 150), seed)) for seed in range(3)]
        for asked in ("How much?", "How many?"):
            for page in pages:
                usage = server.chat(image(page), text(asked), max_tokens=2).json["usage"]["prompt_tokens_details"]
                assert (usage["cached_tokens"] >= usage["image_tokens"]) == (asked == "How many?")


def test_sampling_options_have_their_effect(tiny: Served) -> None:
    def answer(**fields: object) -> str:
        reply = tiny.chat(text("Hello"), max_tokens=24, **fields)
        assert reply.status == 200, reply.body
        content: str = reply.json["choices"][0]["message"]["content"]
        return content

    greedy = answer()
    assert answer(temperature=0) == greedy and answer(temperature=5.0, top_k=1, seed=3) == greedy
    warm = {"temperature": 5.0, "seed": 11}
    assert answer(**warm) == answer(**warm) != greedy
    assert answer(**{**warm, "seed": -7}) != answer(**warm)
    stop = greedy[3:6]
    assert answer(stop=stop) == greedy[: greedy.index(stop)] == answer(stop=[stop, "zzzz"])
    assert len(answer(max_completion_tokens=2)) < len(greedy)


def test_several_answers_to_one_request(tiny: Served) -> None:
    fields = {"n": 3, "temperature": 3.0, "seed": 5, "max_tokens": 12}
    choices = tiny.chat(text("Hello"), **fields).json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in choices]
    assert len(set(texts)) == 3
    chunks = events(tiny.chat(text("Hello"), stream=True, **fields).body)[:-1]
    for i in range(3):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == texts[i]


def test_developers_are_the_system(tiny: Served) -> None:
    def prompt_tokens(role: str) -> tuple[int, int]:
        turns = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "A"}]
        chat = tiny.post("/v1/chat/completions", {"messages": turns, "max_tokens": 1}).json["usage"]
        state = tiny.post("/v1/responses", {"input": turns, "max_output_tokens": 1}).json["usage"]
        return chat["prompt_tokens"], state["input_tokens"]

    assert prompt_tokens("developer") == prompt_tokens("system")


def test_variables_reach_the_template(tiny: Served) -> None:
    """They are passed on whatever their names are; those that the template does not use change nothing."""

    def n_tokens(**variables: object) -> int:
        body = {"messages": [{"role": "user", "content": "A"}], "chat_template_kwargs": variables}
        reply = tiny.post("/v1/chat/completions/input_tokens", body)
        assert reply.status == 200 and reply.json["object"] == "response.input_tokens", reply.body
        tokens: int = reply.json["input_tokens"]
        return tokens

    plain = n_tokens()
    assert n_tokens(self="x", images=[], template={}, tokenizer=None, add=1) == plain > 0
    assert n_tokens(add_generation_prompt=False) < plain
    body = {"messages": [{"role": "user", "content": "A"}], "chat_template_kwargs": {"messages": []}}
    assert tiny.post("/v1/chat/completions", body).status == 400


def test_what_docling_sends(nano: Served) -> None:
    """As its API pipeline sends it: an RGBA image in a data URL before the text, and a generous `max_tokens`."""
    picture = TABLE.picture.convert("RGBA")
    body = {
        "model": "granite-vision",
        "messages": [{"role": "user", "content": [image(png(picture)), text("<tables_html>")]}],
        "temperature": 0.0,
        "max_tokens": 4096,
    }
    reply = nano.post("/v1/chat/completions", body).json
    choice = reply["choices"][0]
    assert reply["id"] and reply["created"] > 0 and choice["index"] == 0
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == formats.answer_for("<tables_html>", TABLE.truth)


def test_damaged_and_foreign_images_are_refused(tiny: Served) -> None:
    for content, code in ((b"no image", "invalid_image"), (png(Image.new("RGB", (9, 9)))[:40], "invalid_image")):
        reply = tiny.chat(image(content), text("?"))
        assert reply.status == 400 and reply.error["code"] == code
        assert reply.error["param"] == "messages[0].content[0].image_url"
