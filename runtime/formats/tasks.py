"""The table of tasks: how each is prompted, the format of its answers, and what they are parsed into.

A new task is one entry here. The Python API, the command line, grammars, parsers, records, files and the detection of
repeated rows all follow this table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from granite4v.errors import ArgumentError
from granite4v.runtime.formats.csv_ import CSV_ROWS, csv_places, read_csv, salvage_csv
from granite4v.runtime.formats.csv_grammar import CSV
from granite4v.runtime.formats.fields import FIELDS_ROWS, KVP_PROMPT, field_places, read_fields, salvage_fields
from granite4v.runtime.formats.html import HTML_ROWS, html_places, read_html, salvage_html
from granite4v.runtime.formats.html_grammar import HTML
from granite4v.runtime.formats.json_values import replace_surrogates
from granite4v.runtime.formats.otsl import OTSL_ROWS, otsl_places, read_otsl, salvage_otsl
from granite4v.runtime.formats.otsl_grammar import OTSL
from granite4v.runtime.formats.place import Place, whole
from granite4v.runtime.formats.repetition import without_loop
from granite4v.runtime.formats.rows import LINES, Rows
from granite4v.runtime.formats.table import Table
from granite4v.runtime.formats.tables_json import (
    TABLES_JSON_ROWS,
    read_tables_json,
    salvage_tables_json,
    tables_json_places,
)
from granite4v.runtime.formats.tables_json_grammar import CELLS
from granite4v.runtime.formats.text import (
    PAGE_PROMPT,
    read_code,
    read_page,
    read_prose,
    salvage_code,
    salvage_page,
    salvage_prose,
)
from granite4v.runtime.grammar.automaton import Rule

# what `read` returns: a list of Table, a Table of chart data, a dict or list, or text (code and prose)
Kind: TypeAlias = Literal["tables", "chart", "fields", "code", "prose"]


@dataclass(frozen=True)
class Task:
    """One task.

    `read` parses an answer into a value of `kind` and raises AnswerError. `salvage` returns the complete part of a
    truncated answer (None if there is none), and whether that is all of it. `suffix`: of a file with a value in the
    format of the answers. `rule`: the start of the answers' automaton, None if they have no such grammar. `rows`: how
    an answer is split into rows. `places`: locates the cells or fields of an answer, perhaps with some that the value
    lacks; by default, the answer is one place. `prompt`: the text to ask with, if it is not the task's tag; a JSON
    Schema that answers have to be valid against replaces '{schema}' in it.
    """

    name: str
    kind: Kind
    suffix: str
    read: Callable[[str], Any]
    salvage: Callable[[str], tuple[Any, bool]]
    rule: Rule | None = None
    rows: Rows = LINES
    places: Callable[[str], list[Place]] = whole
    prompt: str | None = None

    @property
    def tag(self) -> str | None:
        """The tag that the model's chat template replaces with the task's prompt; None if the task has its own."""
        return f"<{self.name}>" if self.prompt is None else None

    @property
    def takes_schema(self) -> bool:
        return self.prompt is not None and "{schema}" in self.prompt

    def question(self, schema: Mapping[str, Any] | None = None) -> str:
        """The text to ask with: the tag, or the task's own prompt, with the JSON Schema filled in if it takes one."""
        text = self.tag or self.prompt or ""
        return text if schema is None else text.format(schema=json.dumps(schema, indent=2, ensure_ascii=False))

    @property
    def gives_tables(self) -> bool:
        """Whether values are tables, which can be written in any format."""
        return self.kind in ("tables", "chart")


TASKS = {
    task.name: task
    for task in (
        Task("chart2csv", "chart", "csv", read_csv, salvage_csv, rule=CSV, rows=CSV_ROWS, places=csv_places),
        Task("chart2code", "code", "py", read_code, salvage_code),
        Task("chart2summary", "prose", "md", read_prose, salvage_prose),
        Task("tables_html", "tables", "html", read_html, salvage_html, rule=HTML, rows=HTML_ROWS, places=html_places),
        Task(
            "tables_json",
            "tables",
            "json",
            read_tables_json,
            salvage_tables_json,
            rule=CELLS,
            rows=TABLES_JSON_ROWS,
            places=tables_json_places,
        ),
        Task("tables_otsl", "tables", "otsl", read_otsl, salvage_otsl, rule=OTSL, rows=OTSL_ROWS, places=otsl_places),
        Task("page_md", "prose", "md", read_page, salvage_page, prompt=PAGE_PROMPT),
        Task(
            "kvp",
            "fields",
            "json",
            read_fields,
            salvage_fields,
            rows=FIELDS_ROWS,
            places=field_places,
            prompt=KVP_PROMPT,
        ),
    )
}
# the user's own question: any model takes one, so it is not among the tasks that a template may lack
QUESTION = Task("prompt", "prose", "md", read_prose, salvage_prose, prompt="")


@dataclass(frozen=True)
class Salvaged:
    """The complete part of an answer. `cut` is False only if the format itself shows that nothing is missing."""

    value: Any
    cut: bool


def find_task(name: str) -> Task:
    """The entry of a task, named with or without angle brackets; 'prompt' is QUESTION.

    Raises ArgumentError for other names.
    """
    bare = name.strip().removeprefix("<").removesuffix(">")
    if bare == QUESTION.name:
        return QUESTION
    if bare not in TASKS:
        raise ArgumentError(f"unknown task {name!r}; known: {', '.join(TASKS)}.")
    return TASKS[bare]


def task_or_question(name: str) -> Task:
    """The entry of a task; QUESTION for any other name, whose answers are treated as text."""
    return TASKS.get(name, QUESTION)


def read(task: str, text: str) -> Any:
    """Parses an answer: tables (list of Table), a chart's data (Table), fields (dict or list), code or prose (str).

    `task`: as for `find_task`; 'kvp' is the key-value prompt. Raises AnswerError when the answer is not in the task's
    format, ArgumentError for an unknown task.
    """
    return find_task(task).read(replace_surrogates(text))


def salvage(task: str, text: str) -> Salvaged | None:
    """What `read` would return for the complete rows (tables, CSV), fields (kvp) or lines (code) of a truncated answer.

    A cell that reaches below the last row is shortened. An answer that is invalid in the middle is kept up to there,
    one that loops up to the end of the first round. None if nothing is complete.
    """
    found = find_task(task)
    value, complete = found.salvage(without_loop(replace_surrogates(text), found.rows))
    return Salvaged(value, not complete) if value or complete else None


def places(task: str, text: str, value: Any) -> list[Place]:
    """Locates the cells or fields of a value in the answer that `read` or `salvage` parsed it from, in the order of the
    text. Code and prose have one place, the whole text. A cell or field that is not written anywhere has no place.

    `task`: as for `find_task`. Raises ArgumentError for an unknown task.
    """
    found = find_task(task)
    tables = ([value] if isinstance(value, Table) else value) if found.gives_tables else ()
    cells = {(number, cell.row, cell.col) for number, table in enumerate(tables) for cell in table.cells}
    return [
        place
        for place in found.places(replace_surrogates(text))
        if (place.key in cells if found.gives_tables else found.kind != "fields" or _has(value, str(place.key)))
    ]


def _has(value: Any, pointer: str) -> bool:
    """Whether a JSON value has a string, number, literal or empty container at a JSON pointer."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and int(name) < len(value):
            value = value[int(name)]
        else:
            return False
    return not value or not isinstance(value, dict | list)
