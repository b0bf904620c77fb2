"""The mutation harness judges the ends of commands correctly, and builds the same case from the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .mutation.__main__ import KINDS
from .mutation.isolation import Limits, isolated
from .mutation.verdict import judge

ROOT = Path(__file__).resolve().parents[2]
ENOUGH, HANGING = (Limits(seconds, memory_bytes=16 << 30) for seconds in (60, 1))


def say(text: str, status: int) -> Callable[[], int]:
    def function() -> int:
        print(text, file=sys.stderr)
        return status

    return function


def fail() -> int:
    raise KeyError("total")


def exit_with_words() -> int:
    raise SystemExit("granite4v: no such file")


def crash() -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def compute_without_end() -> int:
    while True:
        pass


def wait_without_end() -> int:
    time.sleep(1000)
    return 0


def leave_a_file() -> int:
    tempfile.mkstemp(prefix="page")
    return 0


def keep_the_traceback() -> int:
    Path(tempfile.gettempdir(), "granite4v-error-1.txt").write_text("Traceback (most recent call last):\nKeyError: 1")
    return 70


def leave_a_process() -> int:
    if os.fork() == 0:
        time.sleep(1000)
    return 0


@pytest.mark.parametrize(
    ("function", "kind", "cause"),
    [
        (say("document 1 of 1", 0), "clean", ""),
        (say("granite4v: 'a.png' is empty.", 1), "refused", ""),
        (exit_with_words, "refused", ""),
        (say("Usage: granite4v extract", 2), "refused", ""),
        (say("Error", 2), "wrong", "x: status 2 without 'Usage:'"),
        (lambda: 1, "wrong", "x: status 1 without a message"),
        (lambda: 3, "traceback", "status 3"),
        (fail, "traceback", "KeyError: _ in acceptance/test_mutation.py"),
        (crash, "signal", "SIGSEGV in acceptance/test_mutation.py"),
        (compute_without_end, "hang", "compute_without_end"),
        (wait_without_end, "hang", "wait_without_end"),
        (leave_a_file, "wrong", "x: a temporary file is left behind: page"),
        (keep_the_traceback, "traceback", "x: KeyError: _"),
        (leave_a_process, "wrong", "x: processes are left running"),
        (say("gguf_init_from_file: failed", 1), "noise", "gguf_init_from_file"),
        (say("/lib/a.py:5: UserWarning: odd", 0), "noise", "x: /lib/a.py"),
    ],
)
def test_each_end_of_a_command_is_told_from_the_others(
    function: Callable[[], int], kind: str, cause: str, tmp_path: Path
) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    verdict = judge(isolated(function, folder, "0", HANGING if kind == "hang" else ENOUGH, ["x"]))
    assert verdict.kind == kind
    assert cause in verdict.cause


BUILD = """
import hashlib, json, sys
from pathlib import Path
from tests.acceptance.mutation.case import rng_of
from tests.acceptance.mutation.kinds import images, output, pdfs, schemas
folder = Path(sys.argv[1])
for kind in (images, output, pdfs, schemas):
    kind.prepare(folder)
    for index in range(12):
        made = folder / f"{kind.name}{index}"
        made.mkdir()
        case = kind.build(rng_of(kind.name, 7, index), folder, made)
        print(case)
        for path in sorted(made.iterdir()):
            if not any(edit.startswith((f"{path.name}: encrypted", f"{path.name}: locked")) for edit in case.edits):
                print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())  # encryption is salted anew each time
"""


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_same_numbers_build_the_same_cases(tmp_path: Path) -> None:
    """Also in processes with different string hashes."""
    built = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        done = run("-c", BUILD, tmp_path / seed, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        built.append(done.stdout.splitlines())
    assert len(built[0]) > 80
    assert built[0] == built[1]


@pytest.mark.slow
def test_a_short_run_of_all_kinds_finds_nothing() -> None:
    done = run("-m", "tests.acceptance.mutation", "--cases", "12", "--seed", "3")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert set(figures["kinds"]) == set(KINDS)
    assert figures["cases"] == 12 * len(KINDS)
    assert figures["failures"] == []
