"""Tests of batches with a fake model: order, failures, repeated pages, and resuming wherever a run ended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from granite4v.errors import (
    ConstraintError,
    ContextOverflowError,
    DocumentError,
    ModelFileError,
    OutputError,
    PromptError,
)
from granite4v.runtime.documents import SelectionError
from granite4v.runtime.extract import ArgumentError, Record, State, batch
from granite4v.runtime.extract import run as run_module
from granite4v.runtime.extract.parsed_answer import parse_answer
from granite4v.runtime.extract.questions import check_tasks
from granite4v.runtime.extract.record import decode, encode
from granite4v.runtime.extract.schema import load_schema
from granite4v.runtime.formats.fields import KVP_PROMPT
from granite4v.runtime.formats.json_values import MAX_NESTING
from tests.helpers.fake_model import SCHEMA, FakeModel, run, without_timings


def test_every_page_and_task_in_order_each_on_the_disk_first(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found: list[Record] = []
    for record in run(model, scans, out=out):
        found.append(record)
        assert len((out / "results.jsonl").read_bytes().splitlines()) == len(found)
    keys = [(Path(record.source).name, record.page, record.task) for record in found]
    pages = [("a.pdf", 1), ("a.pdf", 2), ("a.pdf", 3), ("b.pdf", None), ("c.png", 1), ("d.bmp", 1)]
    assert keys == [(*page, task) for page in pages for task in ("tables_html", "kvp")]
    assert [
        Record.from_dict(line) for line in map(json.loads, (out / "results.jsonl").read_text().splitlines())
    ] == found
    first = found[1]
    assert first.value == {"shade": 10} and first.valid and first.finish_reason == "stop" and first.n_pages == 3
    assert first.timings["n_generated"] == len('{"shade": 10}') and first.timings["seconds"] >= 0
    assert len(first.model["text"]) == 64 and first.schema_sha256 and first.prompt_sha256 and first.digest
    assert found[0].tables[0].texts() == [["shade"], ["10"]]
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert names == [
        "a.kvp.json", "a.tables_html.html", "c.kvp.json", "c.tables_html.html", "d.kvp.json", "d.tables_html.html",
        "results.jsonl", "run.json",
    ]  # fmt: skip
    assert json.loads((out / "a.kvp.json").read_text())[2] == {"page": 3, "fields": {"shade": 30}}
    assert not model.closed  # the caller opened it


def test_pages_with_the_same_pixels_are_read_once(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    for out in (None, tmp_path / "out"):
        model.asked.clear()
        *_, record = run(model, scans, ("chart2csv",), out=out)
        assert Path(record.source).name == "d.bmp" and record.valid and record.tables[0].texts()[1] == ["a", "20"]
        assert record.copy_of is not None and Path(record.copy_of["source"]).name == "c.png"
        assert not any(record.timings.values())
        assert len(model.asked) == 4 and model.asked[-1][1] == 20


def test_a_failure_is_a_record_and_the_rest_goes_on(model: FakeModel, scans: Path) -> None:
    def fail(prompt: str, shade: int) -> None:
        if shade == 20 and prompt == "<tables_html>":
            raise ContextOverflowError("too long")

    model.fail = fail
    with run(model, [scans / "b.pdf", scans / "c.png", scans / "gone.png"]) as records:
        found = list(records)
        counts = records.state.counts
    assert [record.error for record in found][2:4] == ["too long", None]
    assert "b.pdf" in str(found[0].error) and "gone.png" in str(found[-1].error)
    assert (counts.n_records, counts.n_failed, counts.n_invalid) == (6, 5, 0)
    assert all(record.value is None and record.text == "" and record.failed for record in found if record.error)


@pytest.mark.parametrize("error", [ModelFileError("damaged"), KeyboardInterrupt()])
def test_what_would_fail_every_page_ends_the_run(
    model: FakeModel, scans: Path, tmp_path: Path, error: BaseException
) -> None:
    def fail(prompt: str, shade: int) -> None:
        if len(model.asked) == 4:
            raise error

    model.fail = fail
    with pytest.raises(type(error)):
        list(run(model, scans, out=tmp_path / "out"))
    model.fail = lambda prompt, shade: None
    rest = list(run(model, scans, out=tmp_path / "out", resume=True))
    assert len(rest) == 12 - 3


@pytest.mark.parametrize("n", [0, 1, 2, 5, 7, 8, 11, 12])
def test_wherever_it_ended_it_goes_on_to_the_same_end(model: FakeModel, scans: Path, tmp_path: Path, n: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options: dict[str, Any] = {"report": True, "formats": ["csv", "docling"]}
    n_asked = len(list(run(model, scans, out=whole, **options))) and len(model.asked)
    model.asked.clear()
    first = run(model, scans, out=broken, **options)
    for _ in range(n):
        next(first)
    first.close()
    second = run(model, scans, out=broken, resume=True, **options)
    assert len(list(second)) == 12 - n and second.state.n_resumed == n
    assert without_timings(broken / "results.jsonl") == without_timings(whole / "results.jsonl")
    assert len(model.asked) == n_asked  # nothing was asked twice
    files = [{path.name for path in out.iterdir()} for out in (whole, broken)]
    assert files[0] == files[1] and "a.docling.json" in files[0] and "a.tables_html.page3.csv" in files[0]
    for name in files[0] - {"results.jsonl", "report.html", ".granite4v-pages"}:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_what_a_callback_raises_ends_the_run_and_is_no_failed_page(model: FakeModel, scans: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise RuntimeError("the caller has seen enough")

    with run(model, scans, ["chart2csv"]) as records:
        next(records)
        records.progress = stop
        with pytest.raises(RuntimeError, match="the caller has seen enough"):
            next(records)
        assert (records.state.counts.n_records, records.state.counts.n_failed) == (1, 0)


def test_a_run_that_is_not_used_up_gives_its_directory_back(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    with run(model, scans, out=tmp_path / "out") as records:
        next(records)
        with pytest.raises(OutputError, match="another process is writing"):
            run(model, scans, out=tmp_path / "out", resume=True)
    assert len(list(run(model, scans, out=tmp_path / "out", resume=True))) == 11
    assert list(records) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schema": {"type": "array"}},
            r"another run: the schema differs \([0-9a-f]{12}... then, [0-9a-f]{12}... now\)\.",
        ),
        ({"max_tokens": 7}, "max_tokens none then and 7 now"),
        ({"crop": (0, 0, 5, 5)}, "the crop differs .none then, 0,0,5,5 now"),
        ({"unconstrained": False}, "unconstrained true then and false now"),
        ({"password": "x", "formats": ["csv"]}, ""),
        ({"tasks": ["tables_html"]}, ""),
        ({"pages": "1"}, ""),
    ],
)
def test_a_changed_job_is_refused(
    model: FakeModel, scans: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    list(run(model, scans, out=tmp_path / "out"))
    if not message:
        assert list(run(model, scans, out=tmp_path / "out", resume=True, **options)) == []
        return
    with pytest.raises(OutputError, match=message):
        run(model, scans, out=tmp_path / "out", resume=True, **options)


def test_another_model_is_refused(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    list(run(model, scans, out=tmp_path / "out"))
    model.files.text.path.write_bytes(b"other weights")
    with pytest.raises(OutputError, match=r"the model's files differ \(text"):
        run(model, scans, out=tmp_path / "out", resume=True)


def test_the_same_page_given_twice_is_one(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    assert len(list(run(model, [scans / "c.png", scans, scans / "c.png"], out=tmp_path / "out"))) == 12
    assert not (tmp_path / "out" / "c-2.kvp.json").exists()


def test_answers_have_the_room_that_is_left(model: FakeModel, scans: Path) -> None:
    list(run(model, scans / "c.png", ["chart2csv"], max_tokens=9))
    list(run(model, scans / "c.png", ["chart2csv"]))
    model.n_ctx = 1500
    list(run(model, scans / "c.png", ["chart2csv"]))
    model.n_ctx = 1_000_000
    list(run(model, scans / "c.png", ["chart2csv"]))
    assert [n for _, _, n in model.asked] == [9, 4000, 500, 4096]


def test_what_is_asked(model: FakeModel, scans: Path) -> None:
    list(run(model, scans / "c.png", ["<chart2csv>", "kvp", "chart2csv"], prompt="How bright?"))
    prompts = [prompt for prompt, _, _ in model.asked]
    assert prompts == ["<chart2csv>", KVP_PROMPT.format(schema=json.dumps(SCHEMA, indent=2)), "How bright?"]
    known = "it knows chart2csv, tables_html, page_md, kvp"
    with pytest.raises(PromptError, match=f"does not know the task 'tables_otsl'; {known}"):
        run(model, scans, ["chart2csv", "tables_otsl"])


@pytest.mark.parametrize(
    ("tasks", "prompt", "has_schema", "message"),
    [
        (["ocr"], None, False, "there is no task 'ocr'; known are chart2csv"),
        ([], None, False, "no task; give one or more of"),
        (["kvp"], None, False, "needs a schema"),
        (["tables_html"], None, True, "a schema belongs to the task 'kvp'"),
        (["prompt"], None, False, "needs a question"),
        ([], " ", False, "is empty"),
        ([], "<tables_html> of page 2", False, "has the task tag '<tables_html>'"),
    ],
)
def test_tasks_that_cannot_be_asked(tasks: list[str], prompt: str | None, has_schema: bool, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        check_tasks(tasks, prompt, has_schema=has_schema)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resume": True}, ArgumentError, "'resume' needs a directory"),
        ({"report": True}, ArgumentError, "'report' needs a directory"),
        ({"formats": ["docling"]}, ArgumentError, "the format 'docling' needs a directory"),
        ({"formats": ["xls"]}, ArgumentError, "there is no format 'xls'; known are csv"),
        ({"max_tokens": 0}, ArgumentError, "max_tokens is 0"),
        ({"max_tokens": "9"}, ArgumentError, "max_tokens is '9'; expected an integer"),
        ({"pages": "x"}, SelectionError, "the pages 'x'"),
        ({"crop": "1,2"}, SelectionError, "the crop '1,2'"),
        ({"crop": 3}, SelectionError, "the crop '3'"),
        ({"pages": 1}, ArgumentError, "pages is 1; expected text"),
        ({"password": b"x"}, ArgumentError, "password is b'x'; expected text"),
        ({"prompt": 3}, ArgumentError, "prompt is 3; expected text"),
        ({"tasks": [3]}, ArgumentError, "'tasks' holds 3; expected names"),
        ({"formats": None}, ArgumentError, "'formats' holds None; expected names"),
        ({"out": 3}, ArgumentError, "'out' is 3; expected a directory"),
        ({"inputs": 3}, ArgumentError, "an input is 3; expected a path"),
        ({"inputs": [None]}, ArgumentError, "an input is None; expected a path"),
        ({"inputs": b"a.png"}, ArgumentError, "an input is b'a.png'; expected a path"),
        ({"inputs": []}, ArgumentError, "no input"),
        ({"inputs": "gone.pdf"}, DocumentError, "there is no file or directory 'gone.pdf'"),
        ({"schema": {"a": 1}}, ArgumentError, "does not define any fields|a schema belongs"),
    ],
)
def test_requests_that_cannot_be(
    model: FakeModel, scans: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(model, **{"inputs": scans, "tasks": ["chart2csv"], **options})


def test_a_model_that_is_none_is_refused(scans: Path) -> None:
    model: Any = 3
    with pytest.raises(ArgumentError, match="the model is 3; expected a path"):
        run(model, scans, ["chart2csv"])


def test_a_request_that_is_refused_leaves_no_directory(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError):
        run(model, scans, ["tables_otsl"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "text", "reason", "expected"),
    [
        ("chart2csv", "a,b\n1,2\n", "stop", ([["a", "b"], ["1", "2"]], True, False)),
        ("chart2csv", "a,b\n1,2\n3,45", "length", ([["a", "b"], ["1", "2"]], True, True)),
        ("chart2csv", "a,b\n1,2\n3", "stop", ([["a", "b"], ["1", "2"]], True, True)),
        ("chart2csv", "a,", "length", (None, False, False)),
        ("kvp", '{"shade": 5}', "stop", ({"shade": 5}, True, False)),
        ("kvp", '{"shade": 5}', "length", ({"shade": 5}, True, False)),
        ("kvp", '{"shade": 5, "mo', "repetition", ({"shade": 5}, True, True)),
        ("kvp", '{"shade": "dark"}', "stop", ({"shade": "dark"}, False, False)),
        ("kvp", '{"mood": "dark", "sh', "length", ({"mood": "dark"}, False, True)),
        ("kvp", "no", "stop", (None, False, False)),
        ("prompt", " Yes. ", "stop", ("Yes.", True, False)),
        ("prompt", " Yes", "length", ("Yes", True, True)),
        ("prompt", "", "stop", (None, False, False)),
    ],
)
def test_answers_are_understood_as_far_as_they_go(
    task: str, text: str, reason: str, expected: tuple[Any, bool, bool]
) -> None:
    reading = parse_answer(task, text, reason, load_schema(SCHEMA) if task == "kvp" else None)
    value = reading.value.texts() if hasattr(reading.value, "texts") else reading.value
    assert (value, reading.valid, reading.salvaged) == expected
    assert (reading.validity_error is None) == (reading.valid and not reading.salvaged)


@pytest.mark.parametrize("levels", [MAX_NESTING, MAX_NESTING + 1, 300, 600, 5000, 100_000])
@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("task", ["kvp", "tables_json", "chart2csv", "tables_html", "prompt"])
def test_an_answer_of_any_depth_is_a_record(task: str, reason: str, levels: int) -> None:
    texts = {"tables_html": "<table><tr><td>" * levels, "kvp": '{"a":' * levels + "1" + "}" * levels}
    reading = parse_answer(task, texts.get(task, "[" * levels + "1" + "]" * levels), reason, None)
    if task == "kvp" and reason == "stop":
        assert reading.valid == (levels <= MAX_NESTING)
    record = Record("a", 1, 1, task, value=reading.value)
    assert decode(encode(record)) == record


def test_an_answer_that_json_cannot_carry_is_a_record_without_a_value(
    model: FakeModel, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("granite4v.runtime.extract.parsed_answer.read", lambda task, text: {"shade": float("inf")})
    found = list(run(model, scans / "c.png", ("kvp",), out=tmp_path / "out", report=True))
    assert (found[0].value, found[0].valid, found[0].error) == (None, False, None)
    assert "cannot be kept" in str(found[0].validity_error) and "20" in found[0].text
    assert len(without_timings(tmp_path / "out" / "results.jsonl")) == 1


def test_records_tell_what_they_are_about() -> None:
    record = Record("a", 1, 1, "kvp", value={"a": 1}, valid=True)
    assert not record.failed and replace(record, valid=False).failed and record.tables == []
    assert record.key == ("a", 1, "kvp")


def test_answers_are_held_to_their_form_unless_free(model: FakeModel, scans: Path) -> None:
    for options in ({}, {"fast_forward": False}, {"unconstrained": True}):
        list(
            run(
                model,
                scans / "c.png",
                ["tables_html", "kvp"],
                **{"unconstrained": False, **options},
                prompt="How bright?",
            )
        )
    constraints = [held["constraint"] for held in model.held]
    assert [constraint and constraint.task for constraint in constraints] == ["tables_html", "kvp", None] * 2 + [
        None
    ] * 3
    assert [held["fast_forward"] for held in model.held] == [True] * 3 + [False] * 3 + [True] * 3


def test_a_schema_that_answers_cannot_be_held_to_is_refused_before_the_first_page(
    model: FakeModel, scans: Path, tmp_path: Path
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 4}}}
    with pytest.raises(ConstraintError):
        run(model, scans, ["kvp"], schema=schema, unconstrained=False, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and model.asked == []


def test_files_that_were_left_out_and_documents_that_take_long_are_told(
    model: FakeModel, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str, int | None, float]] = []
    remarks: list[str] = []
    count, read = run_module.count_pages, batch.open_pages

    def slow_count(*arguments: Any, waiting: Any, **options: Any) -> Any:
        waiting("x.pdf", None, 2.5)
        return replace(count(*arguments, **options), notes=("2 files were left out",))

    def slow_open(*arguments: Any, waiting: Any, **options: Any) -> Any:
        for item in read(*arguments, **options):
            waiting(item.source, 7, 3.5)
            yield item

    monkeypatch.setattr(run_module, "count_pages", slow_count)
    monkeypatch.setattr(batch, "open_pages", slow_open)

    def watch(state: State) -> None:
        seen.append((state.n_documents, Path(state.source).name, state.page, state.waited_s))

    list(run(model, scans, ("chart2csv",), say=remarks.append, watch=watch))
    assert seen[0] == (0, "x.pdf", None, 2.5) and seen[1] == (0, "a.pdf", 7, 3.5) and seen[2] == (1, "a.pdf", 1, 0.0)
    assert remarks == ["2 files were left out"]


def test_a_page_is_asked_for_in_the_words_of_docling_or_by_a_tag(model: FakeModel, scans: Path) -> None:
    prompt = "Convert this page to markdown. Do not miss any text and only output the bare markdown!"
    model.answers[prompt] = model.answers["<page_md>"] = "```markdown\n# {shade}\n```"
    for known, asked in (((), prompt), (("page_md",), "<page_md>")):
        model.known, model.asked = known, []
        (record,) = run(model, [scans / "c.png"], ("page_md",))
        assert (record.value, record.valid, record.task) == ("# 20", True, "page_md")
        assert [one[0] for one in model.asked] == [asked]
