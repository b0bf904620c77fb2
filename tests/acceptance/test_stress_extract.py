"""The checks of `granite4v extract` at small numbers: they pass, and notice a promise that is broken."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import granite4v
from granite4v.runtime.documents import Page, PageFailure, open_pages
from granite4v.runtime.engine.generate import Answer
from granite4v.runtime.formats.task_grammar import grammar_for
from tests.acceptance import stress_extract, stress_forms
from tests.acceptance.stress_batch import Batch, draw_page, make_batch, model_directory
from tests.acceptance.stress_extract import Pace, compare, expected_keys, main, memory_by_page, moments
from tests.acceptance.stress_forms import Case, Said, Talker, case_of, has_whole_row, judge, relaxed, verdict
from tests.acceptance.stress_reading import ask_for, explained, share_problems
from tests.acceptance.stress_schemas import SCHEMAS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(None, tmp_path_factory.mktemp("stress"))


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any], str]:
    """Status, what the last line on stdout says, and stderr."""
    status = main([*map(str, arguments), "--threads", "1"])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]), err


# --- pages ---


def test_a_batch_has_the_pages_it_says(tmp_path: Path) -> None:
    batch = make_batch(tmp_path / "batch", 24, seed=3, faults=True)
    found = list(open_pages([batch.folder]))
    assert [(item.source, item.number) for item in found] == list(batch.pages)
    pages = [item for item in found if isinstance(item, Page)]
    assert len(pages) == 24 and len({page.digest for page in pages}) == 23
    assert isinstance(found[-1], PageFailure)
    assert {Path(source).suffix for source, _ in batch.pages} == {".pdf", ".png", ".tiff", ".jpg", ".bmp"}


def test_pages_of_a_width_are_all_of_one_size(tmp_path: Path) -> None:
    batch = make_batch(tmp_path / "batch", 12, width_px=170)
    sizes = {item.size_px for item in open_pages([batch.folder]) if isinstance(item, Page)}
    assert sizes == {(170, 220)}


# --- kill ---


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a check left: 'batch', 'whole' and 'broken'."""
    work = tmp_path_factory.mktemp("kill") / "work"
    arguments = ("--pages", "4", "--kills", "3", "--max-tokens", "40", "--threads", "1")
    assert main(["kill", "--model", str(model), "--work", str(work), *arguments]) == 0
    return work


@pytest.mark.slow
def test_kill_says_what_it_saw(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told, err = run(capsys, "kill", "--model", model, "--pages", 2, "--kills", 2, "--max-tokens", 8)
    assert (status, told["check"], told["ok"], told["broken"]) == (0, "kill", True, [])
    assert (told["pages"], told["records"], told["kills"], told["status"]) == (2, 9, 2, 1)
    assert sum(told["stages"].values()) == len(told["records_at_kills"]) == 2
    assert "kill: 9 records of 2 pages after 2 kills" in err and "kill: ok" in err


def keys_of(work: Path) -> list[tuple[str, int | None, str]]:
    """By our own reader of pages."""
    pages = tuple((item.source, item.number) for item in open_pages([work / "batch"]))
    return expected_keys(Batch(work / "batch", pages), stress_extract.KILL_TASKS)


def change_lines(change: Callable[[list[bytes]], Any]) -> Callable[[Path], None]:
    def doctor(out: Path) -> None:
        lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
        change(lines)
        (out / "results.jsonl").write_bytes(b"".join(lines))

    return doctor


def change_record(**changes: Any) -> Callable[[Path], None]:
    def change(lines: list[bytes]) -> None:
        lines[1] = json.dumps({**json.loads(lines[1]), **changes}).encode() + b"\n"

    return change_lines(change)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("doctor", "problem"),
    [
        (lambda out: None, None),
        (change_record(timings={"seconds": 99}), None),
        (lambda out: rewrite(out / "report.html", b" s)", b" s)"), None),
        (change_lines(lambda lines: lines.pop()), "lacks"),
        (change_lines(lambda lines: lines.append(lines[0])), "has"),
        (change_lines(lambda lines: lines.reverse()), "differs in"),
        (change_lines(lambda lines: lines.append(lines.pop()[:-9])), "lacks"),
        (change_lines(lambda lines: lines.insert(2, b"{\n")), "no JSON"),
        (change_record(text="other"), "differs in text"),
        (change_record(surprise=1), "differs in surprise"),
        (lambda out: rewrite(out / "report.html", b"<title>", b"<title>x"), "'report.html' differs"),
        (lambda out: next(out.glob("*.html")).unlink(), "is in one directory only"),
        (lambda out: (out / "001.kvp.json.partial").write_bytes(b""), "is in one directory only"),
    ],
)
def test_what_was_doctored_is_noticed(
    killed: Path, tmp_path: Path, doctor: Callable[[Path], None], problem: str | None
) -> None:
    out = tmp_path / "out"
    shutil.copytree(killed / "broken", out)
    doctor(out)
    problems = compare(killed / "whole", out, keys_of(killed))
    assert problems == [] if problem is None else any(problem in text for text in problems), problems


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


@pytest.mark.slow
def test_a_run_that_forgets_is_a_broken_promise(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kill takes the last whole record along."""
    kill_at = stress_extract.kill_at

    def forgetful(moment: Any, command: Any, results: Path, *rest: Any) -> bool:
        landed = kill_at(moment, command, results, *rest)
        lines = results.read_bytes().splitlines(keepends=True) if results.exists() else []
        results.write_bytes(b"".join(lines[:-1] + [line[:-1] + b" \n" for line in lines[-1:]])) if lines else None
        change_record(text="lost")(results.parent) if len(lines) > 1 else None
        return landed

    monkeypatch.setattr(stress_extract, "kill_at", forgetful)
    monkeypatch.setattr(stress_extract, "STAGES", ("end",))
    status, told, err = run(capsys, "kill", "--model", model, "--pages", 1, "--kills", 1, "--max-tokens", 4)
    assert (status, told["ok"]) == (1, False)
    assert any("differs in text" in text for text in told["broken"]) and "broken: after kill 1: record 2" in err


def test_moments_are_spread_over_all_stages() -> None:
    found = moments(random.Random(1), 20, 180, Pace(2.0, 0.1, 0.5, 0))
    assert [moment.n_records for moment in found] == sorted(moment.n_records for moment in found)
    assert {moment.stage for moment in found} == {"start", "records", "end"}
    assert all(0 <= moment.after_s <= 2.4 and 0 <= moment.n_records <= 180 for moment in found)


# --- memory ---


@pytest.mark.slow
def test_memory_says_what_it_saw(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--pages", 6, "--from-page", 3, "--tolerance", 5, "--max-tokens", 4, "--width-px", 170)
    status, told, err = run(capsys, "memory", "--model", model, *arguments)
    assert (status, told["ok"], told["pages"], told["from_page"]) == (0, True, 6, 3)
    assert told["rss_ratio"] == pytest.approx(told["rss_mb"][1] / told["rss_mb"][0], abs=1e-3)
    assert len(told["trend_mb"]) == 6 and len(told["peak_mb"]) == 2 and "peak_ratio" in told
    assert "MB around page 3" in err


def test_a_leak_is_a_broken_promise(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leaking(function: Any, folder: Path, *_: Any) -> list[tuple[float, float | None]]:
        assert function is memory_by_page and folder.is_dir()
        return [(100.0 + i, 150.0) for i in range(40)]

    monkeypatch.setattr(stress_extract, "in_new_process", leaking)
    status, told, _ = run(capsys, "memory", "--model", model, "--pages", 40, "--width-px", 17)
    assert (status, told["rss_mb"], told["peak_ratio"]) == (1, [114.5, 134.5], 1.0)
    assert told["broken"] == ["rss grew by 17.5% from page 20 to 40; expected at most 5%"]


# --- share ---


@pytest.mark.slow
def test_share_says_what_it_saw(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--max-tokens", 8, "--runs", 1, "--task", "kvp", "--task", "tables_html")
    status, told, err = run(capsys, "share", "--model", model, *arguments)
    assert (status, told["ok"], told["tasks"]) == (0, True, ["kvp", "tables_html"])
    assert told["n_encoded"] == {"together": [1, 0], "apart": [1, 1]}
    assert told["n_reused"]["together"][1] >= told["n_image"]["together"][1] > 0
    for what in ("page_s", "all_s"):
        assert set(told[what]) == {"together", "apart", "ratio"}
    assert "together 1 picture encoded" in err


def records(**changes: Any) -> list[dict[str, Any]]:
    """Three records of one page, the last of them changed."""
    first = {"n_image": 100, "n_encoded": 1, "n_reused": 0, "prefill_image_s": 1.0}
    later = {"n_image": 100, "n_encoded": 0, "n_reused": 120, "prefill_image_s": 0.0}
    found = [
        {"task": f"task {i}", "text": "said", "finish_reason": "stop", "error": None, "timings": timings}
        for i, timings in enumerate((first, later, later))
    ]
    timings = {key: value for key, value in changes.items() if key in first}
    others = {key: value for key, value in changes.items() if key not in first}
    return [*found[:2], {**found[2], **others, "timings": {**later, **timings}}]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"n_encoded": 1}, "encoded [1, 0, 1] pictures"),
        ({"n_reused": 99}, "task 2 reused 99 prompt tokens"),
        ({"prefill_image_s": 0.1}, "task 2 reused 120"),
        ({"text": "other"}, "task 2 answers otherwise"),
        ({"error": "no room"}, "task 2, together: no room"),
    ],
)
def test_a_page_that_is_read_twice_is_a_broken_promise(changes: dict[str, Any], problem: str | None) -> None:
    problems = share_problems({"together": records(**changes), "apart": records()})
    assert [problem in text for text in problems] == [True] if problem else problems == []


# --- forms ---


@pytest.mark.slow
def test_forms_says_what_it_saw(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told, err = run(capsys, "forms", "--model", model, "--generations", 16, "--max-tokens", 120)
    assert (status, told["ok"], told["generations"], told["broken"]) == (0, True, 16, [])
    assert set(told["tasks"]) == set(stress_forms.TASKS) and told["schemas"] == len(SCHEMAS) >= 20
    for one in (*told["tasks"].values(), told["all"]):
        kinds = ("finished", "closed", "repetition", "cut", "broken")
        assert one["n"] == sum(one[kind] for kind in kinds) and one["valid"] <= one["n"]
    assert told["all"]["n"] == 16 and told["all"]["finished"] > 0
    assert "forms: kvp              8:" in err


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_every_schema_is_one_that_answers_can_be_held_to(name: str) -> None:
    assert grammar_for("kvp", SCHEMAS[name]) is not None


def test_a_generation_can_be_repeated() -> None:
    cases = [case_of(number, 5, 300) for number in range(len(SCHEMAS) * 2)]
    assert cases == [case_of(number, 5, 300) for number in range(len(SCHEMAS) * 2)]
    assert {case.schema for case in cases if case.task == "kvp"} == set(SCHEMAS)
    assert {case.max_tokens < 300 for case in cases} == {case.fast_forward for case in cases} == {True, False}


KVP = Case(0, "kvp", "flat", 1, 50, True)
OTSL = replace(KVP, task="tables_otsl", schema=None)
FLAT = {"invoice_number": "1", "date": "d", "total": "t"}


def said_to(text: str, finish_reason: str, **more: Any) -> Said:
    return Said(text=text, finish_reason=finish_reason, **{"n_tokens": 50, **more})


@pytest.mark.parametrize(
    ("case", "said", "kind", "problem"),
    [
        (KVP, said_to(json.dumps(FLAT), "stop", valid=True, written=json.dumps(FLAT)), "finished", None),
        (KVP, said_to(json.dumps(FLAT), "stop", n_tokens=51, valid=True), "broken", "has 51 tokens"),
        (KVP, said_to(json.dumps(FLAT), "stop", valid=False), "broken", "taken for one that is not"),
        (KVP, said_to('{"date": 1}', "stop", valid=True), "broken", "a finished answer is not valid"),
        (KVP, said_to("", "cancelled"), "broken", "ended as 'cancelled'"),
        (KVP, said_to(json.dumps(FLAT), "length", closing='", "total": "t"}'), "closed", None),
        (KVP, said_to('{"date": "x"}', "length", closing='"}'), "broken", "brought to an end is not valid"),
        (KVP, said_to('{"date": "x", "to', "length", n_least=60, written='{"date": "x"}'), "cut", None),
        (KVP, said_to('{"date": "x", "to', "length", n_least=40), "broken", "a whole one has 40"),
        (KVP, said_to('{"date": "x", "to', "repetition", written='{"date": "x"}'), "repetition", None),
        (KVP, said_to('{"date": 1, "to', "length", n_least=60, written='{"date": 1}'), "broken", "what was kept"),
        (KVP, said_to('{"da', "length", n_least=60), "cut", None),
        (KVP, Said(error="no answer after 3 s"), "broken", "no answer after 3 s"),
        (OTSL, said_to("<otsl><fcel>a<nl><fc", "length", n_least=60), "broken", "whole rows were lost"),
        (OTSL, said_to("<otsl><fcel>a<nl></otsl>", "length", closing="<nl></otsl>"), "closed", None),
        (OTSL, said_to("<otsl><fcel>a", "length", n_least=60), "cut", None),
    ],
)
def test_verdicts(case: Case, said: Said, kind: str, problem: str | None) -> None:
    found = verdict(case, said)
    assert found[0] == kind
    assert problem in (found[1] or "") if problem else found[1] is None


def cells(*placed: tuple[int, int, int, int], rows: int = 2, columns: int = 2) -> str:
    keys = ("row", "col", "rowspan", "colspan")
    found = [{**dict(zip(keys, one, strict=True)), "type": "data", "header_level": 0, "content": "x"} for one in placed]
    size = {"rows": rows, "columns": columns, "header_rows": 0, "total_rows": rows}
    return json.dumps({"dimensions": size, "cells": found})


@pytest.mark.parametrize(
    ("task", "text", "valid"),
    [
        ("tables_otsl", "<otsl><ched>p<lcel><nl><fcel>a < 5<ecel><nl></otsl>", True),
        ("tables_otsl", "[<otsl><ecel><nl></otsl>, <otsl><ecel><nl></otsl>]", True),
        ("tables_otsl", "[]", True),
        ("tables_otsl", "", False),
        ("tables_otsl", "<otsl><ecel><nl>", False),
        ("tables_otsl", "<otsl><ecel><nl></otsl> and more", False),
        ("tables_otsl", "<otsl><fcel>a<fcel>b<nl><fcel>c<nl></otsl>", False),
        ("tables_html", "<table><thead><tr><th>a<br>&lt;</th></tr></thead><tr><td>5 < 6</td></tr></table>", True),
        ("tables_html", '<table><tr><td rowspan="2">a</td><td>b</td></tr><tr><td>c</td></tr></table>', True),
        ("tables_html", '<table><tr><td rowspan="2">a</td><td>b</td></tr></table>', False),
        ("tables_html", "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", False),
        ("tables_html", "<table><tr><td>a</tr></table>", False),
        ("tables_html", "<table></table>", False),
        ("tables_json", cells((1, 1, 2, 1), (1, 2, 1, 1), (2, 2, 1, 1)), True),
        ("tables_json", cells((1, 1, 2, 1), (1, 2, 1, 1)), False),
        ("tables_json", cells((1, 1, 2, 2), (1, 2, 1, 1)), False),
        ("tables_json", cells((1, 1, 3, 2)), False),
        ("tables_json", '{"cells": []}', False),
        ("chart2csv", 'a,b\n"1,5",2\n', True),
        ("chart2csv", "```csv\na,b\n1,2\n```", True),
        ("chart2csv", "a,b\n1\n", False),
        ("chart2csv", "", False),
        ("kvp", json.dumps(FLAT), True),
        ("kvp", "{", False),
        ("kvp", '"half a pair: \ud83d"', False),
    ],
)  # fmt: skip
def test_judges(task: str, text: str, valid: bool) -> None:
    problem = judge(task, text, SCHEMAS["flat"] if task == "kvp" else None)
    assert (problem is None) == valid, problem


def test_formats_are_judged() -> None:
    schema = {"type": "string", "format": "ipv4"}
    assert judge("kvp", '"1.2.3.4"', schema) is None
    assert "is not a 'ipv4'" in (judge("kvp", '"1.2.3.400"', schema) or "")


def test_a_relaxed_schema_forgives_what_is_missing_alone() -> None:
    schema = relaxed(SCHEMAS["items"])
    assert judge("kvp", '{"items": []}', schema) is judge("kvp", '{"items": [{"price": 1}]}', schema) is None
    assert judge("kvp", '{"items": [{"price": "1"}]}', schema) is not None
    assert relaxed({"properties": {"required": {"type": "string"}}}) == {"properties": {"required": {"type": "string"}}}
    assert judge("kvp", "{}", relaxed(SCHEMAS["one of three"])) is None
    assert SCHEMAS["items"]["required"] == ["items"]


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("tables_html", "<table><tr><td>a</td></tr><tr>", True),
        ("tables_html", "<table><tr><td>a</td>", False),
        ("chart2csv", "a,b\n1,2\n3", True),
        ("chart2csv", "a,b\n1", False),
        ("chart2csv", 'a,"b\n\n', False),
        ("tables_json", cells((1, 1, 2, 2)), False),
    ],
)
def test_rows_that_are_certainly_whole(task: str, text: str, expected: bool) -> None:
    assert has_whole_row(task, text) == expected


def serve_badly(pipe: Connection, what: str) -> None:
    pipe.send("ready")
    case = pipe.recv()
    if what == "hang":
        time.sleep(60)
    if what == "die" and case.number == 1:
        os._exit(3)
    pipe.send(Said(text=f"said {case.number}"))


@pytest.mark.slow
def test_what_hangs_or_dies_is_noticed_and_the_next_ones_still_come() -> None:
    with Talker(("hang",), serve_badly) as talker:
        assert talker.ask(KVP, 0.2) == Said(error="no answer after 0.2 s")
    with Talker(("die",), serve_badly) as talker:
        assert talker.ask(replace(KVP, number=1), 20) == Said(error="the process died with status 3")
        assert talker.ask(replace(KVP, number=2), 20) == Said(text="said 2")


@pytest.mark.slow
def test_an_answer_that_is_not_held_to_its_form_is_a_broken_promise(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Talker, "ask", lambda self, case, timeout_s: Said("<otsl>", "stop", 3, valid=True))
    status, told, err = run(capsys, "forms", "--model", model, "--generations", 2, "--first", 1, "--seed", 7)
    assert (status, told["all"]["broken"]) == (1, 2)
    assert "again with forms --seed 7 --max-tokens 500 --first 1 --generations 1" in err


# --- fast-forward ---


@pytest.mark.slow
def test_fast_forward_says_what_it_saw(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--pages", 2, "--max-tokens", 90, "--length", 4)
    status, told, err = run(capsys, "fast-forward", "--model", model, *arguments)
    assert (status, told["ok"], told["forms"]) == (0, True, 2)
    assert told["same_values"] + len(told["differences"]) == 2
    assert told["n_forced"]["with"] > 0 == told["n_forced"]["without"]
    assert told["n_steps"]["ratio"] == pytest.approx(told["n_steps"]["with"] / told["n_steps"]["without"], abs=1e-3)
    assert set(told["decode_s"]) == {"with", "without", "ratio"}
    assert "of 2 forms have the same values" in err


@pytest.fixture(scope="module")
def loaded(model: Path) -> Iterator[granite4v.Model]:
    with granite4v.load(model, n_threads=1) as loaded:
        yield loaded


def test_given_pictures_and_a_schema(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_page(1, 0, "form").picture.save(tmp_path / "form.png")
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}}))
    arguments = (tmp_path / "form.png", "--schema", tmp_path / "schema.json")
    status, told, err = run(capsys, "fast-forward", "--model", model, *arguments)
    assert (status, told["forms"]) == (0, 1) and "form.png: " in err


def test_why_answers_part(loaded: granite4v.Model) -> None:
    picture = Image.new("RGB", (100, 80), "white")
    question = ask_for(
        loaded, "kvp", {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    )
    options: dict[str, Any] = {"max_tokens": 12, "constraint": question.constraint}
    forced = loaded.generate(question.prompt, [picture], **options)
    sampled = loaded.generate(question.prompt, [picture], fast_forward=False, **options)
    encode = loaded.engine.tokenizer().encode_plain
    spelled = Answer(tokens=[*encode("{"), *encode('"')])
    assert explained(loaded, picture, question, forced, spelled)["why"] == "spelling"

    *before, last = sampled.tokens  # within the string
    logits = loaded.score(question.prompt, [picture], tokens=[*before, 0])[-1]
    worst = Answer(tokens=[*before, int(logits.argmin())])
    found = explained(loaded, picture, question, worst, sampled)
    assert found["why"] == "unexplained" and found["behind"] in sampled.text
    assert found["gap"] == pytest.approx(logits[last] - logits.min(), abs=1e-3)
