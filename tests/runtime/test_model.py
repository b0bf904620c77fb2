"""Tests of the public model: what it opens and when, foreign files, adapters, arguments, copies and forks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import granite4v
from granite4v.clip_projector import VisionEncoder
from granite4v.converter import Options, convert
from granite4v.errors import DeviceError, ImageError, ModelFileError, PromptError
from granite4v.ggml.cpu import FreeThreads, default_threads
from granite4v.runtime.options import GenerationFields, GenerationOptions
from tests.helpers.gguf_edit import copy_gguf
from tests.helpers.pictures import noise_picture, text_picture
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import write_adapter
from tests.toy.spec import MAPPING_CASES, PRESETS, AdapterSpec

if TYPE_CHECKING:
    from tests.peers.reference import Reference

TINY = PRESETS["tiny"]
PICTURE = text_picture((150, 100))
LOGITS = 1e-4  # relative L2, F32 files in exact mode; observed 1e-6
OURS = ("granite4v.", "tokenizer.huggingface")


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(TINY), device="cpu", exact=True) as model:
        yield model


# --- what is opened when ---


def test_a_text_only_request_does_not_open_the_vision_file(make_model: Callable[..., Path]) -> None:
    with granite4v.load(make_model(TINY), device="cpu") as model:
        assert model.generate("Hello", max_tokens=3).tokens
        assert not model.engine.vision_is_open


def test_a_request_with_a_picture_opens_the_text_file_after_encoding(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    text_was_open: list[bool] = []
    encode = VisionEncoder.encode
    with granite4v.load(make_model(TINY), device="cpu") as model:

        def watched(self: VisionEncoder, *args: Any) -> Any:
            text_was_open.append(model.engine.text_is_open)
            return encode(self, *args)

        monkeypatch.setattr(VisionEncoder, "encode", watched)
        model.generate("x", [PICTURE], max_tokens=1, progress=lambda stage, done, total: stages.append(stage))
        assert text_was_open == [False] and model.engine.text_is_open
    order = [stage for stage in dict.fromkeys(stages) if stage != "check"]
    assert order[0] == "encode" and order == [s for s in ("encode", "load", "prefill") if s in order]


def test_text_alone_answers_as_the_pair_does(model: granite4v.Model, tmp_path: Path) -> None:
    alone = tmp_path / "text.gguf"
    alone.write_bytes(model.files.text.path.read_bytes())
    with granite4v.load(alone, device="cpu", exact=True) as text_only:
        assert not text_only.has_vision
        np.testing.assert_array_equal(text_only.logits("Hello"), model.logits("Hello"))
        with pytest.raises(ModelFileError, match="no vision file in its directory.*'--mmproj'"):
            text_only.logits("x", [PICTURE])
        with pytest.raises(ModelFileError, match="'--mmproj'"):
            text_only.encode_image(PICTURE)


def test_encoded_pictures_are_the_references(model: granite4v.Model, load_reference: Callable[..., Reference]) -> None:
    features, expected = model.encode_image(PICTURE), load_reference(TINY).streams(PICTURE)
    assert features.layers == sorted(expected)
    assert features.streams.dtype == np.float32
    for layer, stream in zip(features.layers, features.streams, strict=True):
        assert relative_l2(stream, expected[layer]) < 2e-5


def test_injection_alone_given_the_references_own_streams(
    model: granite4v.Model, load_reference: Callable[..., Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes the encoder out of the comparison, which leaves the template, the tokens and the decoder."""
    reference = load_reference(TINY)
    streams = reference.streams(PICTURE)
    rows = np.stack([streams[layer] for layer in sorted(streams)], axis=1)
    features = dataclasses.replace(model.encode_image(PICTURE), rows=np.ascontiguousarray(rows))
    monkeypatch.setattr(model.engine, "encode", lambda *args: features)
    model.clear_cache()
    found, expected = model.logits("<tables_json>", [PICTURE]), reference.logits("<tables_json>", [PICTURE])
    assert relative_l2(found, expected) < 2e-6


@pytest.mark.parametrize("name", MAPPING_CASES)
def test_every_stream_reaches_its_layer(
    make_model: Callable[..., Path], load_reference: Callable[..., Reference], name: str
) -> None:
    spec = MAPPING_CASES[name]
    with granite4v.load(make_model(spec), device="cpu", exact=True) as model:
        found = model.logits("What?", [PICTURE])
        assert relative_l2(found, load_reference(spec).logits("What?", [PICTURE])) < LOGITS


def test_many_batches_give_what_one_gives(
    model: granite4v.Model,
    load_reference: Callable[..., Reference],
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompt is longer than a batch, and an image is split: positions and slices must continue correctly."""
    prompt, pictures = "word " * 700, [noise_picture((300, 200)), PICTURE]
    expected = load_reference(TINY).logits(prompt, pictures)
    assert relative_l2(model.logits(prompt, pictures), expected) < LOGITS
    monkeypatch.setattr("granite4v.runtime.engine.engine.N_UBATCH", 48)
    with granite4v.load(make_model(TINY), device="cpu", exact=True) as small:
        assert relative_l2(small.logits(prompt, pictures), expected) < LOGITS


# --- files of others ---


def test_files_with_llama_cpps_keys_alone_answer_alike(model: granite4v.Model, tmp_path: Path) -> None:
    """As from llama.cpp's converter, and as in the publisher's files: no tokenizer.json, none of our keys."""
    assert model.files.vision is not None
    copy_gguf(model.files.text.path, tmp_path / "text.gguf", without=OURS)
    copy_gguf(model.files.vision.path, tmp_path / "mmproj.gguf", without=OURS)
    with granite4v.load(tmp_path, device="cpu", exact=True) as foreign:
        assert "contains no tokenizer.json" in foreign.warnings[0]
        assert foreign.encode_image(PICTURE).layers == model.encode_image(PICTURE).layers
        answer = foreign.generate("<tables_json>", [PICTURE], max_tokens=16)
        assert answer.tokens == model.generate("<tables_json>", [PICTURE], max_tokens=16).tokens
        assert answer.warnings == foreign.warnings


def test_a_file_without_a_template(model: granite4v.Model, tmp_path: Path) -> None:
    text = copy_gguf(model.files.text.path, tmp_path / "t.gguf", without=["tokenizer.chat_template"])
    with (
        granite4v.load(text, device="cpu") as bare,
        pytest.raises(ModelFileError, match="no key 'tokenizer.chat_templ"),
    ):
        bare.logits("x")


def test_a_tokenizer_of_another_model(model: granite4v.Model, tmp_path: Path, make_checkpoint: Any) -> None:
    """Ids beyond the vocabulary would end the process inside llama.cpp."""
    bigger = make_checkpoint(replace(TINY, n_bpe=900)) / "tokenizer.json"
    change = {"tokenizer.huggingface.json": bigger.read_text()}
    text = copy_gguf(model.files.text.path, tmp_path / "t.gguf", change=change)
    with granite4v.load(text, device="cpu") as mixed, pytest.raises(ModelFileError, match="does not match its weights"):
        mixed.logits("x")


# --- adapters ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), TINY, AdapterSpec())


@pytest.fixture(scope="module")
def with_lora(make_checkpoint: Callable[..., Path], adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("separate") / "model"
    options = Options(text_type="F32", vision_type="F32", lora="separate", adapter=str(adapter))
    convert(make_checkpoint(TINY), out, options)
    return out


def test_an_adapter_is_on_with_pictures_and_off_without(
    with_lora: Path, adapter: Path, load_reference: Callable[..., Reference]
) -> None:
    base, adapted = load_reference(TINY), load_reference(TINY, adapter)
    with granite4v.load(with_lora, device="cpu", exact=True) as model:
        assert model.has_lora
        assert relative_l2(model.logits("Hello"), base.logits("Hello")) < LOGITS
        assert relative_l2(model.logits("What?", [PICTURE]), adapted.logits("What?", [PICTURE])) < LOGITS
        assert relative_l2(model.logits("Hello"), base.logits("Hello")) < LOGITS
        answer = model.generate("What?", [PICTURE], max_tokens=32)
        assert answer.tokens == adapted.greedy("What?", [PICTURE], 32)


@pytest.mark.parametrize("policy", [None, True, False])
def test_an_adapter_can_be_switched(
    with_lora: Path, adapter: Path, load_reference: Callable[..., Reference], policy: bool | None
) -> None:
    for argument, n_pictures in itertools.product((None, True, False), (0, 1)):
        wanted = argument if argument is not None else policy if policy is not None else n_pictures > 0
        expected = load_reference(TINY, adapter if wanted else None).logits("Hello", [PICTURE] * n_pictures)
        with granite4v.load(with_lora, device="cpu", exact=True, lora=policy) as model:
            found = model.logits("Hello", [PICTURE] * n_pictures, lora=argument)
            assert relative_l2(found, expected) < LOGITS, f"lora={argument} with {n_pictures} images"


def test_switching_does_not_reuse_what_the_other_state_computed(with_lora: Path) -> None:
    with granite4v.load(with_lora, device="cpu") as model:
        on, off = (model.logits("Hello", [PICTURE], lora=lora) for lora in (True, False))
        assert np.abs(on - off).max() > 0.1
        np.testing.assert_array_equal(model.logits("Hello", [PICTURE], lora=True), on)


def test_an_adapter_may_lie_elsewhere(with_lora: Path, make_model: Callable[..., Path]) -> None:
    lora = with_lora / "lora-F32.gguf"
    with granite4v.load(
        with_lora / "text-F32.gguf", mmproj=with_lora / "mmproj-F32.gguf", lora=lora, device="cpu"
    ) as m:
        assert m.has_lora
    with pytest.raises(ModelFileError, match="come from different conversions"):
        granite4v.load(make_model(replace(TINY, seed=5)), lora=lora, device="cpu")


def test_asking_for_an_adapter_that_is_not_there(model: granite4v.Model) -> None:
    with pytest.raises(ModelFileError, match="no separate LoRA to apply; convert with '--lora separate'"):
        model.logits("Hello", lora=True)


def test_an_adapter_that_does_not_fit(with_lora: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    lora = copy_gguf(with_lora / "lora-F32.gguf", tmp_path / "lora.gguf", without=["granite4v."])
    wide = make_model(PRESETS["tiny-wide"]) / "text-F32.gguf"
    with granite4v.load(wide, lora=lora, device="cpu") as model, pytest.raises(ModelFileError) as caught:
        model.logits("Hello")
    assert f"the adapter '{lora}' does not fit" in str(caught.value)
    assert "has incorrect shape (hint: maybe wrong base model?)" in str(caught.value)
    other = copy_gguf(lora, tmp_path / "other.gguf", change={"general.architecture": "llama"})
    with pytest.raises(ModelFileError, match="is for architecture 'llama', but"):
        granite4v.load(wide, lora=other, device="cpu")


# --- arguments ---


def test_options_and_their_keyword_arguments_are_the_same() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(GenerationOptions)}
    assert set(GenerationFields.__annotations__) == set(fields)
    names = {field.name: field.type for field in dataclasses.fields(GenerationOptions)}
    given = {name: kind.__forward_arg__ for name, kind in GenerationFields.__annotations__.items()}
    assert given == names


def test_the_context_is_no_longer_than_the_model_was_trained_for(make_model: Callable[..., Path]) -> None:
    with granite4v.load(make_model(replace(TINY, context=512)), device="cpu", n_ctx=8192) as model:
        assert model.n_ctx == 512
        assert "the context is 512 tokens, not 8,192" in model.warnings[0]


@pytest.mark.parametrize("source", [b"", b"not a picture", "missing.png"])
def test_a_picture_that_is_none_is_an_image_error(model: granite4v.Model, source: Any) -> None:
    with pytest.raises(ImageError):
        model.logits("x", [source])


def test_arguments_out_of_range(model: granite4v.Model, make_model: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="max_tokens is -1"):
        model.generate("x", max_tokens=-1)
    with pytest.raises(ValueError, match="temperature is -1"):
        model.stream("x", temperature=-1)
    with pytest.raises(ValueError, match="n_ctx is 0"):
        granite4v.load(make_model(TINY), n_ctx=0)


@pytest.mark.parametrize("wrong", ["4", 4.0, float("nan"), True, b"4"])
def test_numbers_that_are_no_integers(model: granite4v.Model, make_model: Callable[..., Path], wrong: Any) -> None:
    with pytest.raises(TypeError, match="^n_ctx is .*; expected an integer of 1 or more"):
        granite4v.load(make_model(TINY), n_ctx=wrong)
    with pytest.raises(TypeError, match="^max_tokens is .*; expected an integer of 0 or more"):
        model.generate("x", max_tokens=wrong)
    with pytest.raises(DeviceError, match="the number of threads is .*, expected 1 to 512"):
        granite4v.load(make_model(TINY), n_threads=wrong)


def test_integers_of_numpy_count(make_model: Callable[..., Path]) -> None:
    with granite4v.load(make_model(TINY), n_ctx=np.int64(256), n_threads=np.int32(1)) as model:  # type: ignore[arg-type]
        assert json.dumps([model.n_ctx, model.n_threads]) == "[256, 1]"
        assert model.generate("x", max_tokens=np.int16(2)).timings.n_generated <= 2  # type: ignore[arg-type]


def test_a_schema_is_no_constraint_by_itself(model: granite4v.Model) -> None:
    with pytest.raises(TypeError, match=r"^the constraint is .*; expected what granite4v\.grammar_for returns"):
        model.generate("x", constraint={"type": "object"})  # type: ignore[arg-type]


def test_none_means_no_images(model: granite4v.Model) -> None:
    assert model.prepare("Hello", None).spans == model.prepare("Hello").spans


def test_a_bad_prompt_costs_nothing(model: granite4v.Model) -> None:
    before = model.counters
    with pytest.raises(PromptError):
        model.generate("<tables_json> and more", [PICTURE])
    assert model.counters == before


def test_template_variables_reach_the_template(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model(TINY) / "text-F32.gguf"
    template = "{{ greeting }} {{ messages[0].content[0].text }}"
    text = copy_gguf(source, tmp_path / "t.gguf", change={"tokenizer.chat_template": template})
    with granite4v.load(text, device="cpu") as model:
        assert model.prepare("you", template_variables={"greeting": "hello"}).text == "hello you"


def test_sampled_answers_repeat_with_their_seed(model: granite4v.Model) -> None:
    one, two, other = (model.generate("Hello", max_tokens=20, temperature=1.5, seed=s).tokens for s in (1, 1, 2))
    assert one == two != other


def test_answers_are_json_data(model: granite4v.Model) -> None:
    import json

    answer = model.generate("Hello", [PICTURE], max_tokens=3)
    data = json.loads(json.dumps(answer.as_dict()))
    assert data["tokens"] == answer.tokens and data["timings"]["n_image"] == answer.timings.n_image
    assert data["timings"]["prefill_s"] == answer.timings.prefill_s


def test_closing(make_model: Callable[..., Path]) -> None:
    model = granite4v.load(make_model(TINY), device="cpu")
    stream = model.stream("Hello", [PICTURE])
    next(stream)
    model.close()
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.logits("x")
    with pytest.raises(ValueError, match="closed"):
        model.encode_image(PICTURE)
    with pytest.raises(ValueError, match="closed"):
        list(stream)


def test_threads_take_turns(model: granite4v.Model) -> None:
    expected = {prompt: model.generate(prompt, max_tokens=6).tokens for prompt in ("a", "b", "c", "d")}
    found: dict[str, list[int]] = {}

    def ask(prompt: str) -> None:
        found[prompt] = model.generate(prompt, max_tokens=6).tokens

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_the_number_of_threads_is_known(make_model: Callable[..., Path]) -> None:
    with granite4v.load(make_model(TINY), n_threads=1) as one, granite4v.load(make_model(TINY)) as default:
        assert (one.n_threads, one.settings["n_threads"]) == (1, 1)
        assert default.n_threads == default_threads()


def test_only_a_default_number_of_threads_changes_with_the_load(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def now(_: FreeThreads) -> int:
        asked.append(True)
        return 1

    monkeypatch.setattr(FreeThreads, "now", now)
    for options, expected in (({"n_threads": 2}, False), ({"exact": True}, False), ({"exact": False}, True)):
        with granite4v.load(make_model(TINY), device="cpu", **options) as model:
            model.generate("Hello", max_tokens=2)
        assert bool(asked) == expected


def test_one_image_has_progress_of_its_own_and_the_same_bits(make_model: Callable[..., Path]) -> None:
    """Even where all its tiles are computed together."""
    told: list[tuple[str, int, int]] = []
    with granite4v.load(make_model(TINY), device="cpu") as model:
        plain = model.encode_image(PICTURE).rows
        model.clear_cache()
        followed = model.encode_image(PICTURE, progress=lambda *what: told.append(what)).rows
    assert np.array_equal(plain, followed)
    shares = [done for what, done, total in told if (what, total) == ("encode", 100)]
    assert len(shares) == len(told) > 3 and shares == sorted(shares) and (shares[0], shares[-1]) == (0, 100)


# --- copies and forked processes ---


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_cannot_be_copied(model: granite4v.Model, duplicate: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="cannot be copied or pickled.*load it again"):
        duplicate(model)
    assert model.generate("Hello", max_tokens=2).tokens


FORK = """
import os, sys
import granite4v
from granite4v.clip_projector import VisionEncoder
with granite4v.load(sys.argv[1], device="cpu") as model:
    before = model.generate("Hello", max_tokens=3).tokens
    stream = model.stream("Hello", max_tokens=3)
    next(stream)
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        assert model.generate("Hello", max_tokens=3).tokens == before
        print("parent")
    else:
        for use in (lambda: model.generate("Hello"), lambda: model.encode_image("x.png"), lambda: next(stream)):
            try:
                use()
            except granite4v.DeviceError as error:
                assert f"loaded by process {os.getppid()}" in str(error), error
                print(str(error).rpartition(". ")[2], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_refused_and_ends(make_model: Callable[..., Path]) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, str(make_model(TINY))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    advice = "Load the model after the fork, or start processes with multiprocessing.get_context('spawn').\n"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == 3 * advice + "parent\n"


def test_a_prompt_that_is_not_unicode_is_refused(model: granite4v.Model) -> None:
    with pytest.raises(PromptError, match=r"the prompt holds '\\udcff', which is not valid Unicode"):
        model.generate("caf\udcff")
