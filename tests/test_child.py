"""Runs a module's `main` in a child process: its output, its exit status, and that the parent can end it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from granite4v.child import run_main

HELPER = """
import os, sys, time
def main(does, *rest):
    print(does, os.getpid(), os.getsid(0) == os.getpid(), flush=True)
    open("said", "w").close()
    if does == "sleep":
        time.sleep(60)
    if does == "abort":
        os.abort()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "child_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "child_helper"


def test_what_it_prints_and_how_it_ends(module: str) -> None:
    ended = run_main(module, ["speak"], 60)
    assert ended.status == 0 and ended.stdout.startswith("speak ") and ended.how == "with status 0"
    assert run_main(module, ["abort"], 60).how == "by SIGABRT"


def test_a_child_is_killed_when_its_time_is_over(module: str) -> None:
    announced: list[int] = []
    ended = run_main(module, ["sleep"], 3, lambda: announced.append(1))
    assert ended.status is None and ended.stdout.startswith("sleep ") and announced == [1]
    assert_gone(ended.stdout)


def test_a_child_is_killed_when_it_is_not_wanted_any_more(module: str) -> None:
    start = time.monotonic()
    ended = run_main(module, ["sleep"], 50, stop=Path("said").exists)
    assert ended.status is None and time.monotonic() < start + 30  # it would sleep for 60 seconds
    assert_gone(ended.stdout)


@pytest.mark.skipif(os.name == "nt", reason="no sessions there")
def test_ctrl_c_does_not_reach_a_child_that_is_asked_about(module: str) -> None:
    assert run_main(module, ["speak"], 60, stop=lambda: False).stdout.split()[2] == "True"
    assert run_main(module, ["speak"], 60).stdout.split()[2] == "False"


def test_an_error_while_waiting_kills_it(module: str) -> None:
    said: list[str] = []

    def fail() -> None:
        said.append("announced")
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_main(module, ["sleep"], 50, fail)
    assert said == ["announced"] and time.monotonic() < start + 30


def assert_gone(stdout: str) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int(stdout.split()[1]), 0)
