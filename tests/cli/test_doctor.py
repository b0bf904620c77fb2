"""`granite4v doctor`: the report on stdout in 80 columns, progress on stderr, and an exit status for scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from granite4v import doctor
from granite4v.cli.doctor import WIDTH, as_text
from granite4v.cli.main import app
from granite4v.doctor import Problem, Report, Section, kernels
from granite4v.ggml.build import installed_build

COMMAND = "CXXFLAGS='-fno-dse -fno-tree-dse' python -m pip install " + "x" * 80


@pytest.fixture(autouse=True)
def few_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TYPES", ("Q4_0",))
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))


def test_the_report_of_this_machine_as_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    serious = [problem for problem in found["problems"] if problem["serious"]]
    assert (found["content"], result.exit_code) == (not serious, 1 if serious else 0) and result.stderr == ""
    assert found["build"]["compiler"] == installed_build().compiler
    assert found["kernels"]["gflop_s"]["Q4_0"]["plain"] > 0
    assert [*found][:-1] == [
        "content",
        "cpu",
        "build",
        "kernels",
        "gpu",
        "threads",
        "memory",
        "cache",
        "config",
        "extras",
    ]


def test_progress_goes_to_stderr() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert "measuring kernels" in result.stderr and "measuring" not in result.stdout
    assert result.stdout.startswith("cpu ") and "\nkernels " in result.stdout


def test_a_serious_problem_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for serious, status in ((True, 1), (False, 0)):
        report = Report([Section("build", ["text"], {}, [Problem("It is slow.", COMMAND, serious)])])
        monkeypatch.setattr(doctor, "examine", lambda *_, report=report: report)
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == status and f"\n{COMMAND}\n" in f"{result.stdout}\n"


def test_the_text_is_aligned_and_only_commands_are_wider_than_the_terminal() -> None:
    words = "a sentence of many words " * 8
    table = [["", "plain", "AMX"], ["Q8_0", "107 ", "486*"], ["attention", "12 ", "-"]]
    problems = [Problem("Advice.", "", is_serious=False), Problem(words, COMMAND)]
    text = as_text(Report([Section("kernels", ["GFLOP/s", *table, words], {}, problems), Section("gpu", ["none"], {})]))
    lines = text.splitlines()
    assert lines[:4] == [
        "kernels  GFLOP/s",
        "                    plain   AMX",
        "         Q8_0        107   486*",
        "         attention    12      -",
    ]
    assert [line for line in lines if len(line) > WIDTH] == [COMMAND]
    assert lines.index("advice   Advice.") > lines.index(COMMAND)  # serious problems come first
    assert "wrong" not in text
    assert as_text(Report([Section("gpu", ["none"], {})])) == "gpu      none\n\nNothing is wrong."


NOT_INSTALLED = """
import importlib.metadata, importlib.util

find_spec, version = importlib.util.find_spec, importlib.metadata.version


def find_all_others(name, *rest):
    return None if name == "llama_cpp" else find_spec(name, *rest)


def version_of_others(name):
    if name == "llama-cpp-python":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)


importlib.util.find_spec, importlib.metadata.version = find_all_others, version_of_others
"""


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("sitecustomize.py", NOT_INSTALLED, "llama-cpp-python is not installed."),
        ("llama_cpp/__init__.py", "raise ImportError('no libomp.so.5')", "is broken: ImportError: no libomp.so.5"),
        ("llama_cpp/__init__.py", "import os; os.kill(os.getpid(), 4)", "is broken: loading it ended a process by"),
    ],
)
def test_the_doctor_works_where_llama_cpp_python_does_not(file: str, code: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    root = Path(doctor.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}", "GRANITE4V_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "granite4v", "doctor", "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1, "") and not found["content"] and "kernels" not in found
    first = found["problems"][0]
    assert expected in first["text"] and "pip install" in first["command"]
