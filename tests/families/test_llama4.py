"""Llama 4 end to end: images of one tile and of several and the tokens around them, compared numerically with
transformers.

Two float32 computations with random weights differ by the order of sums: observed 2e-5 for logits up to 10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL.Image import Image

from granite4v.clip_projector.encoder import ImageFeatures
from granite4v.errors import PromptError
from granite4v.ggml.gguf_file import GgufFile
from granite4v.runtime.engine.page_store import PageStore
from granite4v.runtime.engine.task import plan_prefill
from granite4v.runtime.llama.token_rows import token_rows
from granite4v.runtime.model import Model
from granite4v.runtime.prompt.spans import ImageSpan, Prompt, TextSpan
from tests.helpers.pictures import noise_picture
from tests.peers.llama import LlamaPeer
from tests.peers.llama4 import Llama4Reference
from tests.toy.checkpoint import PRESETS, CheckpointSpec

SPEC, SCOUT, MAVERICK = (PRESETS[f"tiny-llama4{which}"] for which in ("", "-scout", "-maverick"))
WIDE = PRESETS["tiny-llama4-wide"]
TOLERANCE = 1e-4
ONE, HIGH, WIDE_PICTURE = noise_picture((50, 40)), noise_picture((100, 150)), noise_picture((300, 60))


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


IMAGE = {"type": "image"}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


ASKED = [user(IMAGE, text("What is this?"))]
BOTH = [user(IMAGE, text(" and "), IMAGE, text(" differ?"))]
CASES: dict[str, tuple[list[dict[str, Any]], list[Image]]] = {
    "one tile": (ASKED, [ONE]),
    "several tiles": (ASKED, [HIGH]),
    "one row": ([user(text("Look at "), IMAGE, text(" and tell."))], [WIDE_PICTURE]),
    "two": (BOTH, [HIGH, ONE]),
    "the same twice": ([user(IMAGE, IMAGE, text("Which?"))], [HIGH, HIGH]),
    "two turns": (
        [user(IMAGE, text("One?")), {"role": "assistant", "content": [text("Yes.")]}, user(IMAGE, text("Two?"))],
        [WIDE_PICTURE, HIGH],
    ),
    "text": ([user(text("What is this?"))], []),
}


def prepared(model: Model, case: str) -> Prompt:
    return model.prepare(*CASES[case])


def ids_of(prompt: Prompt, patch: int) -> list[int]:
    """Returns a token id for every position, `patch` for each embedding."""
    ids: list[int] = []
    for span in prompt.spans:
        if isinstance(span, ImageSpan):
            between = dict(span.between)
            ids += [between.get(i, patch) for i in range(span.n_tokens)]
        else:
            ids += span.tokens
    return ids


@pytest.fixture(scope="module")
def references(make_checkpoint: Callable[..., Path]) -> Callable[[CheckpointSpec], Llama4Reference]:
    made: dict[CheckpointSpec, Llama4Reference] = {}

    def get(spec: CheckpointSpec) -> Llama4Reference:
        if spec not in made:
            made[spec] = Llama4Reference(make_checkpoint(spec))
        return made[spec]

    return get


@pytest.fixture
def model(make_model: Callable[..., Path]) -> Iterator[Model]:
    with Model.load(make_model(SPEC), n_threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("picture", [ONE, HIGH, WIDE_PICTURE], ids=["one tile", "several", "one row"])
def test_embeddings_are_transformers(picture: Image, model: Model, references: Callable[..., Llama4Reference]) -> None:
    expected = references(SPEC).embeddings(picture)
    found = model.encode_image(picture)
    assert isinstance(found, ImageFeatures) and found.rows.shape == (len(expected), 1, expected.shape[1])
    assert np.linalg.norm(found.rows[:, 0] - expected) / np.linalg.norm(expected) < 2e-5


@pytest.mark.parametrize(
    "spec", [SPEC, SCOUT, MAVERICK], ids=["dense and experts", "two experts of four", "128 experts"]
)
def test_answers_are_transformers(
    spec: CheckpointSpec, make_model: Callable[..., Path], references: Callable[..., Llama4Reference]
) -> None:
    reference = references(spec)
    with Model.load(make_model(spec), n_threads=1) as model:
        for case, (_, pictures) in CASES.items():
            prompt = prepared(model, case)
            ids = reference.ids(prompt.text, pictures)
            assert ids_of(prompt, reference.patch) == ids, case
            assert (prompt.n_tokens, prompt.n_image_tokens) == (len(ids), ids.count(reference.patch))
            answer, expected = reference.greedy(ids, pictures, 32)
            found = model.score(prompt, tokens=answer)[:32]
            assert np.abs(found - expected).max() <= TOLERANCE, case
            assert found.argmax(-1).tolist() == answer, case
            generated = model.generate(prompt, max_tokens=32, ignore_eos=True, drafting=False)
            assert list(generated.tokens) == answer, case


def test_an_image_is_one_span_with_its_separators(model: Model) -> None:
    """Tokens before the first tile and after the last are text; several tiles are one batch."""
    prompt = prepared(model, "two")
    images = [span for span in prompt.spans if isinstance(span, ImageSpan)]
    assert [(span.index, span.n_tokens, span.n_embeddings) for span in images] == [(0, 35, 28), (1, 4, 4)]
    assert [place for place, _ in images[0].between] == [*range(4, 30, 5), 30]
    assert [isinstance(span, TextSpan) for span in prompt.spans] == [True, False] * 2 + [True]
    assert len(plan_prefill(prompt.spans, 512)) == 5


@pytest.mark.parametrize("text_type", ["F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q4_0", "IQ4_NL"])
def test_rows_of_tokens_are_those_that_llama_cpp_looks_up(text_type: str, make_model: Callable[..., Path]) -> None:
    """Logits have the same bits whether tokens are decoded or their embedding rows."""
    path = make_model(WIDE, text_type) / f"text-{text_type}.gguf"
    tokens = [5, 300, 17, 399, 0]
    with GgufFile.open(path) as file, LlamaPeer(path) as peer:
        rows = token_rows(file, tokens)
        assert rows.dtype == np.float32
        assert np.array_equal(peer.logits(rows), peer.logits(tokens))


@pytest.mark.parametrize("exact", [True, False])
def test_conversations_one_after_another_are_those_of_a_fresh_process(
    exact: bool, make_model: Callable[..., Path]
) -> None:
    """Prefixes are reused, images change, texts come in between: the bits are the same."""
    fresh: dict[str, np.ndarray] = {}
    for case in CASES:
        with Model.load(make_model(SPEC), n_threads=1, exact=exact) as model:
            fresh[case] = model.logits(prepared(model, case))
    with Model.load(make_model(SPEC), n_threads=1, exact=exact) as model:
        for case in ("one tile", "text", "several tiles", "two", "the same twice", "several tiles", "two turns", "two"):
            assert np.array_equal(model.logits(prepared(model, case)), fresh[case]), case


def test_a_conversation_that_goes_on_reuses_what_is_there(model: Model, make_model: Callable[..., Path]) -> None:
    first = model.generate(ASKED, [HIGH], max_tokens=5, drafting=False)
    messages = [*ASKED, {"role": "assistant", "content": [text(first.text)]}, user(text("And now? " * 40))]
    second = model.generate(messages, [HIGH], max_tokens=5)
    assert second.timings.n_reused > 28 and (first.timings.n_encoded, second.timings.n_encoded) == (1, 0)
    with Model.load(make_model(SPEC), n_threads=1) as other:
        again = other.generate(messages, [HIGH], max_tokens=5)
    assert (again.text, again.timings.n_reused) == (second.text, 0)


def test_requests_at_once_are_answered_as_alone(make_model: Callable[..., Path]) -> None:
    with Model.load(make_model(SPEC), n_threads=1, exact=True) as model:
        alone = [model.generate(*CASES[case], max_tokens=8).text for case in CASES]
        model.clear_cache()
        streams = [model.stream(*CASES[case], max_tokens=8) for case in CASES]
        assert [stream.result().text for stream in streams] == alone


def test_stored_pages_need_no_encoder(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """The stored part ends after the last tile of an image, not after each tile: two images are two entries."""
    found = []
    for _ in range(2):
        with Model.load(make_model(SPEC), n_threads=1, page_store=PageStore(tmp_path / "store")) as model:
            prompt = prepared(model, "two")
            found.append(model.generate(prompt, max_tokens=8))
    assert found[1].text == found[0].text
    assert [answer.timings.n_encoded for answer in found] == [2, 0]
    assert isinstance(prompt.spans[-2], ImageSpan)
    assert found[1].timings.n_stored == prompt.n_tokens - prompt.spans[-1].n_tokens
    stored = [entry.description for entry in PageStore(tmp_path / "store").entries()]
    assert sorted(entry.n_images for entry in stored if entry is not None) == [1, 2]


# Relative difference from float32 files, with the text in a type and the tower in Q8_0.
@pytest.mark.parametrize(("text_type", "most"), [("Q8_0", 0.1), ("Q4_0", 0.8), ("Q4_K_M", 0.8)])
def test_quantized_files(text_type: str, most: float, make_model: Callable[..., Path]) -> None:
    logits = []
    for kinds in (("F32", "F32"), (text_type, "Q8_0")):
        with Model.load(make_model(WIDE, *kinds), n_threads=1, exact=True) as model:
            logits.append(model.logits(prepared(model, "two")))
            assert model.generate(*CASES["several tiles"], max_tokens=3).timings.n_generated > 0
    assert 1e-4 < np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0]) < most


def test_an_image_token_in_a_text_is_refused(model: Model) -> None:
    with pytest.raises(PromptError, match="placeholder"):
        model.generate("What is <|image|> this?", max_tokens=1)
