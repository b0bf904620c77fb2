"""Jinja's immutable sandbox with limits on time and size: a chat template is untrusted code.

Jinja itself limits only `range`. A template may loop forever, or double a text until memory is full. So the lines
that a rendering executes and the characters that it writes are counted. Before each operation whose result can be much
larger than its operands (`*`, `~`, `replace`, `center`, `tojson`, ...), an upper bound on the size of the result is
checked.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import jinja2.compiler
import jinja2.sandbox

MAX_SOURCE = 1 << 18  # characters of a template; the longest published ones have about 30,000
MAX_SIZE = 1 << 23  # characters or items of any value, and characters written
MAX_LINES = 2_000_000  # of Python, executed in one rendering: about a second
MAX_SECONDS = 10.0
MAX_BITS = 1 << 16  # of an integer
_CLOCK_EVERY = 1024  # lines
_NESTED = re.compile(r"\{[^{}]*\{")
_DIGITS = re.compile(r"\d{1,18}")
# Filters and methods whose result may be larger than the sum of their arguments.
_PADDED = frozenset({"center", "ljust", "rjust", "zfill"})
_PER_ITEM = frozenset(
    {"indent", "tojson", "expandtabs", "wordwrap", "pprint", "lipsum", "replace", "join", "translate"}
)
_FORMATTED = frozenset({"format", "format_map"})


class LimitError(Exception):
    """Raised when a template takes more time or memory than any chat template needs."""


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):  # type: ignore[misc]  # jinja2 has no types here
    """The environment in which chat templates are compiled. Render inside `bounded`."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, filters: Mapping[str, Any], **options: Any) -> None:
        # not optimized: otherwise constant expressions would be evaluated at compile time, outside `bounded`
        super().__init__(optimized=False, finalize=_small, **options)
        self.filters = {name: _checked(name, function) for name, function in filters.items()}

    class code_generator_class(jinja2.compiler.CodeGenerator):  # type: ignore[misc]
        """Routes `a ~ b` through the environment, like other operators."""

        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.concat(map(environment.text, (")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write(")))")

    @staticmethod
    def text(value: Any) -> str:
        return str(_small(value))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Joins the output of a template, a block or a macro."""
        return "".join(_counted(pieces))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | list | dict | int):
            args = _check_call(getattr(method, "__name__", ""), owner, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def bounded(render: Callable[[], str]) -> str:
    """Calls `render` and returns its result. Raises LimitError beyond MAX_LINES or MAX_SECONDS."""
    lines, deadline = 0, time.monotonic() + MAX_SECONDS

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines > MAX_LINES:
            raise LimitError(f"it executes more than {MAX_LINES:,} lines; does it loop forever?")
        if lines % _CLOCK_EVERY == 0 and time.monotonic() > deadline:
            raise LimitError(f"it takes more than {MAX_SECONDS:.0f} seconds; does it loop forever?")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return render()
    finally:
        sys.settrace(before)


def _checked(name: str, function: Any) -> Any:
    """Wraps a filter with a check of its arguments; Jinja's attributes on it (`pass_context` and so on) are kept."""
    skipped = 1 if getattr(function, "jinja_pass_arg", None) else 0

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        head, rest = args[:skipped], args[skipped:]
        value = _bounded_iterator(rest[0], name) if rest else None
        rest = _check_call(name, value, rest[1:], kwargs)
        return function(*head, value, *rest, **kwargs)

    return checked


def _check_operation(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * abs(right), MAX_BITS)
    elif operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() + right.bit_length(), MAX_BITS)
        elif isinstance(left, int) or isinstance(right, int):
            n, value = (left, right) if isinstance(left, int) else (right, left)
            _check(size(value) * max(n, 0))
    elif operator == "+":
        _check(size(left) + size(right))
    elif isinstance(left, str | bytes):
        text = left if isinstance(left, str) else left.decode("latin-1")
        _check(_formatted(text, "%", right if isinstance(right, tuple | Mapping) else (right,)))


def _check_call(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Raises LimitError if the result may be too large; returns the arguments, with iterators bounded."""
    args = tuple(_bounded_iterator(item, name) for item in args)
    given = (*args, *kwargs.values())
    total = size(value) + sum(map(size, given))
    numbers = max((abs(item) for item in given if isinstance(item, int)), default=1)
    if name in _FORMATTED and isinstance(value, str):
        total = _formatted(value, "{%", given)
    elif name in _PADDED:
        total += numbers
    elif name == "replace" and isinstance(value, str) and len(args) > 1 and isinstance(args[0], str):
        total += value.count(args[0]) * size(args[1])
    elif name in _PER_ITEM:
        total += size(value) * max(numbers, *map(size, given), 1)
    _check(total)
    return args


def _formatted(text: str, marks: str, given: Any) -> int:
    """An upper bound on the length of a formatted text: every field is as wide as it asks for, or as all arguments
    together."""
    widths = sum(int(digits) for digits in _DIGITS.findall(text))
    values = given.values() if isinstance(given, Mapping) else given
    dynamic = "*" in text or _NESTED.search(text)  # an argument may be a width
    widest = sum(abs(item) if dynamic and isinstance(item, int) else size(item) for item in values)
    return len(text) + widths + max(text.count(mark) for mark in marks) * widest


def size(value: Any, depth: int = 0) -> int:
    """The number of characters and items in a value and all it contains; counting stops beyond `MAX_SIZE`."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    if depth > 100:
        raise LimitError("it nests lists more than 100 deep")
    total = 0
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple | set | frozenset):
        for item in value:
            total += 1 + size(item, depth + 1)
            if total > MAX_SIZE:
                break
    return total


def _bounded_iterator(value: Any, name: str) -> Any:
    """Makes an iterator count its items, or a list of it if the size of the result depends on their number."""
    if not isinstance(value, Iterator):
        return value
    return list(_counted(value)) if name in _PER_ITEM else _counted(value)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    total = 0
    for item in items:
        total += size(item)
        _check(total)
        yield item


def _small(value: Any) -> Any:
    """Checks a value before it is written: nested lists that share items are small until they are written out."""
    if not isinstance(value, str):
        _check(size(value))
    return value


def _check(total: int, most: int = MAX_SIZE) -> None:
    if total > most:
        raise LimitError(f"it builds a value of more than {most:,} characters, items or bits")
