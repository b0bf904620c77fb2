"""Tests of cancelled requests: before they begin, between tokens, and inside a long computation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import granite4v
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS

TINY = PRESETS["tiny"]
PICTURE = text_picture((150, 100))


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(TINY), device="cpu", exact=True) as model:
        yield model


def test_cancelled_before_it_begins(model: granite4v.Model) -> None:
    model.clear_cache()
    answer = model.generate("Hello", [PICTURE], cancel=lambda: True)
    assert (answer.finish_reason, answer.tokens) == ("cancelled", [])


@pytest.mark.parametrize("pictures", [[], [PICTURE]])
def test_cancelled_between_tokens(model: granite4v.Model, pictures: list[Any]) -> None:
    stop = threading.Event()
    stream = model.stream("Hello", pictures, max_tokens=300, cancel=stop.is_set)
    assert next(stream)
    stop.set()
    assert not "".join(stream)
    assert stream.answer.finish_reason == "cancelled" and 0 < len(stream.answer.tokens) < 300


def test_cancelled_inside_a_long_computation(model: granite4v.Model) -> None:
    """A prompt of thousands of tokens is aborted between two graph nodes, not at its end."""
    prompt = "word " * 2000
    started = threading.Event()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            started.set()

    model.clear_cache()
    before = model.counters
    answer = model.generate(prompt, cancel=started.is_set, progress=progress)
    assert answer.finish_reason == "cancelled" and not answer.tokens
    assert model.counters.n_prefilled - before.n_prefilled < answer.timings.n_prompt
    assert np.isfinite(model.logits("Hello")).all()


def test_closing_a_stream_ends_the_answer(model: granite4v.Model) -> None:
    stream = model.stream("Hello", max_tokens=300)
    first = next(stream)
    stream.close()
    assert stream.answer.text.startswith(first) and stream.answer.finish_reason == "cancelled"
    assert list(stream) == []
