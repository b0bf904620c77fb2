"""Strips what an answer may be wrapped in: a Markdown code fence, or a JSON list of strings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from granite4v.runtime.formats.json_prefix import partial_string, read_prefix

_OPENING = re.compile(r"\A\s*```[ \t]*[\w+-]*[ \t]*\r?\n")
_CLOSING = re.compile(r"^[ \t]*```[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Body:
    """The inside of a fence, or all of the answer: its text, the offset of that, and whether a fence closes it."""

    text: str
    start: int
    closed: bool


def unfence(text: str, language: str) -> Body:
    """The inside of a fence at the start of the answer, or of a later one if it names its `language`."""
    opening = _OPENING.match(text) or re.search(rf"^[ \t]*```[ \t]*{language}[ \t]*\r?\n", text, re.MULTILINE)
    if opening is None:
        return Body(text, 0, False)
    start = opening.end()
    closing = _CLOSING.search(text, start)
    if closing is not None:
        return Body(text[start : closing.start()], start, True)
    inside = text[start:].rstrip()
    if inside.endswith("```"):  # the closing fence is on the last line of the content
        return Body(inside[:-3], start, True)
    return Body(text[start:], start, False)


def joined(text: str) -> Body:
    """The strings of a JSON list, one on a line, the last perhaps cut; any other text unchanged.

    `closed` is False for a list without its closing bracket.
    """
    if not re.match(r'\s*\[\s*"', text):
        return Body(text, 0, True)
    prefix = read_prefix(text)
    strings = [str(one) for one in prefix.value or []]
    if prefix.complete:
        return Body("\n".join(strings), 0, True)
    rest = text[prefix.end :].lstrip("[, \t\r\n")
    tail = partial_string(rest)
    if tail is None and rest:
        return Body(text, 0, True)  # not JSON: quotes inside the strings are not escaped
    return Body("\n".join([*strings, tail or ""]), 0, False)
