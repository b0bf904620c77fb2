"""One section of the report: text, data and problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A problem that the report names. `is_serious`: it breaks something, or costs half of the speed or more.

    `command`: the one shell command that fixes it; empty if there is none.
    """

    text: str
    command: str = ""
    is_serious: bool = True

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text, "command": self.command or None, "serious": self.is_serious}


@dataclass(frozen=True)
class Section:
    """A section of the report. `lines`: the text for people; an item that is a list of strings is a table row, and the
    first such row is the heading. `data`: the same facts as JSON data."""

    name: str
    lines: Sequence[str | list[str]]
    data: dict[str, Any]
    problems: Sequence[Problem] = field(default_factory=tuple)
