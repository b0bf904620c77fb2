"""`granite4v export`: its output, and its exit statuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from granite4v.cli.main import app
from granite4v.runtime.extract.record import Record, encode
from granite4v.runtime.formats import read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    html = "<table><tr><th>A</th></tr><tr><td>=1</td></tr></table>"
    records = [Record("a.pdf", n, 30, "tables_html", value=read("tables_html", html), stem="a") for n in range(1, 31)]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.jsonl").write_bytes(b"".join(map(encode, records)))
    return tmp_path / "results"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_files_are_listed(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--format", "html", "--format", "xlsx", "-o", tmp_path / "out")
    expected = [tmp_path / "out" / name for name in ("a.tables_html.html", "a.tables.xlsx")]
    assert (result.exit_code, result.stdout.split()) == (0, list(map(str, expected)))
    assert "2 files written" in result.stderr and all(path.is_file() for path in expected)
    many = run(folder, "--format", "csv", "--csv-safe")
    assert many.exit_code == 0 and len(many.stdout.splitlines()) == 30  # on a terminal the first 20
    assert (folder / "a.tables_html.page7.csv").read_text(encoding="utf-8") == "\ufeffA\n'=1\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{folder}", "--format", "xls"], 2, "there is no format 'xls'"),
        (["{folder}", "--format", "html", "--csv-safe"], 2, "'csv_safe' applies to CSV files"),
        (["gone", "--format", "csv"], 1, "there is no 'gone/results.jsonl'; expected the folder that"),
        (["{folder}", "--out", "{folder}/.."], 1, "which no run of 'granite4v extract' made"),
    ],
)
def test_failures_are_a_message_and_a_status(folder: Path, arguments: list[str], status: int, message: str) -> None:
    result = run(*(argument.format(folder=folder) for argument in arguments))
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="permissions of folders are POSIX's")
def test_one_file_that_cannot_be_written_is_told(folder: Path) -> None:
    (folder / "a.tables_html.md").mkdir()
    result = run(folder, "--format", "md", "--format", "html")
    assert result.exit_code == 1 and "'a.tables_html.md' is not written: cannot write" in result.stderr
    assert result.stdout.split() == [str(folder / "a.tables_html.html")]
