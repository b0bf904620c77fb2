"""Describes the allowed answers to a task as plain data; `grammar_state` compiles it for a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field

from granite4v.runtime.grammar.automaton import Rule


@dataclass(frozen=True)
class Grammar:
    """Defines the answers that are allowed for `task`: those of the automaton that starts at `rule` or, without a rule,
    JSON text that is valid against `schema` (a JSON Schema, as text).

    `warnings`: requirements of the schema that the grammar does not enforce. Answers have to be validated against them.
    """

    task: str
    rule: Rule | None = None
    schema: str = ""
    warnings: tuple[str, ...] = field(default=(), compare=False)
