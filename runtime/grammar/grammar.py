"""What the answers to a task look like, as plain data; `grammar_state` compiles it for a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field

from granite4v.runtime.grammar.automaton import Rule


@dataclass(frozen=True)
class Grammar:
    """The answers that are allowed for `task`: those of an automaton that starts at `rule`, else the JSON text of the
    instances of `schema`, a JSON schema as text.

    `warnings`: what the schema requires beyond the grammar. An answer can break it, so it has to be checked.
    """

    task: str
    rule: Rule | None = None
    schema: str = ""
    warnings: tuple[str, ...] = field(default=(), compare=False)
