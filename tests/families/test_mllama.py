"""Llama 3.2 Vision end to end, whatever came before: the decoder attends to images as transformers' does, numerically.

Two float32 computations with random weights differ by the order of sums: observed 2e-5 for logits up to 18.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from granite4v.converter import Options, convert
from granite4v.errors import ModelFileError, PromptError
from granite4v.runtime.engine.page_store import PageStore
from granite4v.runtime.engine.stream import Channel
from granite4v.runtime.model import Model
from granite4v.runtime.prompt.spans import Prompt
from tests.helpers.gguf_edit import tensor_bytes
from tests.helpers.mllama_cases import CASES, IMAGE, PICTURES, ids_of, pictures_of, text, user
from tests.peers.mllama import MllamaReference
from tests.toy.checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter

SPEC, FIRST, WIDE = PRESETS["tiny-mllama"], PRESETS["tiny-mllama-first"], PRESETS["tiny-mllama-wide"]
TOLERANCE = 1e-4


def prepared(model: Model, case: str) -> Prompt:
    return model.prepare(CASES[case], pictures_of(CASES[case]))


@pytest.fixture(scope="module")
def references(make_checkpoint: Callable[..., Path]) -> Callable[[CheckpointSpec, str], MllamaReference]:
    made: dict[tuple[CheckpointSpec, str], MllamaReference] = {}

    def get(spec: CheckpointSpec, rule: str) -> MllamaReference:
        if (spec, rule) not in made:
            made[spec, rule] = MllamaReference(make_checkpoint(spec), rule)
        return made[spec, rule]

    return get


@pytest.fixture
def model(make_model: Callable[..., Path]) -> Iterator[Model]:
    with Model.load(make_model(SPEC), n_threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("rule", ["original", "transformers"])
@pytest.mark.parametrize("spec", [SPEC, FIRST], ids=["in a row and last", "first"])
def test_answers_are_transformers(
    spec: CheckpointSpec,
    rule: Any,
    make_model: Callable[..., Path],
    references: Callable[[CheckpointSpec, str], MllamaReference],
) -> None:
    reference = references(spec, rule)
    with Model.load(make_model(spec), n_threads=1) as model:
        model.engine.follow(rule)
        for case, messages in CASES.items():
            prompt, pictures = prepared(model, case), pictures_of(messages)
            ids = ids_of(prompt, reference.image_token)
            assert prompt.n_tokens == len(ids) and prompt.n_image_tokens == len(pictures)
            n = 4 if case == "in chunks" else 32
            answer, expected = reference.greedy(ids, pictures, n)
            found = model.score(prompt, tokens=answer)[:n]
            assert np.abs(found - expected).max() <= TOLERANCE, case
            assert found.argmax(-1).tolist() == answer, case


def test_the_two_rules_differ(references: Callable[..., MllamaReference]) -> None:
    """Otherwise the comparison above would not distinguish them."""
    ids = [1, 10, 405, 20, 21]
    found = [references(SPEC, rule).logits(ids, PICTURES[:1]) for rule in ("original", "transformers")]
    assert np.abs(found[0] - found[1])[[0, -1]].max(-1).min() > 0.1
    assert np.abs(found[0][:2] - references(SPEC, "original").logits(ids[:2])).max() < TOLERANCE


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
        for case in ("one", "text", "one", "two", "adjacent", "one", "two turns", "in chunks", "two", "text", "one"):
            assert np.array_equal(model.logits(prepared(model, case)), fresh[case]), case


def test_a_conversation_that_goes_on_reuses_what_is_there(model: Model, make_model: Callable[..., Path]) -> None:
    first = model.generate(CASES["one"], PICTURES[:1], max_tokens=5, drafting=False)
    messages = [*CASES["one"], {"role": "assistant", "content": [text(first.text)]}, user(text("And now? " * 40))]
    second = model.generate(messages, PICTURES[:1], max_tokens=5)
    assert second.timings.n_reused > 5 and second.timings.n_encoded == 0
    with Model.load(make_model(SPEC), n_threads=1) as other:
        again = other.generate(messages, PICTURES[:1], max_tokens=5)
    assert (again.text, again.timings.n_reused) == (second.text, 0)


def test_a_context_that_grows_keeps_the_image(model: Model, make_model: Callable[..., Path]) -> None:
    short = [user(IMAGE, text("Read. " * 30))]
    model.generate(short, PICTURES[:1], max_tokens=2)
    before = model.settings["n_ctx"]
    longer = [*short, {"role": "assistant", "content": [text("Yes.")]}, user(text("Go on. " * 150))]
    prompt = model.prepare(longer, PICTURES[:1])
    found = model.generate(prompt, max_tokens=400, ignore_eos=True)
    assert model.settings["n_ctx"] > before and found.timings.n_reused > 20
    with Model.load(make_model(SPEC), n_threads=1) as other:
        assert other.generate(prompt, max_tokens=400, ignore_eos=True).text == found.text


@pytest.mark.parametrize("stage", ["encode", "prefill"])
def test_a_cancelled_request_leaves_nothing_behind(
    stage: str, model: Model, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model.load(make_model(SPEC), n_threads=1) as other:
        expected = other.logits(prepared(other, "in chunks"))
    report = Channel.report

    def report_and_cancel(channel: Channel, now: str, done: int, total: int) -> None:
        report(channel, now, done, total)
        if now == stage and done:
            channel.cancel()

    with monkeypatch.context() as patch:  # a reader of progress may see a short stage too late, or not at all
        patch.setattr(Channel, "report", report_and_cancel)
        stream = model.stream(CASES["in chunks"], PICTURES[:1], max_tokens=1500, ignore_eos=True)
        assert stream.result().finish_reason == "cancelled"
    assert stream.answer.timings.n_encoded == 1 and stream.answer.timings.n_generated == 0
    assert np.array_equal(model.logits(prepared(model, "in chunks")), expected)


def test_an_answer_cancelled_between_tokens_leaves_nothing_behind(
    model: Model, make_model: Callable[..., Path]
) -> None:
    with Model.load(make_model(SPEC), n_threads=1) as other:
        expected = [other.logits(prepared(other, case)) for case in ("two", "one")]
    stream = model.stream(CASES["one"], PICTURES[:1], max_tokens=500, ignore_eos=True)
    next(iter(stream))
    stream.cancel()
    assert stream.result().finish_reason == "cancelled"
    found = [model.logits(prepared(model, case)) for case in ("two", "one")]
    assert np.array_equal(found, expected)


def test_drafts_change_no_answer(model: Model) -> None:
    plain = model.generate(CASES["one"], PICTURES[:1], max_tokens=60, ignore_eos=True, drafting=False)
    drafted = model.generate(CASES["one"], PICTURES[:1], max_tokens=60, ignore_eos=True, drafting=True)
    assert drafted.text == plain.text and drafted.timings.n_drafted > 0


def test_texts_alone_are_those_of_the_text_file(model: Model, make_model: Callable[..., Path], tmp_path: Path) -> None:
    alone = tmp_path / "text.gguf"
    alone.write_bytes((make_model(SPEC) / "text-F32.gguf").read_bytes())
    with Model.load(alone, n_threads=1) as other:
        expected = other.logits("What is this?")
    assert np.array_equal(model.logits("What is this?"), expected)
    model.logits(prepared(model, "one"))
    assert np.array_equal(model.logits("What is this?"), expected)


# Relative difference from float32 files, with the text in a type and the tower in Q8_0: 0.03 in Q8_0, 0.2 to 0.4 in
# four bits.
@pytest.mark.parametrize(("text_type", "most"), [("Q8_0", 0.08), ("Q4_0", 0.6), ("Q4_K_M", 0.6)])
def test_quantized_files(text_type: str, most: float, make_model: Callable[..., Path]) -> None:
    logits = []
    for kinds in (("F32", "F32"), (text_type, "Q8_0")):
        with Model.load(make_model(WIDE, *kinds), n_threads=1, exact=True) as model:
            logits.append(model.logits(prepared(model, "two")))
            assert model.generate(CASES["one"], PICTURES[:1], max_tokens=3).timings.n_generated > 0
    assert 1e-4 < np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0]) < most


def test_one_sequence_at_a_time(make_model: Callable[..., Path]) -> None:
    with Model.load(make_model(SPEC), n_threads=1, n_parallel=4) as model:
        assert model.n_parallel == 1 and "one sequence at a time" in str(model.parallel_note)
        alone = [model.generate(CASES[case], pictures_of(CASES[case]), max_tokens=8).text for case in CASES]
        streams = [model.stream(CASES[case], pictures_of(CASES[case]), max_tokens=8) for case in CASES]
        assert [stream.result().text for stream in streams] == alone


def test_stored_pages_need_no_encoder(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """For the same conversation, and for another question about its image, whose cells are not stored."""
    found = []
    for case in ("two turns", "two turns", "one"):
        with Model.load(make_model(SPEC), n_threads=1, page_store=PageStore(tmp_path / "store")) as model:
            found.append(model.generate(CASES[case], pictures_of(CASES[case]), max_tokens=8))
    with Model.load(make_model(SPEC), n_threads=1) as model:
        expected = [
            model.generate(CASES[case], pictures_of(CASES[case]), max_tokens=8) for case in ("two turns", "one")
        ]
    assert [answer.text for answer in found] == [expected[0].text, expected[0].text, expected[1].text]
    assert [answer.timings.n_encoded for answer in found] == [2, 0, 0]
    assert found[0].timings.n_stored == 0 and found[1].timings.n_stored > 10


def test_stored_images_of_other_files_are_not_used(make_model: Callable[..., Path], tmp_path: Path) -> None:
    store = PageStore(tmp_path / "store")
    n_encoded = []
    for folder in (make_model(WIDE, "Q8_0", "Q8_0"), make_model(WIDE, "Q4_0", "F16")):
        with Model.load(folder, n_threads=1, page_store=store) as model:
            n_encoded.append(model.generate(CASES["one"], PICTURES[:1], max_tokens=2).timings.n_encoded)
    assert n_encoded == [1, 1]


def test_a_cleared_model_encodes_again(model: Model) -> None:
    found = []
    for _ in range(2):
        found += [model.generate(CASES["one"], PICTURES[:1], max_tokens=4) for _ in range(2)]
        model.clear_cache()
    assert [answer.timings.n_encoded for answer in found] == [1, 0, 1, 0]
    assert len({answer.text for answer in found}) == 1


def test_an_image_token_in_a_text_is_refused(model: Model) -> None:
    for ask in (
        lambda: model.generate("What is <|image|> this?", max_tokens=1),
        lambda: model.prompts.plain("What is <|image|> this?"),
    ):
        with pytest.raises(PromptError, match="placeholder|image token"):
            ask()


def test_a_separate_adapter_of_the_decoders_own_layers(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Applied to images and disabled for texts, it answers like the merged adapter and like no adapter."""
    adapter = write_adapter(tmp_path / "adapter", SPEC, AdapterSpec())
    file = adapter / "adapter_model.safetensors"
    own = {
        name: tensor
        for name, tensor in load_file(file).items()
        if not any(f".layers.{i}." in name for i in SPEC.cross_layers)
    }
    save_file(own, file)
    checkpoint = make_checkpoint(SPEC)
    found: dict[str, list[np.ndarray]] = {}
    for name, options in (
        ("none", Options("F32", "F32")),
        ("merge", Options("F32", "F32", "merge", str(adapter))),
        ("separate", Options("F32", "F32", "separate", str(adapter))),
    ):
        convert(checkpoint, tmp_path / name, options)
        with Model.load(tmp_path / name, n_threads=1, exact=True) as model:
            found[name] = [model.logits(prepared(model, case)) for case in ("one", "text", "one", "two turns")]
    assert np.abs(np.array(found["merge"]) - found["none"]).max(-1).min() > 0.1
    for case, merged in enumerate(found["merge"]):
        expected = found["none"][1] if case == 1 else merged
        assert np.abs(found["separate"][case] - expected).max() <= TOLERANCE, case


def damaged(folder: Path, target: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    """Copies a model and changes one tensor of its vision file."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    path = target / "mmproj-F32.gguf"
    old = tensor_bytes(path)[name][1]
    values = np.frombuffer(old, np.float32).copy()
    change(values)
    whole = path.read_bytes()
    assert whole.count(bytes(old)) == 1
    path.write_bytes(whole.replace(bytes(old), values.tobytes()))
    return target


def test_damaged_layers_end_a_request_and_nothing_else(make_model: Callable[..., Path], tmp_path: Path) -> None:
    def spoil(values: np.ndarray) -> None:
        values[:] = np.nan

    folder = damaged(make_model(SPEC), tmp_path / "damaged", "xattn.blk.4.ffn_up.weight", spoil)
    with Model.load(folder, n_threads=1) as model:
        with pytest.raises(ModelFileError, match="damaged"):
            model.logits(prepared(model, "one"))
        assert np.isfinite(model.logits(prepared(model, "text"))).all()


def test_what_is_raised_between_layers_ends_the_request(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.logits(prepared(model, "one"))

    def fail(*_: Any, **__: Any) -> Any:
        raise ModelFileError("between the layers")

    with monkeypatch.context() as patch:
        patch.setattr("granite4v.runtime.engine.cross_layers.CrossLayers.run", fail)
        with pytest.raises(ModelFileError, match="between the layers"):
            model.logits(prepared(model, "two"))
    assert np.array_equal(model.logits(prepared(model, "one")), expected)
