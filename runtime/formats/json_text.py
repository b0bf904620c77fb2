"""Parses JSON in an answer, fenced or bare, with errors that give the position."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from granite4v.errors import AnswerError
from granite4v.runtime.formats.json_prefix import Path, read_prefix
from granite4v.runtime.formats.json_values import MAX_NESTING, is_deeper, replace_surrogates, to_float, to_int
from granite4v.runtime.formats.wrapping import unfence

_TOO_DEEP = f"JSON nested deeper than {MAX_NESTING} levels; expected a few."


def load_json(text: str, parse_float: Callable[[str], Any] = to_float) -> Any:
    """Parses a value nested at most MAX_NESTING levels deep. Line breaks inside strings are accepted; if a key is given
    twice, the last value counts. Raises AnswerError.
    """
    body = unfence(text, "json")
    try:
        value = json.loads(
            body.text, parse_float=parse_float, parse_int=to_int, parse_constant=_refuse_constant, strict=False
        )
    except json.JSONDecodeError as error:
        at = body.start + error.pos
        raise AnswerError(
            f"invalid JSON at character {at}, before {text[at : at + 30]!r}: {error.msg}; expected one JSON value."
        ) from None
    except RecursionError:
        raise AnswerError(_TOO_DEEP) from None
    except ValueError as error:
        raise AnswerError(f"JSON that cannot be read: {error}; expected ordinary numbers.") from None
    if is_deeper(value, MAX_NESTING):
        raise AnswerError(_TOO_DEEP)
    return replace_surrogates(value)


def json_places(text: str) -> list[tuple[Path, int, int]]:
    """The path, start and end of each string, number, literal and empty container of an answer, up to where it is
    truncated or invalid. A string includes its quotes, a number the character that ends it."""
    body = unfence(text, "json")
    skipped = len(body.text) - len(body.text.lstrip())
    origin = body.start + skipped
    found: list[tuple[Path, int, int]] = []

    def visit(path: Path, start: int, end: int) -> None:
        is_number = text[origin + start] not in '"[{tfn'
        found.append((path, origin + start, origin + end + is_number))

    read_prefix(body.text[skipped:], parse_float=str, visit=visit)
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it contains {name}, which is not JSON")
