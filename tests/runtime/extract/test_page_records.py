"""Tests of pages that fail, kill the process or are interrupted by the caller, and of the next run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from granite4v.errors import ContextOverflowError
from granite4v.runtime.extract import State
from tests.helpers.fake_model import FakeModel, run
from tests.helpers.runs import TASKS, kept, keys, shades


def test_failures_stay_until_they_are_to_be_tried_again(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    def fail(prompt: str, shade: int) -> None:
        if shade == 20:
            raise ContextOverflowError("too long")
        if shade == 30:
            raise MemoryError

    out = tmp_path / "out"
    model.fail = fail
    list(run(model, scans / "a.pdf", ("kvp",), out=out))
    assert [record.error_type for record in kept(out)] == [None, "ContextOverflowError", "MemoryError"]
    assert "not enough memory" in str(kept(out)[2].error)
    model.fail = lambda prompt, shade: None
    list(run(model, scans / "a.pdf", ("kvp",), out=out, resume=True))
    assert [record.error_type for record in kept(out)] == [None, "ContextOverflowError", None]
    list(run(model, scans / "a.pdf", ("kvp",), out=out, resume=True, retry_failed=True))
    assert shades(out, "a.pdf") == [10, 20, 30]


class Panic(BaseException):
    """Like the exception that pyo3 raises when a Rust library panics."""


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), MemoryError(), RecursionError(), Panic("index"), OSError(5, "io")]
)
def test_any_exception_on_a_page_is_its_record(
    model: FakeModel, scans: Path, tmp_path: Path, error: BaseException
) -> None:
    def fail(prompt: str, shade: int) -> None:
        if shade == 10:
            raise error

    model.fail = fail
    found = list(run(model, scans, ("kvp",), out=tmp_path / "out", report=True))
    assert [record.error is None for record in found] == [False, True, True, False, True, True]
    assert found[0].error and found[0].error_type == type(error).__name__ and (tmp_path / "out/report.html").exists()


def test_a_model_that_is_closed_meanwhile_ends_the_run(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    def fail(prompt: str, shade: int) -> None:
        if model.closed:
            raise ValueError("the model is closed")

    model.fail = fail
    records = run(model, scans, ["chart2csv"], out=tmp_path / "out")
    first = next(records)
    model.close()
    with pytest.raises(ValueError, match="the model is closed"):
        list(records)
    model.closed = False
    rest = list(run(model, scans, ["chart2csv"], out=tmp_path / "out", resume=True))
    assert first.error is None
    assert any(record.error is None for record in rest)
    assert not any("the model is closed" in str(record.error) for record in rest)


def test_what_the_caller_raises_is_the_callers(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    def watch(state: State) -> None:
        if state.n_answer_tokens == 3:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        list(run(model, scans, ("kvp",), out=tmp_path / "out", watch=watch))
    assert kept(tmp_path / "out") == []
    assert len(list(run(model, scans, ("kvp",), out=tmp_path / "out", resume=True))) == 6


KILLED = """
import os, signal, sys
sys.path[:0] = ["."]
from pathlib import Path
from tests.helpers.fake_model import FakeModel, run
model = FakeModel(Path(sys.argv[1]))
def fail(prompt, shade):
    if shade == int(sys.argv[4]):
        os.kill(os.getpid(), int(sys.argv[5]))
model.fail = fail
found = list(run(model, sys.argv[2], ("tables_html", "kvp"), out=sys.argv[3], resume=True))
print(len(found))
"""


def in_process(tmp_path: Path, scans: Path, shade: int, number: int) -> subprocess.CompletedProcess[str]:
    """Runs in a child process that sends itself the signal `number` when it asks about a page of this shade."""
    arguments = [str(tmp_path / "text.gguf"), str(scans), str(tmp_path / "out"), str(shade), str(int(number))]
    return subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_a_page_that_killed_the_process_twice_is_left_alone(
    model: FakeModel, scans: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "out"
    for name in ("b.pdf", "c.png", "d.bmp"):
        (scans / name).write_bytes((scans / "a.pdf").read_bytes())
    for _ in range(2):
        assert in_process(tmp_path, scans, 20, number).returncode == -number
        assert keys(out) == [("a.pdf", 1, "tables_html"), ("a.pdf", 1, "kvp")]
    third = in_process(tmp_path, scans, 20, number)
    assert third.returncode == 0, third.stderr
    found = kept(out)
    dead = [(Path(record.source).name, record.page) for record in found if record.error_type == "ProcessDied"]
    assert dead == [(name, 2) for name in ("a.pdf", "b.pdf", "c.png", "d.bmp") for _ in TASKS]  # all of equal pixels
    assert "the process ended 2 times on this page" in str(found[2].error)
    assert shades(out, "a.pdf") == [10, 30]
    assert in_process(tmp_path, scans, 20, number).stdout == "0\n"  # and stays so
    list(run(model, scans, TASKS, out=out, resume=True, retry_failed=True))
    assert shades(out, "a.pdf") == [10, 20, 30] and shades(out, "d.bmp") == [10, 20, 30]


def test_deaths_on_different_pages_are_nobodys_fault(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    for shade in (10, 20, 30):
        assert in_process(tmp_path, scans, shade, signal.SIGKILL).returncode == -signal.SIGKILL
    list(run(model, scans, TASKS, out=tmp_path / "out", resume=True))
    assert shades(tmp_path / "out", "a.pdf") == [10, 20, 30]


def test_an_interrupt_is_no_death(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    def interrupt(prompt: str, shade: int) -> None:
        raise KeyboardInterrupt

    model.fail = interrupt
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            list(run(model, scans, TASKS, out=tmp_path / "out", resume=True))
    model.fail = lambda prompt, shade: None
    list(run(model, scans, TASKS, out=tmp_path / "out", resume=True))
    assert shades(tmp_path / "out", "a.pdf") == [10, 20, 30]
