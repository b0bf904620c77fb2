"""The config file: what it sets, what takes precedence over it, and that every mistake in it is one message."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import typer.main
from typer.testing import CliRunner

from granite4v.cli.config_file import PATHS, line_of
from granite4v.cli.main import app
from granite4v.doctor import machine
from tests.toy.spec import PRESETS


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], Path]:
    """Writes a config file and makes it the one in use."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("GRANITE4V_CONFIG", str(path))
        return path

    return write


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"])


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def help_of(command: str) -> str:
    """Returns the help text without whitespace, because lines may be broken anywhere."""
    return "".join(run(command, "--help").stdout.split())


def n_tokens(*arguments: Any) -> int:
    result = run("ask", "Hello", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return len(json.loads(result.stdout)["tokens"])


def test_a_table_is_before_the_top_and_the_command_line_before_both(write: Callable[..., Path], model: Path) -> None:
    write(f"model = '{model}'\nmax-tokens = 4\n")
    assert n_tokens() == 4
    write(f"model = '{model}'\nmax-tokens = 4\n[ask]\nmax-tokens = 3\n[bench]\nmax-tokens = 5\n")
    assert n_tokens() == 3 and n_tokens("--max-tokens", 2) == 2


def test_the_environment_is_before_the_file(
    write: Callable[..., Path], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("model = './nothing'\nmax-tokens = 1\n")
    assert run("ask", "Hello").exit_code == 1
    monkeypatch.setenv("GRANITE4V_MODEL", str(model))
    assert n_tokens() == 1
    monkeypatch.setenv("GRANITE4V_MODEL", "nowhere")
    assert n_tokens("--model", model) == 1


def test_paths_are_found_from_the_file_s_folder(
    write: Callable[..., Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "linked").symlink_to(model)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelled in ("linked", "./linked", "~/linked", f"../{tmp_path.name}/linked"):
        write(f"model = '{spelled}'\nmax-tokens = 1\n")
        assert n_tokens() == 1
    write("[extract]\nout = 'read'\nwatch = 'read'\n")
    told = run("extract").stderr.replace("\n", " ").replace("│", "")
    assert str(tmp_path / "read") in told  # the watched directory is also the output directory


def test_what_options_hold_paths_is_told_by_their_metavar() -> None:
    group: Any = typer.main.get_command(app)
    found = [param for command in group.commands.values() for param in getattr(command, "params", ())]
    options = [param for param in found if param.param_type_name == "option"]
    paths = [param for param in options if param.type.name in ("path", "directory", "file")]
    assert len(paths) > 10 and all(set(param.metavar.split("|")) <= PATHS for param in paths)


def test_kinds_decide_where_a_key_at_the_top_belongs(write: Callable[..., Path]) -> None:
    write("lora = true\n")
    assert "(true,from'" in help_of("ask") and ",from'" not in help_of("convert")
    write("lora = 'ignore'\n")
    assert ",from'" not in help_of("ask") and "(ignore,from'" in help_of("convert")


def test_help_tells_what_the_file_sets(write: Callable[..., Path]) -> None:
    path = write("threads = 3\n[extract]\nformat = ['csv', 'md']\ndrafting = false\n[models.list]\njson = true\n")
    shown = help_of("extract")
    assert f"[envvar:GRANITE4V_THREADS;default:(3,from'{path}');1<=x<=512]" in shown
    assert f"(csv,md,from'{path}')" in shown and f"(false,from'{path}')" in shown


MISTAKES = [
    ("modle = 'x'", 1, "'modle' is no option of any command; did you mean 'model'?"),
    ("ctx_size = 1", 1, "'ctx_size' is no option of any command; did you mean 'ctx-size'?"),
    ("threads = 1\n\n[extrct]\nparallel = 1", 3, "'extrct' is no command; did you mean 'extract'?"),
    ("[extract]\nimages = 1", 2, "[extract] 'images' is no option of granite4v extract; did you mean 'pages'?"),
    ("[models.pull]\nforce = true", 2, "[models.pull] 'force' is no option of granite4v models pull"),
    (
        "[models]\nthreads = 1",
        2,
        "[models] 'threads' is no option of granite4v models; 'granite4v COMMAND --help' lists them.",
    ),
    ("extract = 1", 1, "'extract' is a command, whose options stand in a table: [extract]."),
    ("threads = '8'", 1, "'threads' is '8'; expected a whole number."),
    ("threads = true", 1, "'threads' is true; expected a whole number."),
    ("# none\ntemperature = 'hot'", 2, "'temperature' is 'hot'; expected a number."),
    ("[chat]\ntemperature = [1]", 2, "[chat] 'temperature' is [1]; expected a number."),
    ("[ask]\nlora = 'merge'", 2, "[ask] 'lora' is 'merge'; expected true or false."),
    ("format = 'csv'", 1, "'format' is 'csv'; expected a list, each of it a text in quotes."),
    ("[extract]\nformat = [\n'csv',\n1\n]", 2, "'format' is ['csv', 1]; expected a list, each of it a text in quotes."),
    ("[serve.port]\nx = 1", 1, "[serve] 'port' is a table; expected a whole number."),
]


@pytest.mark.parametrize(("text", "line", "problem"), MISTAKES, ids=[text for text, *_ in MISTAKES])
def test_a_mistake_is_one_message_whichever_command_runs(
    write: Callable[..., Path], text: str, line: int, problem: str
) -> None:
    path = write(text.replace("\n", "\r\n" if line % 2 else "\n"))
    result = run("models", "list")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert f"granite4v: the config file '{path}', line {line}:" in result.stderr and problem in result.stderr


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("threads = 0", "'threads': 0 is not in the range 1<=x<=512; correct it."),
        ("temperature = nan", "'temperature': nan is not a finite number; correct it."),
        ("device = 'gpu'", "'device': 'gpu' is not one of "),
        ("quiet = true\nverbose = true", "sets both 'quiet' and 'verbose'"),
    ],
)
def test_what_an_option_refuses_ends_the_commands_that_have_it(
    write: Callable[..., Path], tmp_path: Path, text: str, problem: str
) -> None:
    write(f"[ask]\n{text}\n")
    assert run("models", "list").exit_code == 0
    result = run("ask", "Hello", "--model", tmp_path)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert problem in result.stderr and "config file" in result.stderr


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            b"threads = \n",
            "is not valid TOML: Invalid value (at line 1, column 11); correct it, or set GRANITE4V_CONFIG",
        ),
        (b"a = '\xff'\n", "is not valid TOML: 'utf-8' codec can't decode byte 0xff"),
        (b"# " + b"x" * (1 << 16), "has more than 65,536 bytes"),
        (b"a = " + b"[" * 20000, "cannot be read: maximum recursion depth"),
    ],
)
def test_a_file_that_is_no_toml(write: Callable[..., Path], content: bytes, problem: str) -> None:
    write(content)
    result = run("models", "list")
    assert result.exit_code == 1 and problem in result.stderr and result.stderr.count("\n") == 1


def test_a_byte_order_mark_is_passed_over(write: Callable[..., Path]) -> None:
    write(b"\xef\xbb\xbf[models.list]\njson = true\n")
    assert json.loads(run("models", "list").stdout)


def test_a_file_that_was_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, why in ((tmp_path / "none.toml", "No such file or directory"), (tmp_path, "Is a directory")):
        monkeypatch.setenv("GRANITE4V_CONFIG", str(path))
        result = run("models", "list")
        assert result.exit_code == 1 and f"the config file '{path}' cannot be read: {why}; correct it" in result.stderr
    monkeypatch.setenv("GRANITE4V_CONFIG", os.devnull)
    assert run("models", "list").exit_code == 0


def test_the_user_s_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRANITE4V_CONFIG")
    monkeypatch.setattr(platformdirs, "user_config_dir", lambda name: str(tmp_path / name))
    assert run("models", "list").exit_code == 0
    assert machine.config().data == {"file": str(tmp_path / "granite4v" / "config.toml"), "exists": False}
    (tmp_path / "granite4v").mkdir()
    (tmp_path / "granite4v" / "config.toml").write_text("[models.list]\njson = true\n")
    assert json.loads(run("models", "list").stdout) and machine.config().data["exists"]
    (tmp_path / "granite4v" / "config.toml").write_text("nonsense\n")
    told = run("models", "list").stderr
    assert "set GRANITE4V_CONFIG to the path of another one, or remove it." in told
    assert run("--version").exit_code == 0 and run("--help").exit_code == 0


def test_the_line_of_every_value_is_found() -> None:
    rng = random.Random(1)
    for _ in range(50):
        lines, expected, place = [], {}, ()
        for number in range(rng.randint(1, 8)):
            lines += rng.choice([[], ["# key0 = 1"], [""]])
            if rng.random() < 0.3:
                place = (f"table{number}",)
                lines.append(f"[table{number}]")
            expected[(*place, f"key{number}")] = len(lines) + 1
            value = rng.choice(["1", "'key0 = 1'", "[\n  1,\n  2\n]", "'''\nkey0 = 1\n'''"])
            lines += f"key{number} = {value}".split("\n")
        assert {where: line_of("\n".join(lines), where) for where in expected} == expected
