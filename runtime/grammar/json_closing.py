"""Closes a JSON answer that is about to reach its token limit, with few bytes that make it valid against its schema.

Closing what is open ('"}]}') is not enough: a schema may still require properties, a number of items, or text of some
pattern. llguidance knows which bytes may come next, so the closing is searched byte by byte: this module picks the byte
that leads to the end soonest. Open strings and containers are closed, and values that may be null become null. Where a
schema demands more text, the byte is one of those taken least often so far, so that no pattern is followed in an
endless loop.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

# outside strings, the byte that ends soonest first; of any two that are allowed at once, the later is never better
_CLOSING_ORDER = b'}],n"[{1234567890ft-.'
_QUOTE, _BACKSLASH = ord('"'), ord("\\")


class JsonPosition(NamedTuple):
    """Whether an answer is inside a JSON string, and directly after a backslash in it."""

    in_string: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> JsonPosition:
        in_string, escaped = self
        for byte in text:
            if not in_string:
                in_string = byte == _QUOTE
            elif escaped:
                escaped = False
            else:
                in_string, escaped = byte != _QUOTE, byte == _BACKSLASH
        return JsonPosition(in_string, escaped)

    def closing_byte(self, allowed: set[int], n_taken: Counter[int]) -> int:
        """The byte of `allowed` that leads to the end soonest; `n_taken` counts how often each was taken before."""
        if self.in_string:
            if _QUOTE in allowed and not self.escaped:
                return _QUOTE
            # punctuation sorts before letters, and it is how patterns of words and numbers continue
            return min(allowed, key=lambda byte: (n_taken[byte], byte == _BACKSLASH, byte))
        return next((byte for byte in _CLOSING_ORDER if byte in allowed), min(allowed))
