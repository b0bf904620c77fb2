"""The parts of a schema that a grammar does not enforce, and the warnings about them."""

from __future__ import annotations

from dataclasses import dataclass

from granite4v.runtime.grammar.json_schema import listed


@dataclass(frozen=True)
class LeftOut:
    """A part of a schema that is not enforced: `subject` names the keyword as messages do ("'pattern'", "format
    'date'"); `reason` is the rest of the sentence.

    `is_checked`: whether answers are validated against it afterwards.
    """

    subject: str
    reason: str = "is not enforced during generation"
    is_checked: bool = True

    def warning(self, fields: list[str]) -> str:
        """One sentence for all `fields` in which it is left out."""
        end = "; the answer is checked against it afterwards." if self.is_checked else "."
        return f"{self.subject} at {listed(fields)} {self.reason}{end}"
