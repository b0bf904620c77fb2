"""Automata that count: answers alternate between literals and free text, and earlier text decides what may come next.

A context-free grammar cannot say that every row is as wide as the first. So each table format describes its answers by
rules: a `Rule` is plain data that says what may come next and which rule follows each literal. This module runs the
rules byte by byte; it knows neither formats nor tokens. From every position some text leads to the end, so no answer
gets stuck.

For example, with rules for CSV of two columns: after 'a,b\\n1' the rule is "first field of a row of two". Its `Next`
is free text, then the literal ','. After ',' the rule is "second field", whose `Next` is free text, then '\\n' or
the end.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

_ANY_TEXT = b"-"


@dataclass(frozen=True)
class Text:
    """Free text up to one of the literals.

    `marks`: bytes that are never text; each begins a literal or is rejected. `tags`: bytes that make the '<' before
    them the start of a tag; any other '<' is text. `non_blank`: white space alone does not count as text.
    """

    marks: bytes = b""
    tags: bytes = b""
    non_blank: bool = False


@dataclass(frozen=True)
class Next:
    """What may come next: free text if there is `text`, then one of `literals`, or the end if `is_accepting`.

    `initial_literals` and `initially_accepting`, unless None, replace `literals` and `is_accepting` until some text has
    come. No literal is a prefix of another. Always taking the first literal leads to the end in few steps.
    """

    literals: tuple[bytes, ...]
    text: Text | None = None
    is_accepting: bool = False
    initial_literals: tuple[bytes, ...] | None = None
    initially_accepting: bool | None = None


class Rule(Protocol):
    """A state of an automaton. Compared and hashed by value, so that masks can be cached by rule."""

    def next(self) -> Next: ...

    def after(self, literal: bytes) -> Rule: ...


class Position(NamedTuple):
    """The position of an answer: a rule, its `next`, and how much of that has been read."""

    rule: Rule
    next: Next
    partial: bytes = b""  # a proper prefix of one or more literals
    held: bytes = b""  # a '<' or an incomplete character; the next byte decides what it is
    is_initial: bool = True  # no text has come yet

    @property
    def in_text(self) -> bool:
        return self.next.text is not None and not self.partial

    @property
    def literals(self) -> tuple[bytes, ...]:
        if self.is_initial and self.next.initial_literals is not None:
            return self.next.initial_literals
        return self.next.literals

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here. Does not look at incomplete characters."""
        initially = self.next.initially_accepting if self.is_initial else None
        return not self.partial and (self.next.is_accepting if initially is None else initially)

    @property
    def is_final(self) -> bool:
        """Whether nothing can follow."""
        return self.is_accepting and self.next.text is None and not self.next.literals

    def remainders(self) -> list[tuple[bytes, bytes]]:
        """Each literal that can still come, and the part of it that is missing."""
        n = len(self.partial)
        return [(literal, literal[n:]) for literal in self.literals if literal.startswith(self.partial)]

    def after(self, literal: bytes) -> Position:
        return start(self.rule.after(literal))


def start(rule: Rule) -> Position:
    return Position(rule, rule.next())


def advance(position: Position, data: bytes) -> Position | None:
    """The position after `data`, which is part of valid UTF-8; None if the rules do not allow it.

    For example, in the text of an HTML cell: after 'x</t', `partial` is '</t'; 'd>' then completes the literal '</td>',
    and the position moves on to the rule that follows it.
    """
    at = 0
    while at < len(data):
        if position.in_text:
            position, begins_literal = _text_step(position, data[at])
            if not begins_literal:
                at += 1
                continue
        coming = data[at:]
        for literal, rest in position.remainders():
            if coming.startswith(rest):
                position, at = position.after(literal), at + len(rest)
                break
            if rest.startswith(coming):
                return position._replace(partial=position.partial + coming, held=b"")
        else:
            return None
    return position


def _text_step(position: Position, byte: int) -> tuple[Position, bool]:
    """Reads one byte of text: returns the position before it and True if it begins a literal (or continues one that
    began with a held '<'), otherwise the position after it and False.

    For example, if letters make tags: in 'a<b', the '<' is held; 'b' makes it the start of a literal, so `partial`
    becomes '<' and 'b' has to continue it. In 'a<5', the '5' makes the '<' text.
    """
    text, held, is_initial = position.next.text, position.held, position.is_initial
    assert text is not None
    if held == b"<":
        if byte in text.tags:
            return position._replace(partial=held, held=b""), True
        held, is_initial = b"", False
    if byte in text.marks:
        return position._replace(held=b"", is_initial=is_initial), True
    if byte == ord("<") and text.tags:
        return position._replace(held=b"<", is_initial=is_initial), False
    if is_initial and text.non_blank:
        # white space can be a multi-byte character (U+3000), so bytes are held until the character is complete
        held += bytes((byte,))
        with contextlib.suppress(UnicodeDecodeError):
            held, is_initial = b"", held.decode().isspace()
    else:
        held, is_initial = b"", False
    if (held, is_initial) == (position.held, position.is_initial):
        return position, False
    return position._replace(held=held, is_initial=is_initial), False


def forced_text(position: Position, most: int) -> bytes:
    """The text that must come next; about the first `most` bytes if it is longer."""
    found = b""
    while len(found) < most and not position.in_text and not position.is_accepting:
        rests = [rest for _, rest in position.remainders()]
        common = _common_prefix(rests)
        found += common
        following = advance(position, common) if len(rests) == 1 else None
        if following is None:
            break
        position = following
    return found


def _common_prefix(texts: list[bytes]) -> bytes:
    first, last = min(texts), max(texts)  # in sorted order, all others lie between these two and share their prefix
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:n]


def ending(position: Position, most: int) -> list[bytes] | None:
    """At most `most` pieces of text that lead to the end; None if it takes more."""
    pieces: list[bytes] = []
    while not position.is_accepting:
        if len(pieces) == most:
            return None
        if position.partial:
            pieces.append(position.remainders()[0][1])
        else:
            pieces.append(position.literals[0] if position.literals else _ANY_TEXT)
        following = advance(position, pieces[-1])
        assert following is not None
        position = following
    return pieces


def next_bytes(position: Position) -> set[int]:
    """The bytes that may come next, whatever characters they belong to."""
    text = position.next.text
    if text is None or position.partial:
        return {rest[0] for _, rest in position.remainders()}
    if position.held == b"<":
        refused = {*text.tags, *text.marks} - {literal[1] for literal in position.literals if literal[:1] == b"<"}
    else:
        refused = {*text.marks} - {literal[0] for literal in position.literals}
    return set(range(256)) - refused
