"""The check of forced tokens passes, and explains where answers diverge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import granite4v
from granite4v.runtime.answer import Answer
from tests.acceptance import forced_tokens
from tests.acceptance.answering import ask_for
from tests.acceptance.conftest import Ran
from tests.acceptance.forced_tokens import explained
from tests.acceptance.pages import draw_page


@pytest.mark.slow
def test_it_says_what_it_saw(model: Path, run: Callable[..., Ran]) -> None:
    arguments = ("--pages", 2, "--max-tokens", 90, "--length", 4)
    status, told, err = run(forced_tokens.main, "--model", model, *arguments)
    assert (status, told["ok"], told["forms"]) == (0, True, 2)
    assert told["same_values"] + len(told["differences"]) == 2
    assert told["n_forced"]["with"] > 0 == told["n_forced"]["without"]
    assert told["n_steps"]["ratio"] == pytest.approx(told["n_steps"]["with"] / told["n_steps"]["without"], abs=1e-3)
    assert set(told["decode_s"]) == {"with", "without", "ratio"}
    assert "of 2 forms have the same values" in err


@pytest.fixture(scope="module")
def loaded(model: Path) -> Iterator[granite4v.Model]:
    with granite4v.load(model, n_threads=1) as loaded:
        yield loaded


def test_given_pictures_and_a_schema(model: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    draw_page(1, 0, "form").picture.save(tmp_path / "form.png")
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}}))
    arguments = (tmp_path / "form.png", "--schema", tmp_path / "schema.json")
    status, told, err = run(forced_tokens.main, "--model", model, *arguments)
    assert (status, told["forms"]) == (0, 1) and "form.png: " in err


def test_why_answers_part(loaded: granite4v.Model) -> None:
    picture = Image.new("RGB", (100, 80), "white")
    question = ask_for(
        loaded, "kvp", {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    )
    options: dict[str, Any] = {"max_tokens": 12, "constraint": question.constraint}
    forced = loaded.generate(question.prompt, [picture], **options)
    sampled = loaded.generate(question.prompt, [picture], fast_forward=False, **options)
    encode = loaded.prompts.tokenizer().encode_plain
    spelled = Answer(tokens=[*encode("{"), *encode('"')])
    assert explained(loaded, picture, question, forced, spelled)["why"] == "spelling"

    *before, last = sampled.tokens  # within the string
    logits = loaded.score(question.prompt, [picture], tokens=[*before, 0])[-1]
    worst = Answer(tokens=[*before, int(logits.argmin())])
    found = explained(loaded, picture, question, worst, sampled)
    assert found["why"] == "unexplained" and found["behind"] in sampled.text
    assert found["gap"] == pytest.approx(logits[last] - logits.min(), abs=1e-3)
