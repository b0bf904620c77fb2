"""`granite4v convert`: what goes to stdout, what to stderr, and the exit status."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from make_checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter
from typer.testing import CliRunner

from granite4v.cli.convert import Meter
from granite4v.cli.main import app
from granite4v.converter import Progress

TINY = PRESETS["tiny"]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_files_on_stdout_and_remarks_on_stderr(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, stdout, stderr = run(make_checkpoint(TINY), out)
    assert status == 0
    assert [line.split("  ")[0] for line in stdout.splitlines()] == [
        str(out / "text-Q4_K_M.gguf"),
        str(out / "mmproj-F16.gguf"),
    ]
    assert "note: text-Q4_K_M.gguf: 44 tensors are Q5_0, for rows of 64 are not whole blocks of Q4_K" in stderr
    assert stderr.splitlines()[-1].startswith("converted in ")


def test_options_reach_the_converter(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec())
    out = tmp_path / "out"
    options = ("--text-type", "q8_0", "--vision-type", "bf16", "--lora", "separate", "--adapter", adapter)
    status, _, stderr = run(make_checkpoint(TINY), out, *options)
    assert status == 0
    assert sorted(path.name for path in out.iterdir()) == ["lora-F16.gguf", "mmproj-BF16.gguf", "text-Q8_0.gguf"]
    assert f"note: the adapter '{adapter}' was kept in a file of its own" in stderr
    assert run(make_checkpoint(TINY), out)[0] == 1
    assert run(make_checkpoint(TINY), out, "--force")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["mmproj-F16.gguf", "text-Q4_K_M.gguf"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    status, stdout, stderr = run(make_checkpoint(TINY), tmp_path / "out", "--dry-run")
    assert (status, stderr) == (0, "")
    assert "text-Q4_K_M.gguf  (granite, 74 tensors" in stdout
    assert "token_embd.weight" in stdout
    assert "left out:" in stdout
    assert not (tmp_path / "out").exists()


def test_a_failure_is_one_message_and_status_1(tmp_path: Path) -> None:
    status, stdout, stderr = run(tmp_path, tmp_path / "out", "--text-type", "Q1")
    assert (status, stdout) == (1, "")
    assert stderr.startswith("granite4v: unknown quantization type 'Q1' for --text-type; known: F32, F16,")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "line"), [(Terminal(), "\rtext.gguf:  25%"), (io.StringIO(), "text.gguf:  25%")])
def test_progress_shows_within_a_second(stream: io.StringIO, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    meter = Meter(stream)
    meter(Progress(1, 100, "text.gguf", "a"))
    assert stream.getvalue() == ""
    now = 100.6
    meter(Progress(25, 100, "text.gguf", "blk.0.attn_q.weight"))
    assert stream.getvalue().startswith(line)
    assert "blk.0.attn_q.weight" in stream.getvalue()
    meter(Progress(26, 100, "text.gguf", "b"))
    assert stream.getvalue().count("text.gguf") == 1
    meter.clear()
