"""Strips the wrapping of an answer: a Markdown code fence, or a JSON list of strings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from granite4v.runtime.formats.json_prefix import Path, partial_string, read_prefix

_OPENING = re.compile(r"\A\s*```[ \t]*[\w+-]*[ \t]*\r?\n")
# one character of a JSON string
_CHARACTER = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL
)
_CLOSING = re.compile(r"^[ \t]*```[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Body:
    """The content of a fence, or the whole answer: its text, the offset of the text, and whether a fence closes it.

    `offsets`: the offset of each character of `text` in the answer, unless they are consecutive from `start` on.
    """

    text: str
    start: int
    closed: bool
    offsets: tuple[int, ...] = ()

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The start and end in the answer of `text[start:end]`, which must not be empty."""
        if not self.offsets:
            return self.start + start, self.start + end
        last = len(self.offsets) - 1
        return self.offsets[min(start, last)], self.offsets[min(end - 1, last)] + 1


def unfence(text: str, language: str) -> Body:
    """The content of a fence at the start of the answer, or of a later one that names its `language`; without such a
    fence, the whole answer."""
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
    """The strings of a JSON list, one per line, the last perhaps truncated; any other text unchanged.

    `closed` is False for a list without its closing bracket.
    """
    if not re.match(r'\s*\[\s*"', text):
        return Body(text, 0, True)
    starts: dict[str | int, int] = {}

    def visit(path: Path, start: int, end: int) -> None:
        starts.setdefault(path[0], start)

    prefix = read_prefix(text, visit=visit)
    strings = [str(one) for one in prefix.value or []]
    if not prefix.complete:
        rest = text[prefix.end :].lstrip("[, \t\r\n")
        tail = partial_string(rest)
        if tail is None and rest:
            return Body(text, 0, True)  # not JSON: quotes inside the strings are not escaped
        starts[len(strings)] = len(text) - len(rest)
        strings.append(tail or "")
    offsets = [offset for at, one in enumerate(strings) for offset in _offsets(text, starts[at], len(one))]
    return Body("\n".join(strings), 0, prefix.complete, tuple(offsets))


def _offsets(text: str, start: int, n: int) -> Iterator[int]:
    """Yields the offsets of the `n` characters of a JSON string whose opening quote is at `start`, and one more for the
    line break after them; for any other value, repeats the offset of its beginning."""
    characters = _CHARACTER.finditer(text, start + 1) if text.startswith('"', start) else iter(())
    at = start
    for _ in range(n + 1):
        found = next(characters, None)
        at = found.start() if found is not None else at
        yield at
