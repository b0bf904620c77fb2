"""The questions asked about every page: task tags that the model's template knows, schema fields, a custom prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from granite4v.errors import ArgumentError, PromptError
from granite4v.runtime.extract.schema import Schema
from granite4v.runtime.formats import TASKS
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.formats.tasks import QUESTION, Task, find_task
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.known_tasks import Prepares, is_known, words_for
from granite4v.runtime.prompt.template import TAG


@dataclass(frozen=True)
class Question:
    """One task and its prompt: a tag that the model's template expands, or the full text.

    `constraint`: the grammar that constrains the answer, as `Model.generate` takes it; None for an unconstrained
    answer.
    """

    task: str
    prompt: str
    schema: Schema | None = None
    constraint: Grammar | None = None

    @property
    def prompt_sha256(self) -> str:
        return hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).hexdigest()


def check_tasks(tasks: Sequence[str], prompt: str | None, *, has_schema: bool) -> tuple[str, ...]:
    """Returns the task names, each once, without angle brackets; `prompt` adds the task 'prompt' at the end.

    Raises ArgumentError when they are invalid for any model.
    """
    names = list(dict.fromkeys(task.strip().removeprefix("<").removesuffix(">") for task in tasks))
    for name in names:
        if name not in (*TASKS, QUESTION.name):
            raise ArgumentError(
                f"there is no task '{name}'; known are {', '.join(TASKS)}, and a question by 'prompt' (--prompt)."
            )
    if QUESTION.name in names and prompt is None:
        raise ArgumentError("the task 'prompt' needs a question; give it by 'prompt' (--prompt).")
    if prompt is not None:
        _check_prompt(prompt)
        names = [*(name for name in names if name != QUESTION.name), QUESTION.name]
    if not names:
        raise ArgumentError(f"no task; give one or more of {', '.join(TASKS)}, or a question by 'prompt' (--prompt).")
    with_schema = [name for name in names if find_task(name).takes_schema]
    if with_schema and not has_schema:
        raise ArgumentError(
            f"the task '{with_schema[0]}' needs a schema of the fields to extract; give it by 'schema' (--schema)."
        )
    if has_schema and not with_schema:
        raise ArgumentError(f"a schema belongs to {_schema_tasks()}, which is not among {', '.join(names)}; add it.")
    return tuple(names)


def _schema_tasks() -> str:
    named = [f"'{task.name}'" for task in TASKS.values() if task.takes_schema]
    return f"the task {' or '.join(named)}"


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise ArgumentError("the question by 'prompt' is empty.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # a lone surrogate: Python's form of command-line bytes that are not UTF-8
        raise ArgumentError(
            f"the question by 'prompt' is not UTF-8 text at character {error.start + 1}; check the encoding of the "
            "terminal or of the file that it comes from."
        ) from None
    tags = {task.tag for task in TASKS.values()}
    found = [tag for tag in TAG.findall(prompt) if tag in tags]
    if found:
        raise ArgumentError(
            f"the question by 'prompt' has the task tag '{found[0]}', in place of which the model's template would "
            f"throw the question away; give it as a task, {found[0].strip('<>')}, beside the question."
        )


def questions(
    model: Prepares, tasks: Sequence[str], prompt: str | None, schema: Schema | None, *, unconstrained: bool
) -> tuple[Question, ...]:
    """Returns the question for each of `tasks` (see `check_tasks`), worded for this model's template.

    `unconstrained`: without grammars. Raises PromptError for a task that the template does not know.
    """
    asked = [find_task(task) for task in tasks]
    unknown = [task.name for task in asked if not is_known(model, task)]
    if unknown:
        known = [task.name for task in TASKS.values() if task.name not in unknown and is_known(model, task)]
        raise PromptError(
            f"the model's chat template does not know the task '{unknown[0]}'; it knows "
            f"{', '.join(known)}, and any model takes a question by 'prompt' (--prompt)."
        )
    return tuple(
        _question(model, task, prompt or "", schema if task.takes_schema else None, unconstrained=unconstrained)
        for task in asked
    )


def _question(model: Prepares, task: Task, prompt: str, schema: Schema | None, *, unconstrained: bool) -> Question:
    words = words_for(model, task) if schema is None else task.question(schema.content)
    text = prompt if task is QUESTION else words
    return Question(task.name, text, schema, None if unconstrained else _grammar(task.name, schema))


def schema_warnings(asked: Sequence[Question]) -> list[str]:
    """Returns notes for the author of the schema, and the parts of it that do not constrain answers."""
    warnings: list[str] = []
    for question in asked:
        if question.schema is not None:
            warnings += question.schema.warnings
        if question.constraint is not None:
            warnings += [f"in the schema, {warning}" for warning in question.constraint.warnings]
    return warnings


def _grammar(task: str, schema: Schema | None) -> Grammar | None:
    return grammar_for(task, None if schema is None else schema.checked)
