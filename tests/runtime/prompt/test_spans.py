"""Tests of prompts as spans: ids are the reference's, each image is one span, and mismatches are refused before
anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import granite4v
from granite4v.errors import ContextOverflowError, ModelFileError, PromptError
from granite4v.runtime.prompt.spans import ImageSpan, Prompt, TextSpan, check_fits
from tests.helpers.pictures import noise_picture, text_picture
from tests.toy.spec import PRESETS

if TYPE_CHECKING:
    from tests.peers.reference import Reference

IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


LATER = [
    {"role": "user", "content": [text("Hi")]},
    {"role": "assistant", "content": [text("Yes?")]},
    {"role": "user", "content": [text("And"), IMAGE, text("this?"), IMAGE]},
]
PROMPTS: dict[str, tuple[Any, int]] = {
    "text only": ("Total: 1234567.89?", 0),
    "a picture": ("What is this?", 1),
    "a task": ("<tables_json>", 1),
    "two pictures": ("Compare.", 2),
    "pictures in a later turn": (LATER, 2),
}
PICTURES = [noise_picture((150, 100), 1), text_picture((70, 200), 2)]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu") as model:
        yield model


def flat_ids(prompt: Prompt, placeholder: int) -> list[int]:
    ids: list[int] = []
    for span in prompt.spans:
        ids += span.tokens if isinstance(span, TextSpan) else [placeholder] * span.n_tokens
    return ids


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_are_the_references(model: granite4v.Model, load_reference: Callable[..., Reference], name: str) -> None:
    prompt, n = PROMPTS[name]
    reference = load_reference(PRESETS["tiny"])
    prepared = model.prepare(prompt, PICTURES[:n])
    placeholder = reference.processor.image_token_id
    assert prepared.text == reference.prompt_text(prompt, n)
    assert flat_ids(prepared, placeholder) == reference.prompt_ids(prompt, PICTURES[:n])
    spans = [span for span in prepared.spans if isinstance(span, ImageSpan)]
    assert [span.n_tokens for span in spans] == [reference.n_tokens(picture) for picture in PICTURES[:n]]
    assert prepared.n_tokens == len(flat_ids(prepared, placeholder))


def test_a_single_picture_needs_no_list(model: granite4v.Model) -> None:
    assert model.prepare("x", PICTURES[0]).spans == model.prepare("x", PICTURES[:1]).spans


def test_two_pictures_with_a_tag_are_refused(model: granite4v.Model) -> None:
    with pytest.raises(PromptError, match="2 images and the task tag '<tables_json>'.* one image at a time"):
        model.prepare("<tables_json>", PICTURES)


def test_more_placeholders_than_pictures_written_in_the_text_are_refused(model: granite4v.Model) -> None:
    with pytest.raises(PromptError, match=r"3 image placeholders for 1 image;"):
        model.prepare("Compare <image> with <image>.", PICTURES[:1])


def test_a_picture_that_the_template_skips_is_refused(model: granite4v.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from granite4v.runtime.prompt.template import ChatTemplate

    template = ChatTemplate("{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}")
    monkeypatch.setattr(model.prompts, "template", lambda: template)
    with pytest.raises(PromptError, match=r"leaves 0 image placeholders for 1 image;"):
        model.prepare("x", PICTURES[:1])


def test_more_pictures_than_parts_is_refused(model: granite4v.Model) -> None:
    with pytest.raises(PromptError, match="have 2 image parts without an image of their own, but"):
        model.prepare(LATER, [*PICTURES, PICTURES[0]])


def test_a_vocabulary_without_a_placeholder_is_an_error(
    model: granite4v.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.prompts, "placeholder", None)
    with pytest.raises(ModelFileError, match="no image placeholder"):
        model.prepare("x", PICTURES[:1])


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    prompt = Prompt("", (TextSpan((1,) * 30), ImageSpan(0, 100, b"a"), TextSpan((2,) * 20)), (PICTURES[0],))
    check_fits(prompt, 50, 200)
    with pytest.raises(ContextOverflowError) as caught:
        check_fits(prompt, 51, 200)
    assert "needs 201 tokens (100 for 1 image, 50 of text, 51 for the answer)" in str(caught.value)
    assert "the context size is 200; raise the context (--ctx-size, n_ctx) to 201" in str(caught.value)


@pytest.mark.parametrize("letter", ["a", "word ", "\N{CJK UNIFIED IDEOGRAPH-6F22}", "\n"])
def test_a_text_that_must_overflow_is_refused_before_it_is_split(
    model: granite4v.Model, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    monkeypatch.setattr(model.prompts.tokenizer(), "encode", lambda text: pytest.fail("it was split"))
    with pytest.raises(
        ContextOverflowError, match=r"20,000,\d\d\d characters, at least [\d,]+ tokens, but the context"
    ):
        model.generate(letter * (20_000_000 // len(letter)) + "!" * 100)


def test_messages_that_must_overflow_are_refused_before_they_are_rendered(
    model: granite4v.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.prompts.template(), "render", lambda *_, **__: pytest.fail("they were rendered"))
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")] * model.n_ctx
    with pytest.raises(ContextOverflowError, match=rf"has {2 * model.n_ctx:,} messages, each of a token or more"):
        model.generate(turns)


def test_overflow_is_refused_before_any_work(make_model: Callable[..., Path]) -> None:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", n_ctx=100) as small:
        with pytest.raises(ContextOverflowError, match="the context size is 100"):
            small.logits("x", PICTURES)
        assert not small.engine.vision_is_open and not small.engine.text_is_open
