"""`granite4v chat` without a terminal: one question from stdin, only the answer on stdout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import granite4v
from granite4v.cli.main import app
from tests.helpers.chats import INVOICE
from tests.helpers.pdfs import scan_pdf, write
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "page.png"
    text_picture((150, 100)).save(path)
    return path


def run(*arguments: Any, stdin: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=stdin)


def test_the_answer_alone_is_on_stdout(folder: Path, page: Path) -> None:
    with granite4v.load(folder) as model:
        expected = model.generate("What is this?", [page], max_tokens=12)
    result = run(page, "--model", folder, "--max-tokens", 12, stdin="What is this?\n")
    assert (result.exit_code, result.stdout) == (0, expected.text + "\n")
    assert "12 tokens, first after" in result.stderr and "the answer was cut off" in result.stderr


def test_a_task_on_a_page_of_a_pdf(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.pdf", scan_pdf(Image.new("RGB", (300, 300), "white"), Image.open(INVOICE)))
    result = run(f"{path}#2", stdin="<tables_html>")
    assert result.exit_code == 0, result.stderr
    alone = CliRunner().invoke(app, ["chat", str(INVOICE)], input="<tables_html>")
    assert result.stdout == alone.stdout and "<td>" in result.stdout


def test_options_reach_the_model(folder: Path) -> None:
    plain = run("--model", folder, "--max-tokens", 8, stdin="Hello")
    other = run("--model", folder, "--max-tokens", 8, "--system", "Be brief.", stdin="Hello")
    warm = run("--model", folder, "--max-tokens", 8, "--temperature", 2, "--seed", 5, stdin="Hello")
    assert plain.exit_code == other.exit_code == warm.exit_code == 0
    assert len({plain.stdout, other.stdout, warm.stdout}) == 3


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "message"),
    [
        ([], "", 1, "standard input is empty"),
        ([], " \n", 1, "standard input is empty"),
        ([], b"caf\xe9", 1, "not valid Unicode"),
        (["missing.png"], "x", 1, "there is no file 'missing.png'"),
        (["{page}", "{broken}"], "x", 1, "broken.png"),
        (["{page}"], "<tables_json> please", 1, "the task tag <tables_json> stands beside other text"),
        ([], "<tables_html>", 1, "none is attached"),
        ([], "/nothing", 1, "there is no command '/nothing'"),
        ([], "/copy", 1, "there is no answer yet"),
        (["--ctx-size", "64"], "word " * 100, 1, "To make room: restart with --ctx-size 448"),
        (["{page}", "--ctx-size", "64"], "x", 1, "no room for 1 page of 'page.png'"),
        (["--lora"], "x", 1, "no separate LoRA to apply"),
        (["--max-tokens", "0"], "x", 2, "--max-tokens"),
        (["--password", "caf\udce9"], "x", 2, "it holds bytes that are not UTF-8"),
        ([], "/save nul\0.json", 1, "nothing to save yet"),
        (["--temperature", "nan"], "x", 2, "nan is not a finite number"),
    ],
)
def test_failures_are_a_message_and_a_status(
    folder: Path, page: Path, tmp_path: Path, arguments: list[str], stdin: str | bytes, status: int, message: str
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(page.read_bytes()[:100])
    filled = [argument.format(page=page, broken=broken) for argument in arguments]
    result = run(*filled, "--model", folder, stdin=stdin)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child there")
def test_ctrl_c_ends_a_piped_chat(make_model: Callable[..., Path]) -> None:
    folder = make_model(replace(PRESETS["tiny"], seed=3))
    command = [sys.executable, "-m", "granite4v", "chat", "--model", str(folder), "--max-tokens", "7000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ}) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hello")
        process.stdin.close()
        process.stdin = None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert b"interrupted" in errors and b"Traceback" not in errors
