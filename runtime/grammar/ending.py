"""The end of a JSON answer that is running out of room: few bytes that make it a whole instance of its schema.

llguidance says which bytes may come; here is which of them to take. What is open is closed, what may be null is null,
and where a schema demands more text, each byte is one that was taken seldom, so that no pattern is stuck in a loop.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

_OUTSIDE = b'}],n"[{1234567890ft-.'  # what ends soonest first; no two alternatives are in the wrong order here
_QUOTE, _BACKSLASH = ord('"'), ord("\\")


class JsonPlace(NamedTuple):
    """Whether an answer is inside a string, and behind a backslash there."""

    in_string: bool = False
    escaped: bool = False

    def behind(self, text: bytes) -> JsonPlace:
        in_string, escaped = self
        for byte in text:
            if not in_string:
                in_string = byte == _QUOTE
            elif escaped:
                escaped = False
            else:
                in_string, escaped = byte != _QUOTE, byte == _BACKSLASH
        return JsonPlace(in_string, escaped)

    def soonest(self, allowed: set[int], taken: Counter[int]) -> int:
        """Of the bytes that may come next, the one to take; `taken` counts those that were."""
        if self.in_string:
            if _QUOTE in allowed and not self.escaped:
                return _QUOTE
            # signs come before letters: they are what patterns of words and numbers go on with
            return min(allowed, key=lambda byte: (taken[byte], byte == _BACKSLASH, byte))
        return next((byte for byte in _OUTSIDE if byte in allowed), min(allowed))
