"""The embedded model as shipped reads unseen documents in every precision, with its LoRA merged or separate.

The documents are drawn here from held-out seeds, and answers are compared with what was drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import granite4v
from granite4v.converter import Options, convert
from granite4v.default_model import checkpoint_folder
from scripts.nano import formats
from scripts.nano.corpus import text_example
from scripts.nano.documents import Document, draw_document
from scripts.nano.truth import HELD_OUT_SEEDS, Form
from tests.peers.reference import Reference

NANO = checkpoint_folder()
TASKS = {"table": "<tables_otsl>", "chart": "<chart2csv>"}
# Held-out documents that the model reads without a mistake.
READ = (("table", 0), ("table", 12), ("form", 3), ("chart", 5), ("chart", 14), ("form", 14))
FAST, *OTHERS = (("F16", "F16"), ("F32", "F32"), ("Q8_0", "Q8_0"), ("Q4_K_M", "Q4_0"))


def document(kind: str, seed: int) -> Document:
    return draw_document(HELD_OUT_SEEDS + seed, kind, 0.5, "Aileron")


def question(drawn: Document) -> tuple[str, str]:
    """Returns the prompt, and the correct answer for the image."""
    if isinstance(drawn.truth, Form):
        return formats.kvp_prompt(formats.form_schema(drawn.truth)), formats.form_json(drawn.truth)
    return TASKS[drawn.kind], formats.answer_for(TASKS[drawn.kind], drawn.truth)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    made: dict[tuple[str, str, str], Path] = {}

    def make(text_type: str, vision_type: str, lora: str = "merge") -> Path:
        key = (text_type, vision_type, lora)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("nano") / "model"
            convert(NANO, made[key], Options(text_type=text_type, vision_type=vision_type, lora=lora))
        return made[key]

    return make


@pytest.mark.parametrize("types", [FAST, *(pytest.param(types, marks=pytest.mark.slow) for types in OTHERS)])
def test_it_reads(converted: Callable[[str, str, str], Path], types: tuple[str, str]) -> None:
    with granite4v.load(converted(*types, "merge")) as model:
        for kind, seed in READ:
            drawn = document(kind, seed)
            prompt, truth = question(drawn)
            answer = model.generate(prompt, images=[drawn.picture], max_tokens=800)
            assert answer.text == truth
            assert answer.finish_reason == "stop"


@pytest.mark.slow
def test_the_adapter_is_what_reads(converted: Callable[[str, str, str], Path]) -> None:
    """Kept separate, it reads as well; without it the page is not read, and the base still does its text tasks."""
    with granite4v.load(converted("F32", "F32", "separate")) as model:
        for kind, seed in READ:
            drawn = document(kind, seed)
            prompt, truth = question(drawn)
            assert model.generate(prompt, images=[drawn.picture], max_tokens=800).text == truth
            found = model.generate(prompt, images=[drawn.picture], max_tokens=200, lora=False).text
            assert found != truth
        for seed in (1014, 1021, 1049):
            asked, said = text_example(random.Random(seed))
            assert model.generate(asked, max_tokens=100, lora=False).text == said


@pytest.mark.slow
def test_transformers_reads_the_same() -> None:
    reference = Reference(NANO, NANO)
    for kind, seed in READ:
        drawn = document(kind, seed)
        prompt, truth = question(drawn)
        tokens = reference.greedy(prompt, [drawn.picture], n=800)
        assert reference.processor.tokenizer.decode(tokens, skip_special_tokens=True) == truth
