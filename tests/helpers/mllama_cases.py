"""Conversations with images for cross-attention decoders: alone, after text, adjacent, in several turns, in chunks."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from granite4v.runtime.prompt.spans import ImageSpan, Prompt
from tests.helpers.pictures import noise_picture

PICTURES = [noise_picture((110, 100)), noise_picture((160, 40))]  # four tiles, and three
LONG = "Read this. " * 120  # more than one batch
IMAGE = {"type": "image"}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


CASES: dict[str, list[dict[str, Any]]] = {
    "one": [user(IMAGE, text("What is this?"))],
    "behind text": [user(text("Look at "), IMAGE, text(" and tell."))],
    "two": [user(IMAGE, text(" and "), IMAGE, text(" differ?"))],
    "adjacent": [user(IMAGE, IMAGE, text("Which?"))],
    "two turns": [
        user(IMAGE, text("One?")),
        {"role": "assistant", "content": [text("Yes.")]},
        user(IMAGE, text("Two?")),
    ],
    "text": [user(text("What is this?"))],
    "in chunks": [user(text(LONG), IMAGE, text(LONG))],
}


def pictures_of(messages: list[dict[str, Any]]) -> list[Image]:
    return PICTURES[: sum(part["type"] == "image" for message in messages for part in message["content"])]


def ids_of(prompt: Prompt, image_token: int) -> list[int]:
    """Returns the token ids in the form that transformers takes."""
    return [t for span in prompt.spans for t in ([image_token] if isinstance(span, ImageSpan) else span.tokens)]
