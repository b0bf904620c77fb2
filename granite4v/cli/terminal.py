"""Makes text from files, file names and models safe to print on a terminal; formats dates."""

from __future__ import annotations

import re
import time

# Control characters (escape sequences begin with one), line and paragraph separators, characters that reorder a line
# (bidirectional marks, embeddings, overrides, isolates), and lone surrogates (bytes of file names that are not UTF-8).
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str, keep: str = "\n\t") -> str:
    r"""Escapes every character that could move the cursor, or recolour or reorder what a terminal shows, as '\x1b' or
    '\u202e'. `keep`: characters that are not escaped, by default line feeds and tabs; '' for text on one line."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def date(seconds: float) -> str:
    """Formats seconds since the epoch as local date and time; '?' if they are out of range, as in a damaged file."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "?"
