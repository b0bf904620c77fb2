"""The command line's frame: help, version, wrong usage, and how failures become messages and statuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import granite4v
from granite4v.child import Ended
from granite4v.cli.main import Commands, app
from granite4v.doctor import native
from granite4v.errors import ModelFileError
from granite4v.ggml.build import installed_build

COMMANDS = ("convert", "ask", "inspect", "verify", "bench", "doctor")


def test_help_lists_every_command_in_order() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"granite4v {command}" in result.stdout


def versions() -> str:
    return f"granite4v {granite4v.__version__}\n{installed_build().summary}\n"


def test_a_build_that_cannot_be_loaded_is_told_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "run_main", lambda *arguments: Ended(-4, "", ""))
    result = CliRunner().invoke(app, ["--version"])
    told = "llama-cpp-python cannot be used: loading it ended a process by SIGILL"
    assert (result.exit_code, result.stdout) == (0, f"granite4v {granite4v.__version__}\n{told}\n")


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, versions())


@pytest.mark.parametrize("arguments", [["nonsense"], ["inspect"], ["inspect", "--nonsense", "x"], ["bench"]])
def test_wrong_usage_exits_2_and_leaves_stdout_empty(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: granite4v" in result.stderr


def failing_app(error: BaseException) -> typer.Typer:
    failing = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @failing.callback()
    def common() -> None:
        """Keeps `fail` a subcommand."""

    @failing.command()
    def fail() -> None:
        raise error

    return failing


def test_an_expected_failure_is_one_message_on_stderr_and_status_1() -> None:
    result = CliRunner().invoke(failing_app(ModelFileError("'x' is not a GGUF file.")), ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "granite4v: 'x' is not a GGUF file.\n")


def test_an_interrupt_is_status_130_without_a_traceback() -> None:
    result = CliRunner().invoke(failing_app(KeyboardInterrupt()), ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "granite4v: interrupted\n")


def test_a_bug_keeps_its_traceback() -> None:
    result = CliRunner().invoke(failing_app(ZeroDivisionError("bug")), ["fail"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "granite4v", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, versions())
