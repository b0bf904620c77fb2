"""Makes the grammar of a task's answers.

Separate from the table of tasks: checking a schema needs jsonschema and llguidance, and the table is also read where
neither may be imported (for the help text of the command line).
"""

from __future__ import annotations

from granite4v.errors import ArgumentError
from granite4v.runtime.formats.tasks import TASKS, find_task
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.schema import definite


def grammar_for(task: str, schema: object = None) -> Grammar | None:
    """The grammar of a task, named with or without angle brackets; None if its answers are free text.

    `schema` is the JSON Schema for 'kvp', by default any object. Raises ConstraintError for a schema that is invalid,
    that no answer can satisfy or that cannot be enforced, ArgumentError for an unknown task or a schema for a task that
    does not take one.
    """
    found = find_task(task)
    if found.takes_schema:
        text, warnings = definite({"type": "object"} if schema is None else schema)
        return Grammar(found.name, schema=text, warnings=warnings)
    if schema is not None:
        takers = " and ".join(f"'{one.name}'" for one in TASKS.values() if one.takes_schema)
        raise ArgumentError(f"a schema for {task!r}; only {takers} takes one.")
    return None if found.rule is None else Grammar(found.name, rule=found.rule)
