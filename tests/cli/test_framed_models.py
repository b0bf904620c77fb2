"""The commands with a model whose images have tokens between their tiles, in quantized files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.commands import check_ask_and_chat, check_extract, check_serve, run, write_pages
from tests.toy.checkpoint import PRESETS

# Each token goes to all experts. If it went to one, quantizing would sometimes send it to another, and no bound on the
# damage could distinguish that from a mistake. `test_llama4_text.py` has quantized files with routing.
SPEC = replace(PRESETS["tiny-llama4-wide"], experts_used=PRESETS["tiny-llama4-wide"].experts)
TYPES = [("Q8_0", "Q8_0"), ("Q4_K_M", "Q8_0"), ("Q4_0", "Q4_0")]


@pytest.fixture(scope="module", params=TYPES, ids=[text for text, _ in TYPES])
def folder(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    return make_model(SPEC, *request.param)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of seven tiles and of one."""
    return write_pages(tmp_path_factory.mktemp("pictures"), (100, 150), (50, 40))


def test_ask_and_chat(folder: Path, pages: list[Path]) -> None:
    assert "(32 of images)" in check_ask_and_chat(folder, pages)


def test_extract_by_a_prompt_and_not_by_a_task_of_another_template(folder: Path, pages: list[Path]) -> None:
    check_extract(folder, pages)


def test_serve(pages: list[Path], make_model: Callable[..., Path]) -> None:
    check_serve(make_model(SPEC, *TYPES[1]), pages, n_at_once=1)


def test_bench_and_inspect(folder: Path, pages: list[Path]) -> None:
    found = json.loads(run("bench", "--model", folder, "--image", pages[0], "--max-tokens", 4, "--json").stdout)
    assert found["image_tokens"] == 28
    shown = run("inspect", folder).stdout
    assert "pixel shuffle" in shown and "llama4" in shown


def test_verify_tells_the_damage(folder: Path, pages: list[Path], make_checkpoint: Callable[..., Path]) -> None:
    images = [argument for page in pages for argument in ("--image", page)]
    arguments = ("--reference", make_checkpoint(SPEC), *images, "--positions", 4, "--json")
    *with_images, text = json.loads(run("verify", folder, *arguments).stdout)["comparisons"]
    most = 0.1 if "Q8_0" in next(folder.glob("text-*")).name else 0.7
    for found, n_tokens in zip(with_images, (28, 4), strict=True):
        assert found["same_prompt_tokens"] and found["n_image_tokens"] == found["n_image_tokens_reference"] == n_tokens
        assert [stream["layer"] for stream in found["streams"]] == [0]
        assert 1e-4 < found["streams"][0]["relative_l2"] < 0.3
    damage = [found["logits_relative_l2"] for found in (*with_images, text)]
    assert all(1e-4 < value < most for value in damage), damage


def test_verify_finds_no_damage_in_float32(
    pages: list[Path], make_model: Callable[..., Path], make_checkpoint: Callable[..., Path]
) -> None:
    arguments = ("--reference", make_checkpoint(SPEC), "--image", pages[0], "--positions", 8, "--json")
    for found in json.loads(run("verify", make_model(SPEC), *arguments).stdout)["comparisons"]:
        assert found["same_prompt_tokens"] and found["same_top"] == 1 and found["logits_max"] < 1e-3
        assert all(stream["relative_l2"] < 2e-5 for stream in found["streams"])
