"""Tests of how often a page with several tasks is opened, hashed, copied and rendered as a prompt."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

import granite4v
from granite4v.runtime.extract import extract
from granite4v.runtime.prompt.template import ChatTemplate
from tests.helpers.pictures import noise_picture
from tests.toy.spec import PRESETS

TASKS = ("tables_html", "chart2csv", "chart2summary")
SIZE = (150, 100)
N_BYTES = 3 * SIZE[0] * SIZE[1]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", n_ctx=400, n_threads=1) as model:
        yield model


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed in range(2):
        noise_picture(SIZE, seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts operations of this process: on the pixels of a page, on prompts and on folders."""
    counts: Counter[str] = Counter()
    sha256, tobytes, frombytes = hashlib.sha256, PIL.Image.Image.tobytes, PIL.Image.frombytes
    copy, convert, render, scandir = PIL.Image.Image.copy, PIL.Image.Image.convert, ChatTemplate.render, os.scandir

    class Hash:
        def __init__(self, data: Any = b"", **options: Any) -> None:
            self._hash = sha256(**options)
            self.update(data)

        def update(self, data: Any) -> None:
            counts["hashed"] += N_BYTES <= len(data) < N_BYTES + 100
            self._hash.update(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._hash, name)

    def counted(what: str, function: Callable[..., Any], of_a_page: Callable[..., bool]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            counts[what] += of_a_page(*arguments)
            return function(*arguments, **options)

        return wrapper

    def is_page(image: PIL.Image.Image, *rest: Any) -> bool:
        return image.size == SIZE

    monkeypatch.setattr(hashlib, "sha256", Hash)
    for name, function in (("tobytes", tobytes), ("copy", copy), ("convert", convert)):
        monkeypatch.setattr(PIL.Image.Image, name, counted("copied", function, is_page))
    monkeypatch.setattr(PIL.Image, "frombytes", counted("opened", frombytes, lambda mode, size, *rest: size == SIZE))
    monkeypatch.setattr(ChatTemplate, "render", counted("rendered", render, lambda *rest: True))
    monkeypatch.setattr(os, "scandir", counted("listed", scandir, lambda *rest: True))
    return counts


def test_a_page_is_opened_and_hashed_once_and_each_question_written_once(
    model: granite4v.Model, scans: Path, done: Counter[str]
) -> None:
    with extract(scans, TASKS, model=model, max_tokens=3) as run:
        done["rendered"] = 0  # not counted: finding out which tasks the template knows
        assert [record.error for record in run] == [None] * 6
    assert dict(done) == {"opened": 2, "hashed": 2, "copied": 0, "rendered": 6, "listed": 1}


def test_without_a_limit_the_room_is_found_by_the_prompt_that_is_answered(
    model: granite4v.Model, scans: Path, done: Counter[str]
) -> None:
    with extract(scans / "0.png", TASKS, model=model, unconstrained=True) as run:
        done["rendered"] = 0
        assert [record.error for record in run] == [None] * 3
    assert (done["opened"], done["hashed"], done["copied"], done["rendered"]) == (1, 1, 0, 3)


def test_a_prepared_prompt_holds_its_images(model: granite4v.Model) -> None:
    image = granite4v.load_image(noise_picture(SIZE))
    prompt = model.prepare("<tables_html>", image)
    assert model.prepare(prompt) is prompt and prompt.images[0].images == (image,)
    given = model.generate(prompt, max_tokens=3)
    assert given.tokens == model.generate("<tables_html>", image, max_tokens=3).tokens
    for wrong in ({"images": [image]}, {"template_variables": {"a": 1}}):
        with pytest.raises(granite4v.PromptError, match="a prepared prompt already contains its images and variables"):
            model.prepare(prompt, **wrong)
