"""Parses what the user types: words as a shell would split them, and files that were dropped into the line.

Terminals paste the path of a dropped file in quotes, with escaped spaces, or as a file:// URL. Apostrophes and
backslashes are also ordinary characters of questions, so nothing here is an error.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from granite4v.runtime.chat.pages import ATTACHED

# at the start of a word: quoted text that ends where a word ends (a page selection may follow it), or everything up to
# the next unescaped space
_WORD = re.compile(r"""(?:'([^']*)'|"([^"]*)")(#[\d,\s-]*\d-?)?(?=\s|$)|((?:\\.|[^\s\\]|\\$)+)""", re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_PAGES = re.compile(r"#[\d,-]+$")


@dataclass(frozen=True)
class Word:
    """A word. `value`: without quotes and escapes. `start` and `end`: its place in the line."""

    value: str
    start: int
    end: int


@dataclass(frozen=True)
class Line:
    """A line. `files`: those dropped into it, as 'FILE' or 'FILE#PAGES'. `text`: what is left, the question."""

    text: str
    files: tuple[str, ...]


def words(text: str) -> list[Word]:
    """The words of a line."""
    found = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        match = _WORD.match(text, at)
        assert match is not None  # its last alternative matches any character that is not a space
        single, double, pages, bare = match.groups()
        value = _ESCAPED.sub(r"\1", bare) if bare is not None else (single or double or "") + (pages or "")
        found.append(Word(value, at, match.end()))
        at = match.end()
    return found


def argument(text: str) -> str:
    """The file that a command's argument names, without quotes, escapes and file://; spaces need not be escaped."""
    text = text.strip()
    found = words(text)
    return _path(found[0].value) if len(found) == 1 else _path(text)


def split_files(text: str) -> Line:
    """Splits a line into the existing files that it names and the rest. A file at either end of the line is taken out;
    one in the middle of a sentence leaves its name there."""
    found = [(word, path) for word in words(text) if (path := _dropped(word.value)) is not None]
    left, right = 0, len(text)
    for word, _ in found:
        if text[left : word.start].strip():
            break
        left = word.end
    for word, _ in reversed(found):
        if text[word.end : right].strip() or word.start < left:
            break
        right = word.start
    rest, at = "", left
    for word, path in found:
        if left <= word.start and word.end <= right:
            rest += text[at : word.start] + os.path.basename(path)
            at = word.end
    return Line((rest + text[at:right]).strip(), tuple(path for _, path in found))


def starts_with_file(text: str) -> bool:
    """Whether the first word is the path of a document, whatever it begins with: '/home/...' is not a command."""
    found = words(text)
    return bool(found) and _dropped(found[0].value) is not None


def _dropped(value: str) -> str | None:
    """The document that a word names, if it exists."""
    path = os.path.expanduser(_path(value))
    bare = path if os.path.isfile(path) else _PAGES.sub("", path)
    try:
        is_document = os.path.splitext(bare)[1].lower() in ATTACHED and os.path.isfile(bare)
    except ValueError:  # a NUL
        return None
    return path if is_document else None


def _path(value: str) -> str:
    if not value.startswith("file:/"):
        return value
    try:
        parts = urlsplit(value)
    except ValueError:
        return value
    pages = f"#{parts.fragment}" if parts.fragment else ""
    # bytes that are not UTF-8 become surrogates, as in Python's paths
    path = unquote(parts.path, errors="surrogateescape")
    return path + pages if parts.netloc in ("", "localhost") else value
