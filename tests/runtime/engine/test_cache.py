"""Tests of the caches between requests: answers are bit-identical, and never those of another image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import granite4v
from granite4v.clip_projector import VisionEncoder
from granite4v.errors import DeviceError
from granite4v.runtime.llama.context import BatchRows, LlamaContext
from tests.helpers.pictures import noise_picture
from tests.toy.spec import PRESETS

ONE, TWO = noise_picture((150, 100), 1), noise_picture((150, 100), 2)
TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "An answer of some words."},
    {"role": "user", "content": "And why?"},
]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", exact=False, n_threads=2) as model:
        yield model


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the images that were actually encoded."""
    sizes: list[tuple[int, int]] = []
    encode = VisionEncoder.encode

    def counted(self: VisionEncoder, images: Any, *rest: Any) -> Any:
        sizes.extend(view.images[0].size for view in images)
        return encode(self, images, *rest)

    monkeypatch.setattr(VisionEncoder, "encode", counted)
    return sizes


def fresh(model: granite4v.Model, prompt: Any, *pictures: Any, **options: Any) -> np.ndarray:
    model.clear_cache()
    return model.logits(prompt, list(pictures), **options)


def test_the_same_request_gives_the_same_bits(model: granite4v.Model, encoded: list[Any]) -> None:
    first = fresh(model, "What is this?", ONE)
    again = model.logits("What is this?", [ONE.copy()])
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(fresh(model, "What is this?", ONE), first)
    assert len(encoded) == 2  # the second of the three requests encodes nothing


def test_another_question_about_the_picture_gives_the_same_bits(model: granite4v.Model, encoded: list[Any]) -> None:
    alone = fresh(model, "How many?", ONE)
    fresh(model, "What is this?", ONE)
    np.testing.assert_array_equal(model.logits("How many?", [ONE]), alone)
    answer = model.generate("How many words?", [ONE], max_tokens=4)
    assert answer.timings.n_reused > answer.timings.n_image and answer.timings.encode_s == 0
    assert len(encoded) == 2


def test_another_picture_of_the_same_size_gives_its_own_answer(model: granite4v.Model) -> None:
    first, second = fresh(model, "What is this?", ONE), fresh(model, "What is this?", TWO)
    assert np.abs(first - second).max() > 0.1
    model.logits("What is this?", [ONE])
    np.testing.assert_array_equal(model.logits("What is this?", [TWO]), second)
    np.testing.assert_array_equal(model.logits("What is this?", [ONE]), first)


def test_order_of_pictures_matters(model: granite4v.Model) -> None:
    one_two, two_one = fresh(model, "Compare.", ONE, TWO), fresh(model, "Compare.", TWO, ONE)
    assert np.abs(one_two - two_one).max() > 0.1
    np.testing.assert_array_equal(model.logits("Compare.", [ONE, TWO]), one_two)


def test_a_conversation_goes_on_where_it_was(model: granite4v.Model, encoded: list[Any]) -> None:
    expected = fresh(model, TURNS, ONE)
    model.clear_cache()
    model.generate(TURNS[:1], [ONE], max_tokens=6)
    continued = model.generate(TURNS, [ONE], max_tokens=1)
    assert continued.timings.n_reused >= continued.timings.n_image
    np.testing.assert_array_equal(model.logits(TURNS, [ONE]), expected)
    assert len(encoded) == 2


def test_a_long_answer_is_not_read_again(model: granite4v.Model) -> None:
    """Here the logits agree only up to rounding, because the answer's tokens were computed one by one."""
    model.clear_cache()
    answer = model.generate(TURNS[:1], [ONE], max_tokens=200, ignore_eos=True)
    reply = {"role": "assistant", "content": answer.text}
    turns = [TURNS[0], reply, TURNS[2]]
    found = model.logits(turns, [ONE])
    expected = fresh(model, turns, ONE)
    np.testing.assert_allclose(found, expected, atol=0.2)
    assert found.argmax() == expected.argmax()


def test_the_cache_grows_with_the_requests(model: granite4v.Model) -> None:
    expected = fresh(model, "What is this?", ONE)
    with granite4v.load(model.files.text.path.parent, device="cpu", exact=False, n_threads=2) as other:
        np.testing.assert_array_equal(other.logits("What is this?", [ONE]), expected)
        assert other.settings["n_ctx"] == 512
        answer = other.generate("What is this?", [ONE], max_tokens=700, ignore_eos=True)
        assert other.settings["n_ctx"] == 1024 and len(answer.tokens) == 700
        assert answer.timings.n_reused == answer.timings.n_prompt  # the cached rows moved to the larger context
        longer = model.generate("What is this?", [ONE], max_tokens=700, ignore_eos=True)
        assert longer.tokens == answer.tokens


def test_two_answers_at_once_do_not_mix(model: granite4v.Model) -> None:
    model.clear_cache()
    alone = [model.generate("What is this?", [picture], max_tokens=12).text for picture in (ONE, TWO)]
    streams = [model.stream("What is this?", [picture], max_tokens=12) for picture in (ONE, TWO)]
    found = ["", ""]
    for _ in range(13):
        for i, stream in enumerate(streams):
            found[i] += next(stream, "")
    assert found == alone
    assert [stream.answer.finish_reason for stream in streams] == ["length", "length"]


def test_features_of_the_last_pictures_are_kept(
    make_model: Callable[..., Path], encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("granite4v.runtime.engine.vision.FEATURE_CACHE_BYTES", 1)
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", n_parallel=1) as model:
        model.logits("a", [ONE, TWO])
        assert len(encoded) == 2
        model.logits("b", [TWO])
        assert len(encoded) == 2
        model.logits("b", [ONE])
        assert len(encoded) == 3


def test_a_failed_request_leaves_a_sound_cache(model: granite4v.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failed batch may have been computed, although the cache has no record of it."""
    expected = fresh(model, "What is this?", ONE)
    model.clear_cache()
    decode = LlamaContext.decode
    calls = 0

    def failing(self: LlamaContext, rows: BatchRows, *, is_prompt: bool) -> None:
        nonlocal calls
        decode(self, rows, is_prompt=is_prompt)
        calls += 1
        if calls == 2:
            raise DeviceError("no such luck")

    monkeypatch.setattr(LlamaContext, "decode", failing)
    with pytest.raises(DeviceError, match="no such luck"):
        model.logits("What is this?", [ONE])
    monkeypatch.undo()
    np.testing.assert_array_equal(model.logits("What is this?", [ONE]), expected)
