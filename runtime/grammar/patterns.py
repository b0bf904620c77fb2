"""Regular expressions of JSON Schemas: how large they are, and matching them in bounded time.

They are ECMA's, matched with the package `regex`, which knows \\p{L} and (?<name>...) and can be given a time limit.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import regex

MAX_SIZE = 100_000  # characters, once all that is counted is written out: `regex` writes it out
MAX_LENGTH = 20_000
_SECONDS = 1.0  # of this process's time
_COUNT = re.compile(r"\{(\d{1,18})(?:,(\d{0,18}))?\}")
_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")


class PatternTimeout(Exception):
    """A text took too long to match."""


def pattern_problem(pattern: str) -> str:
    """Why texts cannot be matched with a pattern; empty if they can be."""
    if len(pattern) > MAX_LENGTH:
        return f"is {len(pattern):,} characters long; expected at most {MAX_LENGTH:,}"
    size = pattern_size(pattern)
    if size > MAX_SIZE:
        return f"repeats its parts up to {size:,} times in all; expected at most {MAX_SIZE:,}. Use smaller counts"
    try:
        _compiled(pattern)
    except Exception as error:  # the package has errors of several kinds
        return f"is not one that can be matched: {error}"
    return ""


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern is found in a text. Raises PatternTimeout."""
    try:
        return _compiled(pattern).search(text, timeout=_SECONDS) is not None
    except TimeoutError:
        raise PatternTimeout(f"matching it with {pattern!r:.80} takes more than a second") from None


@functools.lru_cache(maxsize=1000)
def _compiled(pattern: str) -> Any:
    # ECMA's escapes that `regex` spells in another way
    spelled = re.sub(r"\\u\{([0-9A-Fa-f]{1,6})\}", lambda found: f"\\U{int(found[1], 16):08x}", pattern)
    spelled = re.sub(r"\\c([A-Za-z])", lambda found: f"\\x{ord(found[1]) % 32:02x}", spelled)
    spelled = re.sub(r"\\k<(\w+)>", r"(?P=\1)", spelled)
    spelled = spelled.replace("[^]", r"[\s\S]")
    return regex.compile(spelled, regex.V0)


def pattern_size(pattern: str) -> int:
    """Characters of a pattern with every counted part written out; what is counted without end counts once."""
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
            i = _behind_class(pattern, i) if character == "[" else i + (character == "\\")
        i += 1
    return sum(sizes)


def without_look_around(pattern: str) -> str:
    """The pattern without its look-ahead and look-behind: it matches whatever the pattern does, and more."""
    made: list[str] = []
    i = depth = 0  # depth: brackets that are open within a look-around
    while i < len(pattern):
        n = 1
        if pattern[i] == "\\":
            n = 2
        elif pattern[i] == "[":
            n = _behind_class(pattern, i) + 1 - i
        elif pattern[i] in "()" and (depth or pattern.startswith(_LOOK_AROUND, i)):
            depth += 1 if pattern[i] == "(" else -1
            i += 1
            continue
        if not depth:
            made.append(pattern[i : i + n])
        i += n
    return "".join(made)


def _behind_class(pattern: str, start: int) -> int:
    """The index of the bracket that ends the character class which begins at `start`."""
    i = start + 1
    i += pattern[i : i + 1] == "^"
    i += pattern[i : i + 1] == "]"
    while i < len(pattern) and pattern[i] != "]":
        i += 1 + (pattern[i] == "\\")
    return i
