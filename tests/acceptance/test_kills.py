"""The check of killed batches passes with small numbers, and detects a run that loses or changes something."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from granite4v.runtime.documents import open_pages
from tests.acceptance import kills
from tests.acceptance.conftest import Ran
from tests.acceptance.kills import Pace, compare, deaths, expected_keys, moments, suspects
from tests.acceptance.pages import Batch


@pytest.fixture(scope="module")
def check(side_by_side: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Runs a check once; returns its directory with 'batch', 'whole' and 'broken', and its status, JSON and stderr."""
    work = tmp_path_factory.mktemp("kill") / "work"
    arguments = ("--pages", "4", "--kills", "3", "--max-tokens", "40", "--threads", "1")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = kills.main(["--model", str(side_by_side), "--work", str(work), *arguments])
    return work, (status, json.loads(out.getvalue().splitlines()[-1]), err.getvalue())


@pytest.fixture
def killed(check: tuple[Path, Ran]) -> Path:
    return check[0]


@pytest.mark.slow
def test_it_says_what_it_saw(check: tuple[Path, Ran]) -> None:
    status, told, err = check[1]
    assert (status, told["check"], told["ok"], told["broken"]) == (0, "kills", True, [])
    assert (told["pages"], told["records"], told["kills"], told["status"]) == (4, 15, 3, 1)
    assert sum(told["stages"].values()) == len(told["records_at_kills"]) == len(told["suspects_at_kills"]) == 3
    assert "kills: 15 records of 4 pages after 3 kills" in err and "kills: ok" in err


def keys_of(work: Path) -> list[tuple[str, int | None, str]]:
    """Returns the expected keys, with the pages listed by our own page reader."""
    pages = tuple((item.source, item.number) for item in open_pages([work / "batch"]))
    return expected_keys(Batch(work / "batch", pages), kills.TASKS)


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
    model: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    """Every kill changes records on disk."""
    kill_at = kills.kill_at

    def forgetful(moment: Any, command: Any, results: Path, *rest: Any) -> bool:
        landed = kill_at(moment, command, results, *rest)
        lines = results.read_bytes().splitlines(keepends=True) if results.exists() else []
        results.write_bytes(b"".join(lines[:-1] + [line[:-1] + b" \n" for line in lines[-1:]])) if lines else None
        change_record(text="lost")(results.parent) if len(lines) > 1 else None
        return landed

    monkeypatch.setattr(kills, "kill_at", forgetful)
    monkeypatch.setattr(kills, "STAGES", ("end",))
    status, told, err = run(kills.main, "--model", model, "--pages", 1, "--kills", 1, "--max-tokens", 4)
    assert (status, told["ok"]) == (1, False)
    assert any("differs in text" in text for text in told["broken"]) and "broken: after kill 1: record 2" in err


def test_moments_are_spread_over_all_stages() -> None:
    found = moments(random.Random(1), 20, 180, Pace(2.0, 0.1, 0.5, 0))
    assert [moment.n_records for moment in found] == sorted(moment.n_records for moment in found)
    assert {moment.stage for moment in found} == {"start", "records", "end"}
    assert all(0 <= moment.after_s <= 2.4 and 0 <= moment.n_records <= moment.latest <= 180 for moment in found)


@pytest.mark.parametrize(
    ("content", "dead", "suspected"),
    [
        (None, set(), []),
        ("", set(), []),
        ('{"a": 1, "b": 2}', {"a", "b"}, []),
        ('{"a": 1, "suspects": ["c", "d"]}', {"a"}, ["c", "d"]),
        ('{"a": 1, "susp', {"x"}, []),
    ],
)
def test_pages_in_flight_at_a_kill(tmp_path: Path, content: str | None, dead: set[str], suspected: list[str]) -> None:
    if content is not None:
        (tmp_path / ".granite4v-attempts.json").write_text(content)
    assert (deaths(tmp_path, unknown={"x"}), suspects(tmp_path)) == (dead, suspected)
