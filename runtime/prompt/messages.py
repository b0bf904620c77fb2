"""Converts chat messages as callers write them to the one form that templates render faithfully; collects their images.

Accepts a string, or messages in the content-part form of OpenAI's and Hugging Face's APIs. Knows nothing about
templates, tokens or models, and never fetches anything from a network.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlparse

from granite4v import clip_projector
from granite4v.errors import PromptError

Message: TypeAlias = "Mapping[str, Any]"
Prompt: TypeAlias = "str | Sequence[Message]"

MAX_DEPTH = 64  # of nested values outside the content, such as the arguments of a tool call
ROLES = ("system", "user", "assistant", "tool", "developer")
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_VIDEO_TYPES = ("video", "video_url", "input_video")
_VIDEO_KEYS = ("video", "video_url", "url", "path", "base64")
_A = {"image": "an image", "video": "a video"}
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")


@dataclass(frozen=True)
class VideoOf:
    """A video as `clip_projector.load_video` takes it; None for a part without a video of its own."""

    source: Any


@dataclass(frozen=True)
class Conversation:
    """Messages of plain data (`content` is a list of text, image and video parts), and the images in reading order.

    `images` holds what `clip_projector.load_image` takes, one for each image part or written placeholder, and for each
    video part a `VideoOf`.
    """

    messages: list[dict[str, Any]]
    images: list[Any]


def normalize(prompt: Prompt, images: Sequence[Any] = (), placeholder: str | None = None) -> Conversation:
    """Converts a prompt to a conversation.

    A string is one user turn: the images first, then the text. In a list of messages, an image part may carry
    its own image (a path, a data URL, bytes, a Pillow image); parts without one take `images` in order.
    Content given as a string becomes one text part: templates treat the two forms differently.

    `placeholder`: the text of the model's image token ('<image>'). A caller may place the images by writing it: a
    string with as many placeholders as there are images gets no image parts, and in messages without image parts
    each placeholder takes one of `images`.

    Raises PromptError for messages of another form, and when the numbers of images and image parts differ.
    """
    given = [VideoOf(item) if isinstance(item, clip_projector.Video) else item for item in images]
    if isinstance(prompt, str):
        written = bool(placeholder) and bool(images) and prompt.count(str(placeholder)) == len(images)
        kinds = ("video" if isinstance(item, VideoOf) else "image" for item in given)
        parts: list[dict[str, Any]] = [] if written else [{"type": kind} for kind in kinds]
        return Conversation([{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}], given)
    if not isinstance(prompt, Sequence) or not prompt:
        raise PromptError(
            "the prompt is neither text nor a list of messages; expected messages such as {'role': 'user', 'content': "
            "...}."
        )
    found: list[Any] = []
    messages = [_message(message, number, found) for number, message in enumerate(prompt, 1)]
    if placeholder and not found and images and _count(messages, placeholder) == len(images):
        return Conversation(messages, given)
    return Conversation(messages, _match(found, images))


def _count(messages: Sequence[Mapping[str, Any]], placeholder: str) -> int:
    """The number of placeholders written in the text of user messages."""
    parts = [part for message in messages if message["role"] == "user" for part in message["content"]]
    return sum(part["text"].count(placeholder) for part in parts if part["type"] == "text")


def _match(found: list[Any], images: Sequence[Any]) -> list[Any]:
    """The images of all image parts. In `found`, `None` marks a part that takes one of `images`, and `VideoOf(None)` a
    part that takes a video."""
    waiting = sum(image is None or (isinstance(image, VideoOf) and image.source is None) for image in found)
    if waiting != len(images):
        raise PromptError(
            f"the messages have {counted(waiting, 'image part')} without an image of their own, but "
            f"{counted(len(images), 'image')} came with them; add or remove {{'type': 'image'}} parts, one where each "
            "image belongs."
        )
    given = iter(images)
    return [_given(image, given) for image in found]


def _given(image: Any, given: Iterator[Any]) -> Any:
    """The image or video of a part: its own, or the next of those that came with the messages."""
    if isinstance(image, VideoOf):
        return image if image.source is not None else VideoOf(next(given))
    if image is not None:
        return image
    image = next(given)
    if isinstance(image, clip_projector.Video):
        raise PromptError("a video came where the messages have an image part; expected a {'type': 'video'} part.")
    return image


def counted(n: int, noun: str) -> str:
    """'1 image', '2 images'."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _message(message: Any, number: int, found: list[Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f"message {number} is {_shown(message)}; expected a mapping with 'role' and 'content'.")
    if message["role"] not in ROLES:
        raise PromptError(f"message {number} has role {_shown(message['role'])}; known: {', '.join(ROLES)}.")
    content = message.get("content")
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}] if content else []
    elif content is None and message.get("tool_calls"):
        parts = []
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        parts = [_part(part, number, found) for part in content]
    else:
        raise PromptError(f"message {number} has content {_shown(content)}; expected text or a list of parts.")
    others = {str(key): _plain(value) for key, value in message.items() if key not in ("role", "content")}
    # OpenAI's newer name; templates would render it as a role that the models do not know
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, **others, "content": parts}


def _part(part: Any, number: int, found: list[Any]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT_TYPES and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in _IMAGE_TYPES:
        found.append(_source_of(part, _IMAGE_KEYS, "image", number))
        return {"type": "image"}
    if kind in _VIDEO_TYPES:
        found.append(VideoOf(_source_of(part, _VIDEO_KEYS, "video", number)))
        return {"type": "video"}
    raise PromptError(
        f"message {number} has a content part {_shown(part)}; expected {{'type': 'text', 'text': ...}} or "
        "{'type': 'image', ...}."
    )


def _source_of(part: Mapping[str, Any], names: Sequence[str], kind: str, number: int) -> Any:
    """The image or video that a part has under one of `names`, as `load_image` or `load_video` takes it; None for a
    part without one."""
    key = next((key for key in names if part.get(key) is not None), "")
    value: Any = part.get(key)
    if isinstance(value, Mapping):  # OpenAI: {"type": "image_url", "image_url": {"url": ...}}
        value = value.get("url")
    if not isinstance(value, str):
        return value
    if key == "base64":
        return _decode(value, kind, number)
    try:
        scheme = urlparse(value).scheme.lower()
    except ValueError:  # 'http://[', which may also be a path
        scheme = value.partition(":")[0].lower() if "://" in value else ""
    if scheme == "data":
        head, _, data = value.partition(",")
        if not head.endswith(";base64"):
            raise PromptError(
                f"message {number} has a data URL that is not base64; expected 'data:{kind}/...;base64,...'."
            )
        return _decode(data, kind, number)
    if scheme in ("http", "https", "ftp"):
        raise PromptError(
            f"message {number} has {_A[kind]} at '{value:.80}'; granite4v works offline and fetches nothing. "
            "Give a local path or a data URL."
        )
    return Path(unquote(urlparse(value).path, errors="surrogateescape")) if scheme == "file" else Path(value)


def _decode(data: str, kind: str, number: int) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise PromptError(
            f"message {number} has {_A[kind]} with invalid base64 data; encode the file's bytes again."
        ) from None


def _shown(value: Any) -> str:
    """The beginning of a value, for an error message; even its repr() may raise."""
    try:
        return f"{value!r:.80}"
    except Exception:
        return f"a {type(value).__name__}"


def _plain(value: Any, depth: int = 0) -> Any:
    """Reduces a value to JSON types: a template is code from an untrusted file and must not get live objects."""
    if depth > MAX_DEPTH:
        raise PromptError(f"a message nests values more than {MAX_DEPTH} deep, which is the limit; flatten them.")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, depth + 1) for item in value]
    raise PromptError(f"a message holds a {type(value).__name__}; besides images, only JSON values can be rendered.")
