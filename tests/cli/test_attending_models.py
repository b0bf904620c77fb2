"""The commands with a model whose decoder attends to images, in quantized files."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from granite4v.cli.main import app
from granite4v.runtime.model import Model
from tests.helpers.pictures import noise_picture
from tests.helpers.served import events, image, served, text
from tests.toy.checkpoint import PRESETS

SPEC = PRESETS["tiny-mllama-wide"]
TYPES = [("Q8_0", "Q8_0"), ("Q4_K_M", "Q8_0"), ("Q4_0", "F16")]


@pytest.fixture(scope="module", params=TYPES, ids=[text for text, _ in TYPES])
def folder(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    return make_model(SPEC, *request.param)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("pictures") / f"{name}.png" for name in "ab"]
    for path, size in zip(paths, [(110, 100), (160, 40)], strict=True):
        noise_picture(size).save(path)
    return paths


def run(*arguments: Any, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.stderr
    return result


def test_ask_and_chat(folder: Path, pages: list[Path]) -> None:
    with Model.load(folder) as model:
        expected = model.generate("What is this?", pages, max_tokens=8)
    asked = run("ask", *pages, "What is this?", "--model", folder, "--max-tokens", 8)
    assert asked.stdout == expected.text + "\n"
    assert "(2 of images)" in asked.stderr
    chat = CliRunner().invoke(
        app, ["chat", *map(str, pages), "--model", str(folder), "--max-tokens", "8"], input="What is this?"
    )
    assert chat.stdout == expected.text + "\n"


def test_extract_by_a_prompt_and_not_by_a_task_of_another_template(folder: Path, pages: list[Path]) -> None:
    with Model.load(folder) as model:
        expected = {page.name: model.generate("What?", [page], max_tokens=4).text for page in pages}
    done = run("extract", *pages, "--model", folder, "--prompt", "What?", "--max-tokens", 4, "--json", status=1)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {Path(record["source"]).name: record["text"] for record in records} == expected
    assert {record["finish_reason"] for record in records} == {"length"}  # which is why the status is 1
    refused = run("extract", pages[0], "--model", folder, "--task", "tables_html", status=1)
    assert "does not know the task 'tables_html'" in refused.stderr and not refused.stdout


def test_serve(folder: Path, pages: list[Path]) -> None:
    """Requests at once are answered one after the other, each as it is alone."""
    pictures = [image(page.read_bytes()) for page in pages]
    asked = {
        "first": ([pictures[0]], [pages[0]]),
        "second": ([pictures[1]], [pages[1]]),
        "none": ([], []),
        "both": (pictures, pages),
    }
    with Model.load(folder) as model:
        expected = {name: model.generate("What?", paths, max_tokens=8).text for name, (_, paths) in asked.items()}
    with Model.load(folder) as model, served(model) as server, ThreadPoolExecutor(8) as pool:
        futures = [
            (name, pool.submit(server.chat, *parts, text("What?"), max_tokens=8))
            for _ in range(2)
            for name, (parts, _) in asked.items()
        ]
        found = [(name, future.result().json["choices"][0]["message"]["content"]) for name, future in futures]
        assert found == [(name, expected[name]) for name, _ in found]
        streamed = events(server.chat(*pictures, text("What?"), max_tokens=8, stream=True).body)
        pieces = [choice["delta"].get("content") or "" for event in streamed[:-1] for choice in event["choices"]]
        assert "".join(pieces) == expected["both"]
        refused = server.chat(text("What is <|image|> this?"))
        assert refused.status == 400 and "placeholder" in refused.error["message"]


def test_bench_and_inspect(folder: Path, pages: list[Path]) -> None:
    found = json.loads(run("bench", "--model", folder, "--image", pages[0], "--max-tokens", 4, "--json").stdout)
    assert (found["image_tokens"], found["settings"]["n_parallel"]) == (1, 1)
    assert "one at a time" in run("inspect", folder).stdout


def test_verify_tells_the_damage(folder: Path, pages: list[Path], make_checkpoint: Callable[..., Path]) -> None:
    arguments = ("--reference", make_checkpoint(SPEC), "--image", pages[0], "--positions", 4, "--json")
    with_image, text = json.loads(run("verify", folder, *arguments).stdout)["comparisons"]
    assert with_image["same_prompt_tokens"] and with_image["n_image_tokens"] == 1
    assert [stream["layer"] for stream in with_image["streams"]] == [1]
    most = 0.1 if "Q8_0" in next(folder.glob("text-*")).name else 0.7
    assert 1e-4 < with_image["streams"][0]["relative_l2"] < 0.1
    assert all(1e-4 < found["logits_relative_l2"] < most for found in (with_image, text))
