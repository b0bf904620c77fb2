"""One section of the report, as text and as data, and what is wrong in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Something that could be better. `is_serious`: it breaks something, or costs half of the speed or more.

    `command`: the one shell command that mends it; empty where there is none.
    """

    text: str
    command: str = ""
    is_serious: bool = True

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text, "command": self.command or None, "serious": self.is_serious}


@dataclass(frozen=True)
class Section:
    """`lines`: for people; a list of strings among them is a row of a table whose first row is the heading."""

    name: str
    lines: Sequence[str | list[str]]
    data: dict[str, Any]
    problems: Sequence[Problem] = field(default_factory=tuple)
