"""The commands with a model whose images are several runs of tokens, in quantized files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from granite4v.cli.main import app
from granite4v.runtime.model import Model
from tests.helpers.pictures import noise_picture
from tests.toy.checkpoint import PRESETS

SPEC = PRESETS["tiny-llama4-wide"]
TYPES = [("Q8_0", "Q8_0"), ("Q4_K_M", "Q8_0"), ("Q4_0", "Q4_0")]


@pytest.fixture(scope="module", params=TYPES, ids=[text for text, _ in TYPES])
def folder(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    return make_model(SPEC, *request.param)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of seven tiles and of one."""
    paths = [tmp_path_factory.mktemp("pictures") / f"{name}.png" for name in "ab"]
    for path, size in zip(paths, [(100, 150), (50, 40)], strict=True):
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
    assert "(32 of images)" in asked.stderr
    chat = CliRunner().invoke(
        app, ["chat", *map(str, pages), "--model", str(folder), "--max-tokens", "8"], input="What is this?"
    )
    assert chat.stdout == expected.text + "\n"


def test_extract_by_a_prompt_and_not_by_a_task_of_another_template(folder: Path, pages: list[Path]) -> None:
    done = CliRunner().invoke(
        app,
        ["extract", *map(str, pages), "--model", str(folder), "--prompt", "What?", "--max-tokens", "4", "--json"],
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(record["source"]).name for record in records] == ["a.png", "b.png"]
    refused = run("extract", pages[0], "--model", folder, "--task", "tables_html", status=1)
    assert "does not know the task 'tables_html'" in refused.stderr and not refused.stdout


def test_bench_and_inspect(folder: Path, pages: list[Path]) -> None:
    found = json.loads(run("bench", "--model", folder, "--image", pages[0], "--max-tokens", 4, "--json").stdout)
    assert found["image_tokens"] == 28
    shown = run("inspect", folder).stdout
    assert "pixel shuffle" in shown and "llama4" in shown


def test_verify_tells_the_damage(folder: Path, pages: list[Path], make_checkpoint: Callable[..., Path]) -> None:
    images = [argument for page in pages for argument in ("--image", page)]
    arguments = ("--reference", make_checkpoint(SPEC), *images, "--positions", 4, "--json")
    *with_images, text = json.loads(run("verify", folder, *arguments).stdout)["comparisons"]
    # a token that is routed to another expert differs much, whatever the type
    most = 0.4 if "Q8_0" in next(folder.glob("text-*")).name else 1.2
    for found, n_tokens in zip(with_images, (28, 4), strict=True):
        assert found["same_prompt_tokens"] and found["n_image_tokens"] == found["n_image_tokens_reference"] == n_tokens
        assert [stream["layer"] for stream in found["streams"]] == [0]
        assert 1e-4 < found["streams"][0]["relative_l2"] < 0.3
    damage = [found["logits_relative_l2"] for found in (*with_images, text)]
    assert all(1e-4 < value < most for value in damage), damage


def test_verify_finds_no_damage_in_float32(pages: list[Path], make_model: Any, make_checkpoint: Any) -> None:
    folder = make_model(SPEC)
    arguments = ("--reference", make_checkpoint(SPEC), "--image", pages[0], "--positions", 8, "--json")
    for found in json.loads(run("verify", folder, *arguments).stdout)["comparisons"]:
        assert found["same_prompt_tokens"] and found["same_top"] == 1 and found["logits_max"] < 1e-3
        assert all(stream["relative_l2"] < 2e-5 for stream in found["streams"])
