"""--quiet and --verbose, for every command and in both places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from granite4v.cli.main import app
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"])


@pytest.fixture(scope="module")
def ask(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    page = tmp_path_factory.mktemp("page") / "page.png"
    text_picture((60, 40)).save(page)
    return ["ask", str(page), "Hm?", "--model", str(model), "--max-tokens", "3", "--no-page-store"]


@pytest.fixture(scope="module")
def normal(ask: list[str]) -> Any:
    return run(*ask)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_command_has_both() -> None:
    def commands(group: Any) -> list[Any]:
        inner = (commands(one) if hasattr(one, "commands") else [one] for one in group.commands.values())
        return [one for several in inner for one in several]

    group: Any = typer.main.get_command(app)
    assert len(commands(group)) > 15
    for one in (group, *commands(group)):
        names = [name for param in one.params for name in param.opts]
        assert {"-q", "--quiet", "-v", "--verbose"} <= set(names) and len(names) == len(set(names)), one.name


def test_quiet_leaves_the_result_and_what_is_wrong_with_it(ask: list[str], normal: Any) -> None:
    assert "encoding images ..." in normal.stderr and "prompt tokens" in normal.stderr
    told = "the answer was cut off after 3 tokens; raise --max-tokens to allow more\n"
    for quiet in (run(*ask, "-q"), run("--quiet", *ask)):
        assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, normal.stdout, told)
    assert "..." in run(*ask).stderr  # it applied to that command only


def test_verbose_adds_timings_and_the_log_of_llama_cpp(ask: list[str], normal: Any) -> None:
    assert "llama_model_loader" not in normal.stderr
    for verbose in (run(*ask, "-v"), run("-v", *ask)):
        assert (verbose.exit_code, verbose.stdout) == (0, normal.stdout)
        assert "granite4v.llama: llama_model_loader: " in verbose.stderr
        assert "timings: load_s=0." in verbose.stderr and " n_generated=3 " in verbose.stderr
        assert {line for line in normal.stderr.splitlines() if "..." in line} <= set(verbose.stderr.splitlines())


def test_not_both_and_the_command_line_before_the_file(
    ask: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in ((*ask, "-q", "-v"), ("-q", *ask, "-v")):
        result = run(*arguments)
        assert result.exit_code == 2 and "give --quiet or --verbose, not both." in result.stderr
    (tmp_path / "config.toml").write_text("quiet = true\n")
    monkeypatch.setenv("GRANITE4V_CONFIG", str(tmp_path / "config.toml"))
    assert "..." not in run(*ask).stderr
    assert "llama_model_loader" in run("-v", *ask).stderr


def test_a_quiet_batch_tells_of_failures_alone(model: Path, tmp_path: Path) -> None:
    text_picture((60, 40)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    task = ["--task", "tables_html", "--model", model, "--max-tokens", 2, "--threads", 1]
    result = run(
        "extract", tmp_path / "a.png", tmp_path / "b.png", *task, "--format", "docling", "-q", "--out", "/dev/null/x"
    )
    assert result.exit_code == 1 and result.stderr.count("\n") == 1  # nothing can be written there
    result = run("extract", tmp_path / "a.png", tmp_path / "b.png", *task, "--json", "-q")
    assert result.exit_code == 1 and result.stdout.count("\n") == 2
    assert all(f"{tmp_path}/" in line for line in result.stderr.splitlines()) and "b.png" in result.stderr
    normal = run("extract", tmp_path / "a.png", *task, "--json", "-v")
    assert (
        f"{tmp_path / 'a.png'}, page 1, tables_html: load_s=" in normal.stderr
        and "1 page of 1 document" in normal.stderr
    )


def test_nothing_but_the_result_of_other_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GRANITE4V_MODELS", str(tmp_path / "models"))
    for command in ("cache list", "cache clear", "cache verify", "models list"):
        loud, quiet = run(*command.split()), run(*command.split(), "-q")
        assert loud.stderr and (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, loud.stdout, "")
    converted = run("convert", "nano", tmp_path / "out", "--dry-run", "-q")
    assert (converted.exit_code, converted.stderr) == (0, "") and converted.stdout
