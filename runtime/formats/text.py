"""Prose, and the code of a chart. Neither has a grammar."""

from __future__ import annotations

from granite4v.errors import AnswerError
from granite4v.runtime.formats.wrapping import unfence


def read_prose(text: str) -> str:
    """The text without white space around it. Raises AnswerError for an empty one."""
    if not text.strip():
        raise AnswerError("the answer is empty; expected text.")
    return text.strip()


def salvage_prose(text: str) -> tuple[str | None, bool]:
    """All of it, and False: prose has no end mark, so nothing tells complete prose from prose that was cut."""
    return text.strip() or None, False


def read_code(text: str) -> str:
    """The code, without a Markdown fence around it. Raises AnswerError for an empty one."""
    return read_prose(unfence(text, "python").text)


def salvage_code(text: str) -> tuple[str | None, bool]:
    """The lines that end with a line break, and whether they are the complete answer."""
    body = unfence(text, "python")
    lines = body.text if body.closed else body.text[: body.text.rfind("\n") + 1]
    return lines.strip() or None, body.closed
