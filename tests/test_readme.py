"""What the README and docs/ say is true: commands exist, examples run, the source map is complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import granite4v
from granite4v.cli.main import app
from granite4v.converter import Options, convert
from granite4v.families.registry import FAMILIES
from tests.helpers.pictures import text_picture
from tests.helpers.serving import Server
from tests.helpers.terminal import Terminal
from tests.toy.checkpoint import PRESETS, CheckpointSpec

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def blocks(language: str = "", text: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def test_the_two_commands_are_there_and_are_valid_shell() -> None:
    commands = blocks()[0].splitlines()
    assert len(commands) == 2
    for command in commands:
        assert os.access(ROOT / command, os.X_OK)
        subprocess.run(["bash", "-n", str(ROOT / command)], check=True)


def test_continuous_integration_runs_the_second_command_with_slow_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.splitlines()[-1] == f"exec {blocks()[0].splitlines()[1]} --all"


@pytest.mark.parametrize("command", re.findall(r"^\| `granite4v (\w+)", README, flags=re.MULTILINE))
def test_commands_of_the_table_exist(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_example_runs(
    make_checkpoint: Callable[[CheckpointSpec], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    convert(make_checkpoint(PRESETS["tiny"]), tmp_path / "out", Options("Q8_0", "F16"))
    text_picture((200, 150)).save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if "encode_image" in block)
    example = example.replace("max_tokens=512", "max_tokens=8")
    exec(compile(example, "README.md", "exec"), {})
    assert "[0, 2, 3, 4, 5, 7]" in capsys.readouterr().out


def without_numbers(text: str) -> list[str]:
    return re.sub(r"[\d.,]+", "0", text).splitlines()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the documents of the README's examples."""
    folder = tmp_path_factory.mktemp("demo")
    (seed,) = re.findall(r"`scripts/demo\.sh --seed (\d+)`", README)
    command = [sys.executable, "-m", "scripts.nano.show", "build/demo", "--seed", seed]
    subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, check=True)
    return folder


def _environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "GRANITE4V_CACHE": str(folder / "cache"), "PATH": path, "PYTHONPATH": str(ROOT)}


def test_the_session_goes_as_it_is_shown(demo: Path) -> None:
    """On stderr numbers may differ, for example how long it took."""
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", blocks("console")[0], flags=re.MULTILINE)
    assert len(steps) == 3
    for command, shown in steps:
        result = subprocess.run(
            ["bash", "-c", command], cwd=demo, env=_environment(demo), capture_output=True, text=True, check=True
        )
        said = result.stdout.splitlines()
        told = [line for line in shown.splitlines() if line not in said]
        assert [line for line in shown.splitlines() if line not in told] == said
        assert not set(without_numbers("\n".join(told))) - set(without_numbers(result.stderr))


def test_the_chat_goes_as_it_is_shown(demo: Path) -> None:
    shown = blocks("text")[0]
    command, *rest = shown.splitlines()
    assert command.startswith("$ granite4v ")
    with Terminal(
        [sys.executable, "-m", *command[2:].split()], folder=str(demo), environment=_environment(demo)
    ) as terminal:
        for line in re.findall(r"^> (.+)$", shown, flags=re.MULTILINE):
            terminal.ask(line)
        seen = terminal.lines_to_cursor()[:-1]
    # to the last letter, except the times in lines that count tokens
    assert without_numbers("\n".join(seen)) == without_numbers("\n".join(rest))
    assert [line for line in seen if "tokens" not in line] == [line for line in rest if "tokens" not in line]


def test_what_the_server_is_asked_is_answered_as_shown(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (request,) = blocks("sh")
    (client,) = (block for block in blocks("python") if "openai" in block)
    server = Server()
    try:
        address = f"http://127.0.0.1:{server.port}"
        request, client = (text.replace("http://127.0.0.1:8080", address) for text in (request, client))
        result = subprocess.run(["bash", "-c", request], cwd=demo, capture_output=True, text=True, check=True)
        chart = json.loads(result.stdout)["choices"][0]["message"]["content"]
        assert len(chart.splitlines()) == 5 and chart in blocks("console")[0]  # the same as extract reads
        monkeypatch.chdir(demo)
        exec(compile(client, "README.md", "exec"), {"__name__": "readme"})
        (printed,) = re.findall(r"print\(.*  # (.*)", client)
        assert capsys.readouterr().out.strip() == printed
    finally:
        server.close()


def test_the_examples_about_results_run(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the Python examples of docs/results.md and docs/docling.md on results of the embedded model."""
    monkeypatch.chdir(tmp_path)
    pages = demo / "build" / "demo"
    for name, page in (("scans/a.png", "table.png"), ("scans/report.png", "table.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(pages / page, name)
    with granite4v.extract(
        ["scans/", "scans/none.png"], ["tables_html"], out="read/", formats=["docling"], confidence=True
    ) as run:
        tables = [record.tables for record in run]
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    frames, exports, pipeline, _ = blocks("python", results)
    names: dict[str, Any] = {}
    exec(compile(f"{frames}\n{exports}\n{pipeline}", "docs/results.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "scans/none.png None there is no file" in printed.replace("<NA>", "None")
    assert str(tables[0][0].to_pandas()) in printed
    suffixes = ("tables_html.parquet", "tables.xlsx")
    assert [path.name for path in names["written"].paths] == [f"{d}.{s}" for d in ("a", "report") for s in suffixes]
    assert [(row["id"], bool(row["error"])) for row in names["records"].to_pylist()] == [(7, False), (8, True)]
    types = dict(names["frame"].dtypes)
    for line in results.splitlines():
        if line.startswith("| `"):
            listed, kind, _ = line.split(" | ")
            for name in re.findall(r"`(\w+)`", listed):
                assert types.pop(name) == re.match(r"\w+", kind)[0]  # type: ignore[index]
    assert types == {}
    (example,) = blocks("python", (ROOT / "docs" / "docling.md").read_text(encoding="utf-8"))
    exec(compile(example, "docs/docling.md", "exec"), {})
    assert re.fullmatch(r"\{'mean': 0\.\d+, 'least': 0\.\d+\}\n", capsys.readouterr().out)


def test_the_map_names_every_module() -> None:
    map_block = next(block for block in blocks(text=DESIGN) if block.startswith("granite4v/ "))
    folders = ("granite4v", "clip_projector", "converter", "runtime")
    names = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")} - {"__init__.py"}
    assert names - set(re.findall(r"\w+\.py", map_block)) == set()


def test_adding_a_family_is_described_as_the_families_are_made() -> None:
    section = DESIGN.split("## Adding a model family\n")[1].split("\n## ")[0]
    steps = re.findall(r"^\d\. (.*?)(?=^\d\. |\Z)", section, flags=re.MULTILINE | re.DOTALL)
    assert len(steps) == 7
    places = ("granite4v/families", "converter/tensors")
    for family in FAMILIES:
        assert f"`{family.name}.py`" in section
        assert all((ROOT / place / f"{family.name}.py").is_file() for place in places)
    folders = [ROOT / place for place in ("", "granite4v", "granite4v/families", "converter/tensors", "clip_projector")]
    for name in re.findall(r"`([\w/]+\.py)`", section):
        assert any((folder / name).is_file() for folder in folders), name


def test_paths_in_the_text_exist() -> None:
    texts = [README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))]
    for name in re.findall(r"(?:scripts|tests|docs)/[\w./-]+\w", "\n".join(texts)):
        assert (ROOT / name).exists(), name
