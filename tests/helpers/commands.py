"""Runs commands with a small model and a few pages; they must print what the model itself answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from granite4v.cli.main import app
from granite4v.runtime.model import Model
from tests.helpers.pictures import noise_picture
from tests.helpers.served import events, image, served, text

QUESTION = "What is this?"


def run(*arguments: Any, status: int = 0, stdin: str | None = None) -> Any:
    """Runs a command in this process and checks its exit status."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == status, result.stderr
    return result


def write_pages(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    """Writes noise images of these (width, height) sizes in pixels."""
    paths = [folder / f"{i}.png" for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        noise_picture(size).save(path)
    return paths


def check_ask_and_chat(model_folder: Path, pages: Sequence[Path]) -> str:
    """Checks that `ask` and `chat` both answer about all pages; returns what `ask` wrote to stderr."""
    with Model.load(model_folder) as model:
        expected = model.generate(QUESTION, pages, max_tokens=8).text + "\n"
    options = ("--model", model_folder, "--max-tokens", 8)
    asked = run("ask", *pages, QUESTION, *options)
    assert asked.stdout == expected
    assert run("chat", *pages, *options, stdin=QUESTION).stdout == expected
    said: str = asked.stderr
    return said


def check_extract(model_folder: Path, pages: Sequence[Path]) -> None:
    """Checks that with a prompt each page gets its own answer, and that a task of another template is refused."""
    with Model.load(model_folder) as model:
        expected = {page.name: model.generate(QUESTION, [page], max_tokens=4).text for page in pages}
    options = ("--model", model_folder, "--max-tokens", 4)
    done = run("extract", *pages, *options, "--prompt", QUESTION, "--json", status=1)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {Path(record["source"]).name: record["text"] for record in records} == expected
    assert {record["finish_reason"] for record in records} == {"length"}  # which is why the status is 1
    refused = run("extract", pages[0], "--model", model_folder, "--task", "tables_html", status=1)
    assert "does not know the task 'tables_html'" in refused.stderr and not refused.stdout


def check_serve(model_folder: Path, pages: Sequence[Path], n_at_once: int) -> None:
    """Checks that concurrent requests about each page, no page and all pages get the same answers as single ones, and
    that a streamed answer is the same, too.

    Use `n_at_once` = 1 with quantized types whose kernels give other results for several rows than for one.
    """
    pictures = [image(page.read_bytes()) for page in pages]
    asked = [([picture], [page]) for picture, page in zip(pictures, pages, strict=True)]
    asked += [([], []), (pictures, list(pages))]
    with Model.load(model_folder) as model:
        expected = [model.generate(QUESTION, paths, max_tokens=8).text for _, paths in asked]
    with Model.load(model_folder) as model, served(model) as server, ThreadPoolExecutor(n_at_once) as pool:
        futures = [pool.submit(server.chat, *parts, text(QUESTION), max_tokens=8) for parts, _ in 2 * asked]
        found = [future.result().json["choices"][0]["message"]["content"] for future in futures]
        assert found == 2 * expected
        streamed = events(server.chat(*pictures, text(QUESTION), max_tokens=8, stream=True).body)
        pieces = [choice["delta"].get("content") or "" for event in streamed[:-1] for choice in event["choices"]]
        assert "".join(pieces) == expected[-1]
        refused = server.chat(text("What is <|image|> this?"))
        assert refused.status == 400 and "placeholder" in refused.error["message"]
