"""`granite4v ask`: only the answer on stdout, everything else on stderr, and exit statuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pikepdf
import pytest
from PIL import Image
from typer.testing import CliRunner

import granite4v
from granite4v.cli.main import app
from granite4v.runtime import formats
from granite4v.runtime.documents import Page, open_pages
from tests.helpers.pictures import noise_picture, text_picture
from tests.toy.spec import PRESETS

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(TINY)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "page.png"
    text_picture((150, 100)).save(path)
    return path


def run(*arguments: Any, stdin: bytes | None = None) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture(scope="module")
def answer(folder: Path, page: Path) -> granite4v.Answer:
    with granite4v.load(folder) as model:
        return model.generate("What is this?", [page], max_tokens=12)


def test_the_answer_alone_is_on_stdout(folder: Path, page: Path, answer: granite4v.Answer) -> None:
    result = run("ask", page, "What is this?", "--model", folder, "--max-tokens", 12)
    assert result.exit_code == 0
    assert result.stdout == answer.text + "\n"
    assert "encoding images ..." in result.stderr and "processing the prompt ..." in result.stderr
    assert f"{answer.timings.n_prompt} prompt tokens ({answer.timings.n_image} of images)" in result.stderr
    assert "the answer was cut off after 12 tokens; raise --max-tokens to allow more" in result.stderr


@pytest.mark.parametrize("option", ["--no-stream", "--json"])
def test_the_same_answer_complete_or_as_json(folder: Path, page: Path, answer: granite4v.Answer, option: str) -> None:
    result = run("ask", page, "What is this?", "--model", folder, "--max-tokens", 12, option)
    if option == "--json":
        document = json.loads(result.stdout)
        assert document["text"] == answer.text and document["tokens"] == answer.tokens
        assert document["finish_reason"] == "length"
    else:
        assert result.stdout == answer.text + "\n"


def test_the_answer_to_a_task_tag_has_its_format(folder: Path, page: Path) -> None:
    """Cut off, it is closed and said to be; with --unconstrained, it is what the model writes."""
    with granite4v.load(folder) as model:
        free = model.generate("<tables_otsl>", [page], max_tokens=12).text
        expected = {
            tag: model.generate(
                f"<{tag}>", [page], max_tokens=12, constraint=granite4v.grammar_for(tag), repetition=tag
            )
            for tag in ("tables_otsl", "chart2code")
        }
    for tag, answer in expected.items():
        result = run("ask", page, f"<{tag}>", "--model", folder, "--max-tokens", 12)
        assert (result.exit_code, result.stdout) == (0, f"{answer.text}\n")
        n_tokens, closed = len(answer.tokens), answer.closing is not None
        how = " and closed in the format of its task" if closed else ""
        assert closed == (tag != "chart2code")
        assert f"the answer was cut off after {n_tokens} tokens{how}; raise --max-tokens to allow more" in result.stderr
        if closed:
            formats.read(tag, result.stdout)
    loose = run("ask", page, " <tables_otsl>", "--model", folder, "--max-tokens", 12, "--unconstrained")
    assert loose.stdout == f"{free}\n" != f"{expected['tables_otsl'].text}\n" and "closed" not in loose.stderr


def test_an_image_from_stdin(folder: Path, page: Path, answer: granite4v.Answer) -> None:
    result = run("ask", "-", "What is this?", "--model", folder, "--max-tokens", 12, stdin=page.read_bytes())
    assert result.stdout == answer.text + "\n"


def test_several_images_and_none(folder: Path, page: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    noise_picture((70, 90)).save(other)
    two = run("ask", page, other, "Compare.", "--model", folder, "--max-tokens", 2, "--json")
    none = run("ask", "Hello", "--model", folder, "--max-tokens", 2, "--json")
    assert json.loads(two.stdout)["timings"]["n_image"] > json.loads(none.stdout)["timings"]["n_image"] == 0


@pytest.fixture(scope="module")
def pdf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "scan #1.pdf"
    first, *rest = [text_picture((150, 100), seed) for seed in range(3)]
    first.save(path, save_all=True, append_images=rest, resolution=72)
    return path


def test_pages_of_a_pdf(folder: Path, page: Path, pdf: Path) -> None:
    options = ("What is this?", "--model", folder, "--max-tokens", 12)
    with (
        granite4v.load(folder) as model,
        contextlib.closing(open_pages([pdf], pages="2-3", view=model.files.vision_config)) as found,
    ):
        images = [one.image for one in found if isinstance(one, Page)]
        expected = [model.generate("What is this?", chosen, max_tokens=12).text for chosen in ([images[1]], images)]
        beside = model.generate("What is this?", [page, images[0]], max_tokens=12).text
    told = [run("ask", f"{pdf}#{pages}", *options).stdout for pages in ("3", "2-3")]
    assert told == [f"{text}\n" for text in expected] and expected[0] != expected[1]
    assert run("ask", page, f"{pdf}#2", *options).stdout == f"{beside}\n"


def test_a_pdf_of_one_page_needs_no_number(folder: Path, page: Path, tmp_path: Path) -> None:
    Image.open(page).save(tmp_path / "one.pdf", resolution=72)
    told = [run("ask", tmp_path / f"one.pdf{n}", "Hm?", "--model", folder, "--max-tokens", 5) for n in ("", "#1")]
    assert told[0].exit_code == 0 and told[0].stdout == told[1].stdout


def test_an_image_may_have_the_sign_of_pages_in_its_name(folder: Path, page: Path, tmp_path: Path) -> None:
    (tmp_path / "a#1").write_bytes(page.read_bytes())
    told = [run("ask", path, "Hm?", "--model", folder, "--max-tokens", 5).stdout for path in (page, tmp_path / "a#1")]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{pdf}", "has 3 pages; name those that are meant, such as 'scan #1.pdf#1' or"),
        ("{pdf}#4", "has 3 pages"),
        ("{pdf}#0", "#0'"),
        ("{pdf}#", "#'"),
        ("gone.pdf#1", "there is no file 'gone.pdf'"),
    ],
)
def test_pages_that_are_not_there(folder: Path, pdf: Path, given: str, message: str) -> None:
    result = run("ask", given.format(pdf=pdf), "Hm?", "--model", folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.replace("\n", " ") and "Traceback" not in result.stderr


def test_no_more_pages_are_read_than_there_is_room_for(folder: Path, pdf: Path) -> None:
    result = run("ask", f"{pdf}#1-3", "Hm?", "--model", folder, "--ctx-size", 64)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(r"granite4v: \d+ tokens for 1 picture already, but the context size is 64; name", result.stderr)


def test_more_than_an_image_on_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("granite4v.clip_projector.files.MAX_FILE_BYTES", 1000)
    result = run("ask", "-", "Hm?", stdin=bytes(1001))
    assert result.exit_code == 1 and "standard input holds more than 1,000 bytes" in result.stderr


def test_a_page_of_an_encrypted_pdf(folder: Path, pdf: Path, tmp_path: Path) -> None:
    with pikepdf.open(pdf) as opened:
        opened.save(tmp_path / "locked.pdf", encryption=pikepdf.Encryption(owner="o", user="secret"))
    arguments = ("ask", tmp_path / "locked.pdf#2", "Hm?", "--model", folder, "--max-tokens", 5)
    without, opened_ = run(*arguments), run(*arguments, "--password", "secret")
    assert without.exit_code == 1 and "password" in without.stderr
    assert opened_.stdout == run("ask", f"{pdf}#2", *arguments[2:]).stdout != ""


def test_the_vision_file_by_option(folder: Path, page: Path, tmp_path: Path, answer: granite4v.Answer) -> None:
    alone = tmp_path / "text.gguf"
    alone.write_bytes((folder / "text-F32.gguf").read_bytes())
    without = run("ask", page, "What is this?", "--model", alone)
    assert without.exit_code == 1 and "'--mmproj'" in without.stderr and without.stdout == ""
    mmproj = folder / "mmproj-F32.gguf"
    result = run("ask", page, "What is this?", "--model", alone, "--mmproj", mmproj, "--max-tokens", 12)
    assert result.stdout == answer.text + "\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{page}", "<tables_json> please"], 1, "the task tag '<tables_json>' beside other text"),
        (["{page}", "x", "--ctx-size", "64"], 1, "but the context size is 64"),
        (["missing.png", "x"], 1, "'missing.png' cannot be read as an image"),
        (["{page}", "x", "--device", "tpu"], 2, "'tpu' is not one of 'auto', 'cpu', 'cuda', 'metal'"),
        (["{page}", "x", "--lora"], 1, "no separate LoRA to apply"),
        (["{page}"], 2, "write the question after it"),
        (["{page}", "x", "--temperature", "-1"], 2, "--temperature"),
        (["{page}", "x", "--temperature", "nan"], 2, "nan is not a finite number"),
        (["{page}", "x", "--temperature", "inf"], 2, "inf is not a finite number"),
        (["{page}", "x", "--top-p", "nan"], 2, "nan is not a finite number"),
        (["{page}", "x", "--seed", "-1"], 2, "--seed"),
        (["{page}", "x", "--max-tokens", "0"], 2, "--max-tokens"),
        (["{page}", "x", "--max-tokens", "9" * 30], 1, "for the answer), but the context size is"),
        (["{page}", "x", "--ctx-size", "-5"], 2, "--ctx"),
        (["{page}", "x", "--threads", "0"], 2, "--threads"),
        (["{page}", "x", "--password", "caf\udce9"], 2, "it holds bytes that are not UTF-8"),
        (["{page}", "x", "--threads", "-1"], 2, "--threads"),
        (["{page}", "x", "--threads", "1000000000"], 2, "--threads"),
        (["{page}", "caf\udce9"], 1, "the prompt holds '\\udce9', which is not valid Unicode"),
        (["{page}", "x", "--system", "caf\udce9"], 1, "the prompt holds '\\udce9'"),
        (["https://example.org/a.png", "x"], 1, "'https://example.org/a.png'"),
        (["-", "-", "x"], 2, "may be given only once"),
        (["-", "x"], 1, "standard input, but that is empty or closed"),
    ],
)
def test_failures_are_a_message_and_a_status(
    folder: Path, page: Path, arguments: list[str], status: int, message: str
) -> None:
    result = run("ask", *(argument.format(page=page) for argument in arguments), "--model", folder)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr.replace("\n", " ") and "Traceback" not in result.stderr


def test_a_system_message_is_used(folder: Path) -> None:
    plain, system = (
        run("ask", "Hello", "--model", folder, "--max-tokens", 8, *extra) for extra in ([], ["--system", "Be brief."])
    )
    assert plain.stdout != system.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child there")
def test_ctrl_c_ends_cleanly(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """In the middle of a long answer: the output so far stays, no traceback, status 130."""
    folder = make_model(replace(TINY, seed=3))
    command = [sys.executable, "-m", "granite4v", "ask", "Hello", "--model", str(folder), "--max-tokens", "7000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)  # it has begun to answer
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - start < 30
    assert process.returncode == 130, errors
    assert b"interrupted" in errors and b"Traceback" not in errors


def test_the_environment_gives_defaults_that_options_replace(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRANITE4V_MODEL", str(folder))
    assert run("ask", "Hello", "--max-tokens", 2).exit_code == 0
    gone = run("ask", "Hello", "--model", tmp_path / "gone")
    assert gone.exit_code == 1 and "gone" in gone.stderr
    monkeypatch.setenv("GRANITE4V_THREADS", "none")
    wrong = run("ask", "Hello", "--max-tokens", 2)
    assert wrong.exit_code == 2 and "GRANITE4V_THREADS" in wrong.stderr
