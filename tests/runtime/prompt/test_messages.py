"""Tests of messages: all forms that people write become the one that the template gets, with the images in order."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from granite4v.clip_projector import load_video
from granite4v.errors import PromptError
from granite4v.runtime.prompt.messages import VideoOf, normalize

IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_text_is_one_user_turn_with_the_images_first() -> None:
    conversation = normalize("what?", ["a.png", "b.png"])
    assert conversation.messages == [user(IMAGE, IMAGE, text("what?"))]
    assert conversation.images == ["a.png", "b.png"]


def test_a_video_is_one_wherever_its_placeholder_is_written() -> None:
    video = load_video([Image.new("RGB", (8, 8))] * 2)
    for prompt in ("<video> what?", [{"role": "user", "content": "<video> what?"}]):
        conversation = normalize(prompt, [video], placeholder="<video>")
        assert conversation.images == [VideoOf(video)]


def test_developers_are_the_system() -> None:
    """OpenAI's newer name of the role, which templates would render as an unknown one."""
    (message,) = normalize([{"role": "developer", "content": "Be brief."}]).messages
    assert message == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}


def test_string_content_becomes_a_text_part() -> None:
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}]
    assert normalize(messages).messages == [{"role": "system", "content": [text("brief")]}, user(text("hi"))]


DEEP: Any = []
for _ in range(10_000):
    DEEP = [DEEP]
PNG = b"\x89PNG"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    ("part", "picture"),
    [
        ({"type": "image", "image": "a.png"}, Path("a.png")),
        ({"type": "image", "path": "a.png"}, Path("a.png")),
        ({"type": "image", "url": "file:///tmp/a%20b.png"}, Path("/tmp/a b.png")),
        ({"type": "image", "base64": base64.b64encode(PNG).decode()}, PNG),
        ({"type": "image", "image": PNG}, PNG),
        ({"type": "image_url", "image_url": {"url": DATA_URL}}, PNG),
        ({"type": "image_url", "image_url": DATA_URL}, PNG),
        ({"type": "input_image", "image_url": DATA_URL}, PNG),
    ],
)
def test_an_image_part_carries_its_picture(part: dict[str, Any], picture: Any) -> None:
    conversation = normalize([user(part, {"type": "input_text", "text": "what?"})])
    assert conversation.messages == [user(IMAGE, text("what?"))]
    assert conversation.images == [picture]


def test_parts_without_a_picture_take_the_given_ones_in_order() -> None:
    messages = [user(IMAGE, text("one")), user({"type": "image", "image": "own.png"}, IMAGE)]
    assert normalize(messages, ["first", "second"]).images == ["first", Path("own.png"), "second"]


def test_other_fields_are_kept_as_plain_data() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert normalize([user(text("x")), message]).messages[1] == {**message, "content": []}


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([], [], "neither text nor a list of messages"),
        (["hi"], [], "expected a mapping with 'role' and 'content'"),
        ([{"role": "wizard", "content": "hi"}], [], "role 'wizard'; known: system, user, assistant"),
        ([{"role": "user"}], [], "expected text or a list of parts"),
        ([user({"type": "audio"})], [], "message 1 has a content part"),
        ([user(text("x"))], ["a.png"], "have 0 image parts without an image of their own, but 1 image"),
        ([user(IMAGE)], [], "have 1 image part without an image of their own, but 0 images"),
        ([user({"type": "image", "url": "https://x.org/a.png"})], [], "works offline and fetches nothing"),
        ([user({"type": "image", "url": "data:image/png,abc"})], [], "not base64"),
        ([user({"type": "image", "base64": "%%%"})], [], "invalid base64 data"),
        ([{"role": "user", "content": "x", "extra": object()}], [], "only JSON values can be rendered"),
        ([{"role": 5, "content": "hi"}], [], "expected a mapping with 'role' and 'content'"),
        ([{"role": "user", "content": None}], [], "has content None; expected text or a list of parts"),
        ([{"role": "user", "content": 5}], [], "has content 5"),
        ([user([text("x")])], [], "message 1 has a content part \\["),
        ([user(None)], [], "message 1 has a content part None"),
        ([user({"type": ["text"]})], [], "message 1 has a content part"),
        ([user({"type": "text", "text": 5})], [], "message 1 has a content part"),
        ([user({"type": "image", "url": "http://["})], [], "works offline and fetches nothing"),
        ([{"role": "user", "content": "x", "extra": DEEP}], [], "nests values more than 64 deep"),
        (5, [], "neither text nor a list of messages"),
    ],
)
def test_what_cannot_be_rendered_is_said(prompt: Any, images: list[str], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        normalize(prompt, images)
