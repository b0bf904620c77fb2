"""Parses the complete part of a JSON text, for truncated answers. Knows nothing about tables or schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from granite4v.runtime.formats.json_values import MAX_NESTING, replace_surrogates, to_float, to_int

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NUMBER = re.compile(
    r"(-?(?:0|[1-9]\d*))((?:\.\d+)?(?:[eE][+-]?\d+)?)(?=[\s,\]}])", re.ASCII
)  # without the lookahead, a digit could be missing
_LITERALS = {"true": True, "false": False, "null": None}
Path: TypeAlias = tuple[str | int, ...]  # names and indices, from the outermost container inwards


@dataclass(frozen=True)
class Prefix:
    """The value that a text begins with. Unclosed objects and lists keep their complete members.

    `end` is the offset after the last value or closing bracket that was kept; `unclosed` are the containers that the
    text leaves open, outermost first. `value` is None if nothing is complete. For example, '{"a": [1, 2' gives the
    value {"a": [1]}, since another digit could follow the 2.
    """

    value: Any
    end: int
    complete: bool
    unclosed: list[Any]


def read_prefix(
    text: str,
    parse_float: Callable[[str], Any] = to_float,
    visit: Callable[[Path, int, int], None] | None = None,
) -> Prefix:
    """Parses the value at the start of `text`, as far as it is complete and well formed. Text after it is ignored.

    Unclosed containers without a complete member are left out. A container nested deeper than MAX_NESTING, a number too
    large for a double, and an integer of more than MAX_DIGITS digits count as malformed. `visit` is called for each
    string, number, literal and empty container, with its path and its start and end in `text`.
    """
    stack: list[Any] = []  # the open containers, outermost first
    keys: list[str] = []  # for each open container, the key whose value comes next; '' in a list
    root: Any = None
    at = end = opened_at = 0
    after_value = False  # a member is complete: a comma or a closing bracket must follow
    while True:
        at = _skip(text, at)
        top = stack[-1] if stack else None
        mark = text[at : at + 1]
        if stack and mark == ("}" if isinstance(top, dict) else "]") and (after_value or not top):
            if visit is not None and not top:
                visit(_path(stack[:-1], keys), opened_at, at + 1)
            stack.pop(), keys.pop()
            at = end = at + 1
            if not stack:
                return Prefix(root, end, True, [])
            after_value = True
            continue
        if after_value:
            if mark != ",":
                break
            at = _skip(text, at + 1)
        if isinstance(top, dict):
            key, at = _key(text, at)
            if key is None:
                break
            keys[-1] = key
        if text[at : at + 1] in ("{", "["):
            if len(stack) == MAX_NESTING:
                break
            opened: Any = {} if text[at] == "{" else []
            root = _attach(root, stack, keys, opened)
            stack.append(opened)
            keys.append("")
            opened_at = at
            at, after_value = at + 1, False
            continue
        found = _scalar(text, at, parse_float)
        if found is None:
            break
        start, (value, at) = at, found
        end, after_value = at, True
        root = _attach(root, stack, keys, value)
        if visit is not None:
            visit(_path(stack, keys), start, end)
        if not stack:
            return Prefix(root, end, True, [])
    return _without_empty(root, end, stack)


def partial_string(text: str) -> str | None:
    """The text of an unclosed JSON string that starts here; None if no string starts here, or if it is closed."""
    if not text.startswith('"') or _STRING.match(text):
        return None
    for cut in range(min(len(text), 12)):  # drops at most an unfinished pair of \\uXXXX escapes
        try:
            return str(replace_surrogates(json.loads(text[: len(text) - cut] + '"', strict=False)))
        except ValueError:
            continue
    return ""


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _path(stack: list[Any], keys: list[str]) -> Path:
    """The path of the value that was last put into the innermost container."""
    return tuple(key if isinstance(one, dict) else len(one) - 1 for one, key in zip(stack, keys, strict=False))


def _attach(root: Any, stack: list[Any], keys: list[str], value: Any) -> Any:
    """Puts a value into the innermost container; returns the root."""
    if not stack:
        return value
    if isinstance(stack[-1], dict):
        stack[-1][keys[-1]] = value
    else:
        stack[-1].append(value)
    return root


def _key(text: str, at: int) -> tuple[str | None, int]:
    """An object's key and the offset of its value; None if there is no complete key."""
    found = _string(text, at)
    if found is None:
        return None, at
    colon = _skip(text, found[1])
    if text[colon : colon + 1] != ":":
        return None, at
    return found[0], _skip(text, colon + 1)


def _string(text: str, at: int) -> tuple[str, int] | None:
    found = _STRING.match(text, at)
    if found is None:
        return None
    try:
        return str(replace_surrogates(json.loads(found[0], strict=False))), found.end()
    except ValueError:
        return None


def _scalar(text: str, at: int, parse_float: Callable[[str], Any]) -> tuple[Any, int] | None:
    if text[at : at + 1] == '"':
        return _string(text, at)
    for name, value in _LITERALS.items():
        if text.startswith(name, at):
            return value, at + len(name)
    number = _NUMBER.match(text, at)
    if number is None:
        return None
    try:
        return (parse_float(number[0]) if number[2] else to_int(number[1])), number.end()
    except ValueError:  # the number is too large
        return None


def _without_empty(root: Any, end: int, stack: list[Any]) -> Prefix:
    while stack and not stack[-1]:
        stack.pop()
        if not stack:
            return Prefix(None, end, False, [])
        parent = stack[-1]
        if isinstance(parent, dict):
            parent.popitem()  # the member that was attached last
        else:
            parent.pop()
    return Prefix(root, end, False, stack)
