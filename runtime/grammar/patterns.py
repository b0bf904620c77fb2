"""Regular expressions in JSON Schemas: measures their size, and matches them in bounded time.

They are ECMAScript's. The package `regex` matches them: it supports \\p{L} and (?<name>...) and takes a timeout.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import regex

MAX_SIZE = 100_000  # characters with counted repetitions expanded, as `regex` does when it compiles
MAX_LENGTH = 20_000
_SECONDS = 1.0  # of processor time
_COUNT = re.compile(r"\{(\d{1,18})(?:,(\d{0,18}))?\}")
_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")


class PatternTimeout(Exception):
    """Raised when matching a text takes too long."""


def pattern_problem(pattern: str) -> str:
    """Why a pattern cannot be used; empty if it can."""
    if len(pattern) > MAX_LENGTH:
        return f"is {len(pattern):,} characters long; expected at most {MAX_LENGTH:,}"
    size = pattern_size(pattern)
    if size > MAX_SIZE:
        return f"repeats its parts up to {size:,} times in all; expected at most {MAX_SIZE:,}. Use smaller counts"
    try:
        _compiled(pattern)
    except Exception as error:  # the package has errors of several kinds
        return f"is invalid: {error}"
    return ""


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern matches anywhere in a text. Raises PatternTimeout."""
    try:
        return _compiled(pattern).search(text, timeout=_SECONDS) is not None
    except TimeoutError:
        raise PatternTimeout(f"matching it with {pattern!r:.80} takes more than a second") from None


@functools.lru_cache(maxsize=1000)
def _compiled(pattern: str) -> Any:
    # ECMAScript escapes that `regex` writes differently
    spelled = re.sub(r"\\u\{([0-9A-Fa-f]{1,6})\}", lambda found: f"\\U{int(found[1], 16):08x}", pattern)
    spelled = re.sub(r"\\c([A-Za-z])", lambda found: f"\\x{ord(found[1]) % 32:02x}", spelled)
    spelled = re.sub(r"\\k<(\w+)>", r"(?P=\1)", spelled)
    spelled = spelled.replace("[^]", r"[\s\S]")
    return regex.compile(spelled, regex.V0)


def pattern_size(pattern: str) -> int:
    """Characters of a pattern with counted repetitions expanded; an unbounded repetition counts once.

    For example, 7 for 'a(bc){3}'.
    """
    sizes, last = [0], 0
    i = 0
    while i < len(pattern):
        character = pattern[i]
        counted = _COUNT.match(pattern, i)
        if character == "(":
            sizes.append(0)
            last = 0
        elif character == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif counted:
            times = max(int(counted[1]), int(counted[2] or 0), 1)
            sizes[-1] += last * (times - 1)
            last *= times
            i = counted.end()
            continue
        else:
            last = 1
            sizes[-1] += 1
            i = _end_of_class(pattern, i) if character == "[" else i + (character == "\\")
        i += 1
    return sum(sizes)


def without_look_around(pattern: str) -> str:
    """The pattern without its lookaheads and lookbehinds: it matches everything that the pattern matches, and more."""
    made: list[str] = []
    i = depth = 0  # depth: open parentheses inside a lookaround
    while i < len(pattern):
        n = 1
        if pattern[i] == "\\":
            n = 2
        elif pattern[i] == "[":
            n = _end_of_class(pattern, i) + 1 - i
        elif pattern[i] in "()" and (depth or pattern.startswith(_LOOK_AROUND, i)):
            depth += 1 if pattern[i] == "(" else -1
            i += 1
            continue
        if not depth:
            made.append(pattern[i : i + n])
        i += n
    return "".join(made)


def _end_of_class(pattern: str, start: int) -> int:
    """The index of the bracket that closes the character class at `start`."""
    i = start + 1
    i += pattern[i : i + 1] == "^"
    i += pattern[i : i + 1] == "]"
    while i < len(pattern) and pattern[i] != "]":
        i += 1 + (pattern[i] == "\\")
    return i
