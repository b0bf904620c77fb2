"""Tests that POST /parse reads answers as `granite4v.runtime.formats` does, and that /v1/models lists its tasks."""

from __future__ import annotations

import json

import pytest

from granite4v.runtime.formats import TASKS, read, salvage, write
from tests.helpers.served import Served
from tests.helpers.tables import PLAIN_TEXTS, random_table

FORMATS = {"tables_html": "html", "tables_json": "json", "tables_otsl": "otsl", "chart2csv": "csv"}


@pytest.mark.parametrize("task", FORMATS)
def test_tables_and_charts(tiny: Served, task: str) -> None:
    text = write(random_table(7, PLAIN_TEXTS), FORMATS[task])
    value = read(task, text)
    tables = [value] if task == "chart2csv" else value
    for name in (task, f"<{task}>"):
        reply = tiny.post("/parse", {"task": name, "text": text})
        assert reply.status == 200 and reply.json == {
            "kind": TASKS[task].kind,
            "value": None,
            "tables": [json.loads(write(table, "json")) for table in tables],
            "csv": [write(table, "csv") for table in tables],
            "is_cut": False,
            "error": None,
        }


def test_of_an_answer_that_has_not_ended_what_is_complete(tiny: Served) -> None:
    text = "<table><tr><td>1</td></tr><tr><td>2"
    saved = salvage("tables_html", text)
    assert saved is not None
    reply = tiny.post("/parse", {"task": "tables_html", "text": text, "ended": False}).json
    assert reply["tables"] == [json.loads(write(table, "json")) for table in saved.value]
    assert (reply["is_cut"], reply["error"]) == (True, None)
    assert tiny.post("/parse", {"task": "kvp", "text": "", "ended": False}).json["value"] is None


def test_an_answer_in_another_form_says_what_is_wrong(tiny: Served) -> None:
    reply = tiny.post("/parse", {"task": "tables_html", "text": "<table><tr><td>1</td></tr><td>2"}).json
    assert reply["tables"][0]["dimensions"]["total_rows"] == 1 and "expected '</table>'" in reply["error"]


@pytest.mark.parametrize(
    ("task", "text", "value"),
    [
        ("kvp", '{"a": [1, null]}', {"a": [1, None]}),
        ("chart2code", "```python\nx = 1\n```", "x = 1"),
        ("prompt", " It is. ", "It is."),
    ],
)
def test_fields_code_and_prose(tiny: Served, task: str, text: str, value: object) -> None:
    reply = tiny.post("/parse", {"task": task, "text": text}).json
    assert reply["value"] == value and reply["tables"] is None and not reply["is_cut"]


def test_an_unknown_task_is_refused(tiny: Served) -> None:
    reply = tiny.post("/parse", {"task": "tables_xml", "text": ""})
    assert (reply.status, reply.error["param"]) == (400, "task") and "known: " in reply.error["message"]


def test_the_model_lists_the_tasks_it_knows(nano: Served) -> None:
    tasks = nano.get("/v1/models").json["data"][0]["meta"]["tasks"]
    assert {"name": "tables_html", "tag": "<tables_html>", "kind": "tables", "takes_schema": False} in tasks
    assert {"name": "kvp", "tag": None, "kind": "fields", "takes_schema": True} in tasks
    assert {task["name"] for task in tasks} <= TASKS.keys()
