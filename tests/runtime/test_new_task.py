"""Tests that a new task needs only one entry in the table of tasks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import granite4v
from granite4v.cli.main import app
from granite4v.errors import AnswerError
from granite4v.runtime.extract.record import decode, encode
from granite4v.runtime.formats import TASKS, Cell, Table, Task, read, salvage
from granite4v.runtime.formats.repetition import MOST_ROWS, Repetition
from granite4v.runtime.formats.rows import Rows
from granite4v.runtime.formats.table import with_header_rows
from granite4v.runtime.formats.tasks import task_or_question
from granite4v.runtime.grammar.automaton import Next, Rule, Text
from granite4v.runtime.model import Model
from tests.helpers.constrained import KINDS, generated
from tests.helpers.fake_model import FakeModel, make_scans, run

NAME = "chart2pairs"


@dataclass(frozen=True)
class Pairs:
    """The grammar of 'name=value;' repeated, with a '.' at the end; names and values contain no ';', '=' or '.'."""

    in_value: bool = False
    ended: bool = False
    begun: bool = False

    def next(self) -> Next:
        if self.ended:
            return Next((), is_accepting=True)
        if self.in_value:
            return Next((b";",), Text(marks=b";=.", non_blank=True), initial_literals=())
        return Next((b"=",), Text(marks=b";=.", non_blank=True), initial_literals=(b".",) if self.begun else ())

    def after(self, literal: bytes) -> Rule:
        if literal == b".":
            return replace(self, ended=True)
        return Pairs(in_value=literal == b"=", begun=True)


def read_pairs(text: str) -> Table:
    pairs = re.findall(r"([^;=.]+)=([^;=.]+);", text)
    if "".join(f"{name}={value};" for name, value in pairs) + "." != text or not pairs:
        raise AnswerError(f"{text!r:.60} is not a list of pairs; expected 'name=value;' and '.'.")
    cells = [Cell(i, j, cell) for i, pair in enumerate([("name", "value"), *pairs]) for j, cell in enumerate(pair)]
    return with_header_rows(len(pairs) + 1, 2, 1, cells)


def salvage_pairs(text: str) -> tuple[Table | None, bool]:
    complete = text.endswith(".")
    kept = text[: text.rfind(";") + 1] + "."
    return (read_pairs(kept) if len(kept) > 1 else None), complete


NEW = Task(NAME, "chart", "csv", read_pairs, salvage_pairs, rule=Pairs(), rows=Rows(";", re.compile(r"[=\s]+")))


@pytest.fixture
def new_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, NAME, NEW)


class PairsModel(FakeModel):
    def __init__(self, path: Path) -> None:
        super().__init__(path, known=("tables_html", NAME))
        self.answers[f"<{NAME}>"] = "shade={shade};"


def test_the_task_is_unknown_before() -> None:
    with pytest.raises(ValueError, match=f"unknown task '{NAME}'"):
        granite4v.grammar_for(NAME)


@pytest.mark.usefixtures("new_task")
def test_documents_are_read_for_it(tmp_path: Path) -> None:
    model = PairsModel(tmp_path / "m.gguf")
    options: dict[str, Any] = {"out": tmp_path / "out", "unconstrained": False, "report": True, "formats": ()}
    model.answers[f"<{NAME}>"] = "shade={shade};."
    with run(model, make_scans(tmp_path / "scans"), ("tables_html", NAME), **options) as extraction:
        records = [record for record in extraction if record.task == NAME]
    found = [record for record in records if record.error is None]
    assert [record.value.texts()[1:] for record in found[:2]] == [[["shade", "10"]], [["shade", "20"]]]
    assert all(record.valid and record.kind == "chart" for record in found)
    assert [decode(encode(record)) for record in records] == records
    assert (tmp_path / "out" / f"c.{NAME}.csv").read_text() == "name,value\nshade,20\n"
    assert {held["constraint"].rule for held in model.held} == {NEW.rule, TASKS["tables_html"].rule}
    assert NAME in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("new_task")
def test_a_cut_answer_is_kept_up_to_its_last_row(tmp_path: Path) -> None:
    model = PairsModel(tmp_path / "m.gguf")
    (record, *_) = run(model, make_scans(tmp_path / "scans") / "c.png", (NAME,))
    assert record.salvaged and record.valid and record.value.texts() == [["name", "value"], ["shade", "20"]]
    assert "is not a list of pairs" in str(record.validity_error)


@pytest.mark.usefixtures("new_task")
def test_the_command_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PairsModel(tmp_path / "m.gguf")
    model.answers[f"<{NAME}>"] = "shade={shade};."
    monkeypatch.setattr(Model, "load", lambda *_, **__: model)
    scan = make_scans(tmp_path / "scans") / "c.png"
    arguments = ["extract", str(scan), "--task", NAME, "--model", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["value"] == [["name", "value"], ["shade", "20"]]
    done = CliRunner().invoke(app, [*arguments, "--format", "md"])
    assert done.stdout.splitlines()[0].startswith("| name")
    done = CliRunner().invoke(app, ["extract", str(scan), "--task", "tables", "--model", str(tmp_path)])
    assert done.exit_code == 2 and NAME in done.stderr


def test_the_help_lists_it() -> None:
    code = f"""
from dataclasses import replace
from granite4v.runtime.formats import TASKS
TASKS["{NAME}"] = replace(TASKS["chart2csv"], name="{NAME}")
from granite4v.cli.main import app
app(["extract", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert all(f"{name}" in text for name in (*TASKS, NAME)), done.stderr


@pytest.mark.usefixtures("new_task")
def test_answers_are_held_to_its_grammar() -> None:
    grammar = granite4v.grammar_for(f"<{NAME}>")
    assert grammar is not None
    n_ended = 0
    for kind in KINDS:
        for seed in range(10):
            answer = generated(kind, grammar, seed, patience=5, closing=(b"=", b";", b"."))
            if answer.finish_reason == "stop" or answer.closing is not None:
                assert isinstance(read(NAME, answer.text), Table) or answer.text == "."
                n_ended += 1
    assert n_ended > 10
    saved = salvage(NAME, "a=1;b=2;c")
    assert saved is not None and saved.cut and saved.value.texts() == [["name", "value"], ["a", "1"], ["b", "2"]]


@pytest.mark.usefixtures("new_task")
def test_its_rows_are_watched_for_repetition() -> None:
    watch = Repetition(task_or_question(NAME).rows)
    assert [watch.push("a=1;") for _ in range(MOST_ROWS)] == [False] * (MOST_ROWS - 1) + [True]
