"""The commands with a cross-attention model, in quantized files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import check_ask_and_chat, check_extract, check_serve, run, write_pages
from tests.toy.checkpoint import PRESETS

SPEC = PRESETS["tiny-mllama-wide"]
TYPES = [("Q8_0", "Q8_0"), ("Q4_K_M", "Q8_0"), ("Q4_0", "F16")]


@pytest.fixture(scope="module", params=TYPES, ids=[text for text, _ in TYPES])
def folder(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    return make_model(SPEC, *request.param)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pages(tmp_path_factory.mktemp("pictures"), (110, 100), (160, 40))


def test_ask_and_chat(folder: Path, pages: list[Path]) -> None:
    assert "(2 of images)" in check_ask_and_chat(folder, pages)


def test_extract_by_a_prompt_and_not_by_a_task_of_another_template(folder: Path, pages: list[Path]) -> None:
    check_extract(folder, pages)


def test_serve(folder: Path, pages: list[Path]) -> None:
    """Concurrent requests are answered one after the other, each with the same answer as alone."""
    check_serve(folder, pages, n_at_once=8)


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
