"""Turns the content parts of a request into messages: texts, and images, documents and videos to be opened later.

Only base64 is decoded here; no file is opened and nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from granite4v.runtime.documents import PageRanges, SelectionError, parse_pages
from granite4v.runtime.server.errors import invalid
from granite4v.runtime.server.requests import (
    Content,
    FileContent,
    ImagePart,
    InputFilePart,
    Message,
    Part,
    TextPart,
    VideoFields,
    VideoPart,
    VideoUrlPart,
)

_PATH_MAX = 4096  # characters; realpath takes very long for millions
_HEADS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0AK", "JVBERi", "Qk0")  # files' first bytes in base64
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=\s]")
_JPEGS = "data:video/jpeg;base64,"  # followed by frames, as vLLM takes them


@dataclass(frozen=True)
class VideoChoice:
    """Which frames of a video to take (`frames` and `fps` as in `load_video`), or the images `given` as its frames."""

    frames: int | None = None
    fps: float | None = None
    given: tuple[Attachment, ...] = ()


@dataclass(frozen=True, eq=False)
class Attachment:
    """An image, a document of any number of pages (`is_document`), or a video (`video`); as file content or by path.

    `param`: the place of the attachment in the request. `name`: its name in error messages.
    """

    param: str
    name: str
    content: bytes | None = None
    path: Path | None = None
    is_document: bool = False
    pages: PageRanges | None = None
    password: str | None = None
    video: VideoChoice | None = None


@dataclass(frozen=True)
class Turn:
    """One message: its role, other fields, and its content in order."""

    role: str
    others: dict[str, Any]
    parts: list[str | Attachment]

    @property
    def text(self) -> str:
        """The text parts, joined with newlines."""
        return "\n".join(part for part in self.parts if isinstance(part, str))


class ContentReader:
    """Reads the content of messages. `media_paths`: directories whose files clients may name."""

    def __init__(self, media_paths: Sequence[Path] = ()) -> None:
        self._roots = [path.resolve() for path in media_paths]

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        turns = []
        for i, message in enumerate(messages):
            others = {"name": message.name, "tool_calls": message.tool_calls, "tool_call_id": message.tool_call_id}
            given = {key: value for key, value in others.items() if value is not None}
            turns.append(Turn(message.role, given, self.parts(message.content, f"messages[{i}].content")))
        return turns

    def parts(self, content: Content | None, param: str) -> list[str | Attachment]:
        """Converts the content of one message at `param`. Raises ApiError."""
        if content is None:
            return []
        if isinstance(content, str):
            return [content] if content else []
        return [self._part(part, f"{param}[{i}]") for i, part in enumerate(content)]

    def _part(self, part: Part, param: str) -> str | Attachment:
        if isinstance(part, TextPart):
            return part.text
        if isinstance(part, ImagePart):
            url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            return self._image(url, f"{param}.image_url")
        if isinstance(part, VideoUrlPart):
            url = part.video_url if isinstance(part.video_url, str) else part.video_url.url
            return self._video(url, part, f"{param}.video_url")
        if isinstance(part, VideoPart):
            return self._video(part.video, part, f"{param}.video")
        if isinstance(part, InputFilePart):
            return self._file(part, f"{param}.file_data")
        return self._file(part.file, f"{param}.file.file_data")

    def _image(self, url: str, param: str) -> Attachment:
        name = f"the image at '{param}'"
        if url[:5].lower() == "data:":
            return Attachment(param, name, content=_data(url, param))
        return Attachment(param, name, path=self._path(url, param))

    def _video(self, source: str | list[str], part: VideoFields, param: str) -> Attachment:
        if part.frames is not None and part.fps is not None:
            raise invalid("'frames' and 'fps' are both given; send one of them.", param, "invalid_sampling")
        name = f"the video at '{param}'"
        if isinstance(source, str) and source[: len(_JPEGS)].lower() == _JPEGS:
            source = [f"data:image/jpeg;base64,{frame}" for frame in source[len(_JPEGS) :].split(",")]
        if not isinstance(source, str):
            given = tuple(self._image(url, f"{param}[{i}]") for i, url in enumerate(source))
            return Attachment(param, name, video=VideoChoice(given=given))
        choice = VideoChoice(part.frames, part.fps)
        if source[:5].lower() == "data:":
            return Attachment(param, name, content=_data(source, param, "video/mp4"), video=choice)
        return Attachment(param, name, path=self._path(source, param, "video", "video/mp4"), video=choice)

    def _file(self, file: FileContent, param: str) -> Attachment:
        name = f"the document at '{param}'" if not file.filename else f"'{file.filename:.80}'"
        ranges = None
        if file.pages is not None:
            try:
                ranges = parse_pages(file.pages)
            except SelectionError as error:
                raise invalid(str(error), param.replace("file_data", "pages"), "invalid_pages") from None
        if file.password is not None and "\0" in file.password:
            raise invalid("the password holds a zero byte, which a password cannot contain.", param)
        data = file.file_data
        content = _data(data, param) if data[:5].lower() == "data:" else _decoded(data, param)
        return Attachment(param, name, content=content, is_document=True, pages=ranges, password=file.password)

    def _path(self, url: str, param: str, what: str = "image", kind: str = "image/png") -> Path:
        """The path of a file inside one of the allowed directories. Raises ApiError for everything else."""
        advice = f"send the {what} itself, as a data URL (data:{kind};base64,...)"
        if _is_base64(url):
            raise invalid(
                f"base64 without its head, '{url:.12}...'; expected a data URL, so put 'data:{kind};base64,' in front.",
                param,
                "invalid_data_url",
            )
        try:
            parsed = urlparse(url)
        except ValueError:
            parsed = None
        if parsed is None or parsed.scheme.lower() not in ("", "file"):
            raise invalid(
                f"'{url:.80}' is not a data URL, and the server fetches nothing; {advice}.", param, "no_fetch"
            )
        name = unquote(parsed.path, errors="surrogateescape") if parsed.scheme else url
        if self._roots and "\0" not in name and len(name) < _PATH_MAX:
            path = Path(os.path.realpath(name))
            if any(path.is_relative_to(root) for root in self._roots):
                return path
        allowed = "is outside the directories that this server reads for clients"
        raise invalid(f"'{url:.80}' {allowed}; {advice}, or start the server with --media-path.", param, "no_path")


def _is_base64(text: str) -> bool:
    """Whether a text is the base64 of a file, as Ollama's clients send images, rather than a path."""
    return len(text) >= 32 and (text.startswith(_HEADS) or len(text) >= _PATH_MAX) and not _NOT_BASE64.search(text)


def _data(url: str, param: str, kind: str = "image/png") -> bytes:
    head, _, data = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise invalid(f"a data URL that is not base64; expected 'data:{kind};base64,...'.", param, "invalid_data_url")
    return _decoded(data, param)


def _decoded(data: str, param: str) -> bytes:
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise invalid("the base64 data is invalid; encode the file's bytes again.", param, "invalid_base64") from None
    if not content:
        raise invalid("the file is empty (0 bytes).", param, "empty_file")
    return content
