"""`granite4v extract --watch` with a tiny model: new files, Ctrl-C, and resuming afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from granite4v.cli.main import app
from granite4v.errors import OutputError
from granite4v.runtime.extract.output_directory import OutputDirectory
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"])


def records(out: Path) -> list[tuple[str, int, str | None]]:
    path = out / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(Path(one["source"]).name, one["page"], one["stem"]) for one in map(json.loads, lines)]


def start(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "granite4v", "extract", "--threads", "1", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], done: Callable[[], bool]) -> None:
    until = time.monotonic() + 100
    while not done():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def test_files_are_read_as_they_come_until_ctrl_c_and_later_ones_after_it(folder: Path, tmp_path: Path) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    (inbox / "sub").mkdir(parents=True)
    text_picture((60, 90), 1).save(inbox / "a.png")
    arguments = ["--watch", inbox, "--out", out, "-m", folder, "--prompt", "What?", "--max-tokens", 4]
    process = start(*arguments)
    wait_for(process, lambda: len(records(out)) == 1)
    text_picture((60, 90), 2).save(inbox / "sub" / "a.png")
    wait_for(process, lambda: (out / "sub" / "a.prompt.md").exists())
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == "" and "Traceback" not in stderr
    assert f"watching '{inbox}'; Ctrl-C ends it" in stderr and stderr.splitlines()[-1] == "granite4v: interrupted"
    assert records(out) == [("a.png", 1, "a"), ("a.png", 1, "sub/a")]
    assert json.loads((out / "run.json").read_text())["inputs"] == [str(inbox)]
    before = (out / "results.jsonl").read_bytes().splitlines()
    refused = start(*arguments).communicate(timeout=60)[1]
    assert "resume it (--resume)" in refused
    text_picture((60, 90), 3).save(inbox / "b.png")
    process = start(*arguments, "--resume")
    wait_for(process, lambda: (out / "b.prompt.md").exists())
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert sorted(records(out)) == [("a.png", 1, "a"), ("a.png", 1, "sub/a"), ("b.png", 1, "b")]
    assert set(before) < set((out / "results.jsonl").read_bytes().splitlines())  # not read again: the same timings


def test_another_process_in_the_output_directory_is_waited_for(folder: Path, tmp_path: Path) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    inbox.mkdir()
    text_picture((60, 90), 1).save(inbox / "a.png")
    process = start("--watch", inbox, "--out", out, "-m", folder, "--prompt", "What?", "--max-tokens", 4)
    wait_for(process, lambda: (out / "a.prompt.md").exists())
    wait_for(process, lambda: can_be_claimed(out))
    claimed = OutputDirectory.claim_for_export(out, out)  # as by 'granite4v export'
    text_picture((60, 90), 2).save(inbox / "b.png")
    time.sleep(4)  # two until the file counts as complete
    claimed.release()
    wait_for(process, lambda: (out / "b.prompt.md").exists())
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert stderr.count(f"another process is using '{out}'; waiting for it") == 1
    assert f"{inbox / 'a.png'}: 1 page of 1 document, 1 record, 1 truncated" in stderr
    assert f"{inbox / 'b.png'}: 1 page of 1 document, 1 record, 1 truncated" in stderr


def can_be_claimed(out: Path) -> bool:
    try:
        OutputDirectory.claim_for_export(out, out).release()
    except OutputError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--watch", "{tmp}"], 2, "it needs a directory for results"),
        (["--watch", "{tmp}", "--out", "{tmp}/out"], 2, "is in the directory that is watched"),
        (["--watch", "{tmp}/in", "--out", "{tmp}/out", "a.png"], 2, "give inputs or --watch, not both"),
        (["--watch", "{tmp}/in", "--out", "{tmp}/out", "--ray"], 2, "it goes without --ray"),
        (["--watch", "{tmp}/in", "--out", "{tmp}/out"], 1, "there is no directory '{tmp}/in' to watch"),
        ([], 2, "no input"),
    ],
)
def test_failures_are_a_message_and_a_status(
    folder: Path, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    result = CliRunner().invoke(app, ["extract", *given, "-m", str(folder), "--prompt", "What?"])
    assert (result.exit_code, result.stdout) == (status, "")
    assert message.format(tmp=tmp_path) in result.stderr.replace("\n", " ") and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
