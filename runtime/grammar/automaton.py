"""Forms that count: an answer is literals and free text in turn, and what may come next depends on what came before.

A context-free grammar cannot say that all rows are as wide as the first. So a form (OTSL, HTML, CSV, cells as JSON)
is a `Rule`: plain data that tells what it expects next, and what follows each literal. This module walks such rules
byte by byte; it knows no form, and no tokens. Every state can be brought to an end, so no walk gets stuck.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

_ANY_INK = b"-"


@dataclass(frozen=True)
class Text:
    """Free text that one of the literals ends.

    `marks`: bytes that are no text; each begins a literal or is refused. `tags`: bytes that make a tag of a '<'
    before them; any other '<' is text. `ink`: white space alone does not count as text.
    """

    marks: bytes = b""
    tags: bytes = b""
    ink: bool = False


@dataclass(frozen=True)
class Expectation:
    """What may come next: free text if there is `text`, then one of `literals`, or the end if `may_end`.

    `at_once` and `ends_at_once` say what may come in place of any text, where that differs. No literal is the
    beginning of another. Always taking the first one comes to an end soon.
    """

    literals: tuple[bytes, ...]
    text: Text | None = None
    may_end: bool = False
    at_once: tuple[bytes, ...] | None = None
    ends_at_once: bool | None = None


class Rule(Protocol):
    """A place in an answer. Compared and hashed by value."""

    def expects(self) -> Expectation: ...

    def after(self, literal: bytes) -> Rule: ...


class Cursor(NamedTuple):
    """How far an answer has come: the rule it is at and what it has of it."""

    rule: Rule
    want: Expectation
    literal: bytes = b""  # the beginning of a literal
    held: bytes = b""  # a '<', or the beginning of a character, of which the next byte tells what it is
    fresh: bool = True  # there is no text yet

    @property
    def in_text(self) -> bool:
        return self.want.text is not None and not self.literal

    @property
    def literals(self) -> tuple[bytes, ...]:
        return self.want.at_once if self.fresh and self.want.at_once is not None else self.want.literals

    @property
    def may_end(self) -> bool:
        """Whether the answer may end here; nothing is said of unfinished characters."""
        at_once = self.want.ends_at_once if self.fresh else None
        return not self.literal and (self.want.may_end if at_once is None else at_once)

    @property
    def is_over(self) -> bool:
        return self.may_end and self.want.text is None and not self.want.literals

    def remainders(self) -> list[tuple[bytes, bytes]]:
        """Each literal that can still come, and what is missing of it."""
        n = len(self.literal)
        return [(literal, literal[n:]) for literal in self.literals if literal.startswith(self.literal)]

    def behind(self, literal: bytes) -> Cursor:
        return start(self.rule.after(literal))


def start(rule: Rule) -> Cursor:
    return Cursor(rule, rule.expects())


def advance(cursor: Cursor, data: bytes) -> Cursor | None:
    """The cursor behind `data`, which is part of valid UTF-8; None when the form does not allow it."""
    at = 0
    while at < len(data):
        if cursor.in_text:
            cursor, begins_literal = _text_step(cursor, data[at])
            if not begins_literal:
                at += 1
                continue
        coming = data[at:]
        for literal, rest in cursor.remainders():
            if coming.startswith(rest):
                cursor, at = cursor.behind(literal), at + len(rest)
                break
            if rest.startswith(coming):
                return cursor._replace(literal=cursor.literal + coming, held=b"")
        else:
            return None
    return cursor


def _text_step(cursor: Cursor, byte: int) -> tuple[Cursor, bool]:
    """The cursor before `byte` if that goes on with a literal, else behind it; and which of the two."""
    text, held, fresh = cursor.want.text, cursor.held, cursor.fresh
    assert text is not None
    if held == b"<":
        if byte in text.tags:
            return cursor._replace(literal=held, held=b""), True
        held, fresh = b"", False
    if byte in text.marks:
        return cursor._replace(held=b"", fresh=fresh), True
    if byte == ord("<") and text.tags:
        return cursor._replace(held=b"<", fresh=fresh), False
    if fresh and text.ink:
        held += bytes((byte,))
        with contextlib.suppress(UnicodeDecodeError):  # not a whole character yet
            held, fresh = b"", held.decode().isspace()
    else:
        held, fresh = b"", False
    if (held, fresh) == (cursor.held, cursor.fresh):
        return cursor, False
    return cursor._replace(held=held, fresh=fresh), False


def forced(cursor: Cursor, most: int) -> bytes:
    """The text that must come next; about `most` bytes of it if it is longer."""
    found = b""
    while len(found) < most and not cursor.in_text and not cursor.may_end:
        rests = [rest for _, rest in cursor.remainders()]
        common = _common_beginning(rests)
        found += common
        following = advance(cursor, common) if len(rests) == 1 else None
        if following is None:
            break
        cursor = following
    return found


def _common_beginning(texts: list[bytes]) -> bytes:
    first, last = min(texts), max(texts)  # all others lie between these two
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:n]


def ending(cursor: Cursor, most: int) -> list[bytes] | None:
    """What brings the answer to an end, in at most so many pieces; None where that takes more."""
    pieces: list[bytes] = []
    while not cursor.may_end:
        if len(pieces) == most:
            return None
        if cursor.literal:
            pieces.append(cursor.remainders()[0][1])
        else:
            pieces.append(cursor.literals[0] if cursor.literals else _ANY_INK)
        following = advance(cursor, pieces[-1])
        assert following is not None
        cursor = following
    return pieces


def next_bytes(cursor: Cursor) -> set[int]:
    """The bytes that may come next, whatever characters they are part of."""
    text = cursor.want.text
    if text is None or cursor.literal:
        return {rest[0] for _, rest in cursor.remainders()}
    if cursor.held == b"<":
        refused = {*text.tags, *text.marks} - {literal[1] for literal in cursor.literals if literal[:1] == b"<"}
    else:
        refused = {*text.marks} - {literal[0] for literal in cursor.literals}
    return set(range(256)) - refused
