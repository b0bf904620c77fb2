"""The chat in a real terminal, driven by keys and judged by its screen."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pikepdf
import pytest
from PIL import Image

import granite4v
from granite4v.converter import Options, convert
from granite4v.default_model import checkpoint_folder, embedded_model
from granite4v.runtime.formats import read_csv, read_html
from tests.helpers.chats import INVOICE
from tests.helpers.pdfs import scan_pdf, write
from tests.helpers.terminal import Terminal
from tests.toy.spec import PRESETS

QUESTION, OTHER = "What is the total?", "What is the date?"
Start = Callable[..., Terminal]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return embedded_model(str)


@pytest.fixture(scope="module")
def table(model_folder: Path) -> list[list[str]]:
    """What the model reads from the page through the Python API."""
    with granite4v.load(model_folder) as model:
        constraint = granite4v.grammar_for("tables_html")
        answer = model.generate("<tables_html>", [INVOICE], max_tokens=3000, constraint=constraint)
    return read_html(answer.text)[0].texts()


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A PDF whose second page is the invoice; its name contains a space."""
    pages = (Image.new("RGB", (300, 200), "white"), Image.open(INVOICE))
    return write(tmp_path / "my scan.pdf", scan_pdf(*pages))


@pytest.fixture
def start(cache: Path, model_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the chat, and ends it with the test."""
    started: list[Terminal] = []

    def make(
        *arguments: str, model: Path | None = None, environment: dict[str, str] | None = None, **size: int
    ) -> Terminal:
        command = [sys.executable, "-m", "granite4v", "chat", "--model", str(model or model_folder), *arguments]
        variables = {"GRANITE4V_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        terminal = Terminal(command, environment={**variables, **(environment or {})}, folder=str(tmp_path), **size)
        started.append(terminal)
        return terminal

    yield make
    for terminal in started:
        terminal.__exit__(None, None, None)


def cells_in(shown: str) -> list[list[str]]:
    """Returns the cells of a table drawn with lines, one row per line."""
    rows: list[list[str]] = []
    for line in shown.splitlines():
        if line.startswith("│"):
            rows.append([cell.strip() for cell in line.strip("│").split("│")])
    return rows


def test_a_page_of_a_pdf_is_asked_about_again_and_again(
    start: Start, document: Path, table: list[list[str]], tmp_path: Path
) -> None:
    chat = start(columns=100)
    assert "attached my scan.pdf#2: " in chat.ask(f"'{document}'#2")
    first = chat.ask(QUESTION)
    assert re.search(r"\d+ tokens?, first after [\d.]+ s", first)
    chat.ask(OTHER)
    stats = chat.ask("/stats")
    assert "0 images encoded" in stats and "2 tiles" not in stats
    assert cells_in(chat.ask("<tables_html>")) == table
    assert "took back: <tables_html>" in chat.ask("/undo")
    assert "saved to" in chat.ask("/save talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["question"] for turn in saved["turns"]] == [QUESTION, OTHER]
    again = chat.ask("/regen 0").splitlines()[0]
    assert again and again in chat.text.split(OTHER)[1].split("/stats")[0]
    chat.ask("/clear")
    assert "loaded 2 questions and 1 page" in chat.ask("/load talk.json")
    chat.send("\x04")
    assert chat.end() == 0


def test_a_page_is_read_once_also_across_restarts(start: Start, tmp_path: Path) -> None:
    cache = {"GRANITE4V_CACHE": str(tmp_path / "cache")}
    for arguments, stored, n_encoded in (([], False, 1), ([], True, 0), (["--no-page-store"], False, 1)):
        chat = start(str(INVOICE), *arguments, environment=cache, columns=100)
        chat.ask(QUESTION)
        stats = chat.ask("/stats")
        assert ("read from disk" in stats) == stored and f"{n_encoded} image" in stats
        chat.send("\x04")
        assert chat.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(start: Start, make_model: Callable[..., Path]) -> None:
    chat = start(model=make_model(replace(PRESETS["tiny"], seed=3)))  # its answers do not end
    for n_answers in (1, 2):
        chat.wait(lambda: chat.is_at_prompt)
        chat.send("Hello?")
        chat.wait_for("> Hello?")
        n_lines = len(chat.lines_to_cursor())
        chat.send("\r")
        chat.wait(lambda n_lines=n_lines: len(chat.lines_to_cursor()) > n_lines + 3)  # the answer grows
        chat.interrupt()
        chat.wait(lambda: chat.is_at_prompt)
        assert chat.text.count("stopped after ") == n_answers
    assert "took back: Hello?" in chat.ask("/undo")
    chat.send("half a line\x03")
    chat.wait(lambda: chat.is_at_prompt)
    chat.send("\x03")
    chat.wait_for("once more, or Ctrl-D, leaves the chat")
    chat.wait(lambda: chat.is_at_prompt)
    chat.send("\x03")
    assert chat.end() == 0


def test_sixty_columns_are_enough(start: Start, table: list[list[str]]) -> None:
    chat = start(str(INVOICE), columns=60, rows=20)
    shown = chat.ask("<tables_html>")
    assert cells_in(shown) == table and max(map(len, shown.splitlines())) <= 60
    assert all(len(line) <= 60 for line in chat.ask("/help").splitlines())
    chat.resize(40, 20)
    assert max(map(len, chat.ask("/regen 0").splitlines())) <= 40


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb", "PROMPT_TOOLKIT_NO_CPR": "1"}])
def test_terminals_without_colours(start: Start, table: list[list[str]], environment: dict[str, str]) -> None:
    chat = start(str(INVOICE), environment=environment)
    assert cells_in(chat.ask("<tables_html>")) == table
    chat.ask(QUESTION)
    assert not re.search(rb"\x1b\[[\d;]*3[0-7]m|\x1b\[[\d;]*38;", chat.raw)
    if environment.get("TERM") == "dumb":
        assert b"\x1b[2K" not in chat.raw


def test_a_question_of_several_lines(start: Start, tmp_path: Path) -> None:
    chat = start()
    chat.wait(lambda: chat.is_at_prompt)
    chat.send("one\\\rtwo\x1b\rthree")
    chat.wait_for("three")
    chat.enter()
    chat.ask("/save lines.json")
    turn = json.loads((tmp_path / "lines.json").read_text())["turns"][0]
    assert turn["question"] == "one\ntwo\nthree"


def test_completion_and_history(start: Start, cache: Path) -> None:
    chat = start()
    chat.wait(lambda: chat.is_at_prompt)
    chat.send("/he")
    chat.wait_for("this list")
    chat.send("\t")
    chat.wait_for("> /help")
    chat.enter()
    assert "/attach FILE" in chat.text
    assert stat.S_IMODE((cache / "chat-history").stat().st_mode) == 0o600
    other = start()
    other.wait(lambda: other.is_at_prompt)
    other.send("\x1b[A")
    other.wait_for("> /help")


def test_tables_go_to_the_clipboard(start: Start, table: list[list[str]]) -> None:
    chat = start(str(INVOICE))
    chat.ask("<tables_html>")
    assert "sent the last table" in chat.ask("/copy")
    sent = re.search(rb"\x1b\]52;c;([A-Za-z0-9+/=]+)\x07", chat.raw)
    assert sent is not None
    assert read_csv(base64.b64decode(sent[1]).decode()).texts() == table


def test_mistakes_are_one_line_and_the_chat_goes_on(start: Start, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(INVOICE.read_bytes()[:500])
    (tmp_path / "notes.json").write_text("{}")
    chat = start("missing.png", columns=200)
    for line, message in (
        ("/attach none.pdf", "there is no file 'none.pdf'."),
        (str(broken), "broken.png"),
        ("/nothing", "there is no command '/nothing'; /help lists them."),
        ("<tables_html>", "none is attached"),
        ("/load notes.json", "is not a saved chat"),
        ("/copy", "there is no answer yet."),
    ):
        shown = chat.ask(line)
        assert message in shown and len(shown.strip().splitlines()) == 1, shown
    assert "there is no file 'missing.png'." in chat.text and "Traceback" not in chat.text
    assert "first after" in chat.ask("Hello?")


def test_a_password_is_asked_for_and_not_shown(start: Start, document: Path) -> None:
    with pikepdf.open(document) as opened:
        opened.save(document.with_name("locked.pdf"), encryption=pikepdf.Encryption(owner="o", user="secret"))
    chat = start("locked.pdf#2")
    chat.wait_for("Password of locked.pdf:")
    chat.send("secre\r")
    chat.wait(lambda: chat.text.count("Password of locked.pdf:") == 2)
    chat.send("secret\r")
    chat.wait(lambda: chat.is_at_prompt)
    assert "attached locked.pdf#2" in chat.text and "secre" not in chat.text
    chat.send("\x04")
    assert chat.end() == 0
    chat = start("locked.pdf#2")
    chat.wait_for("Password of locked.pdf:")
    chat.send("\x04")
    chat.wait(lambda: chat.is_at_prompt)
    assert "encrypted" in chat.text
    chat.send("\x04")
    assert chat.end() == 0


def test_text_alone_with_the_adapter_off(start: Start, tmp_path: Path) -> None:
    separate = tmp_path / "separate"
    convert(checkpoint_folder(), separate, Options("F16", "F16", lora="separate"))
    chat = start("--max-tokens", "12", model=separate)
    assert "the adapter is off" in chat.ask("/adapter off")
    chat.ask(QUESTION)
    chat.ask("/save off.json")
    with granite4v.load(separate) as model:
        expected = model.generate(QUESTION, max_tokens=12, lora=False).text
    assert json.loads((tmp_path / "off.json").read_text())["turns"][0]["answer"] == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_cleanly(start: Start, number: signal.Signals) -> None:
    chat = start(str(INVOICE))
    chat.wait(lambda: chat.is_at_prompt)
    chat.signal(number)
    assert chat.end() == 128 + number
    assert "Traceback" not in chat.text


def test_answers_are_plain_where_stdout_is_no_terminal(
    cache: Path, model_folder: Path, tmp_path: Path, start: Start
) -> None:
    """The line editor and the notes are on stderr then."""
    command = f"{sys.executable} -m granite4v chat {INVOICE} --model {model_folder} > answers.txt"
    variables = {"GRANITE4V_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with Terminal(["sh", "-c", command], environment=variables, folder=str(tmp_path)) as chat:
        chat.ask("<tables_html>")
        chat.send("\x04")
        assert chat.end() == 0
    piped = subprocess.run(
        [sys.executable, "-m", "granite4v", "chat", str(INVOICE), "--model", str(model_folder)],
        input="<tables_html>",
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        check=True,
    )
    assert (tmp_path / "answers.txt").read_text() == piped.stdout and "<td>" in piped.stdout
