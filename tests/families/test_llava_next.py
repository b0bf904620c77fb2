"""LLaVA-NeXT and Granite Vision 3.x, compared with transformers in float32, and with stock libmtmd.

Tolerances are those of the first family's tests: F32 files differ from the reference only by the order of float32 sums
(observed 7e-7 for embeddings, 2e-6 for logits).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import granite4v
from granite4v.clip_projector import VisionEncoder, count_tokens, load_image
from granite4v.clip_projector.pixels import normalize
from granite4v.clip_projector.tiles_anyres import cut
from granite4v.converter import Options, convert, policy
from granite4v.errors import CheckpointError, PromptError
from granite4v.families.text import DEFAULTS
from granite4v.families.towers import KINDS
from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import GgufFile
from granite4v.runtime.prompt.spans import TextSpan
from tests.helpers.gguf_edit import tensor_bytes
from tests.helpers.parity import REAL_SIZES
from tests.helpers.pictures import SIZES, noise_picture
from tests.peers.llama import LlamaPeer, quantize
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter

if TYPE_CHECKING:
    from tests.peers.reference import Reference

EMBEDDINGS, LOGITS = 2e-5, 1e-4
GRANITE, LLAMA = PRESETS["tiny-granite-3.3"], PRESETS["tiny-clip-llama"]
MISTRAL, QWEN2 = PRESETS["tiny-clip-mistral"], PRESETS["tiny-siglip-qwen2"]
REAL_TILES = PRESETS["tiny-granite-3.3-real-tiles"]
LLAMA3_ROPE = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 64.0),
)
OTHERS: dict[str, CheckpointSpec] = {
    "mistral": MISTRAL,
    "qwen2, hidden states out of order, no bias in the projector": QWEN2,
    "llama3 rope": replace(LLAMA, rope_scaling=LLAMA3_ROPE),
    "linear rope": replace(LLAMA, rope_scaling=(("type", "linear"), ("factor", 4.0))),
    "first hidden state": replace(GRANITE, feature_layers=(0, -1)),
    "clip, several hidden states": replace(MISTRAL, feature_layers=(-1, -4, 0)),
    "today's names": replace(GRANITE, naming="v5", tied=False),
}
QUESTION = "What is the total of 12345?"
Pair = tuple["Reference", granite4v.Model]


@pytest.fixture(scope="module")
def pair(load_reference: Callable[..., Reference], make_model: Callable[..., Path]) -> Iterator[Callable[..., Pair]]:
    """Returns the reference and our model from F32 files for a specification."""
    opened: dict[CheckpointSpec, granite4v.Model] = {}

    def get(spec: CheckpointSpec) -> Pair:
        if spec not in opened:
            opened[spec] = granite4v.load(make_model(spec), n_ctx=4096, device="cpu")
        return load_reference(spec), opened[spec]

    yield get
    for model in opened.values():
        model.close()


def check_tiles(reference: Reference, model: granite4v.Model, size: tuple[int, int]) -> None:
    config = model.engine.encoder().config
    picture = noise_picture(size)
    tiles = normalize(cut(picture, config.tiling), config.tiling)
    np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), reference.tiles(picture))
    assert count_tokens(size, config) == reference.n_tokens(picture)


def check_values(reference: Reference, model: granite4v.Model, size: tuple[int, int]) -> None:
    picture = noise_picture(size)
    features = model.encode_image(picture)
    assert features.layers == [0]
    assert relative_l2(features.streams[0], reference.streams(picture)[0]) <= EMBEDDINGS
    expected, said = reference.logits_and_greedy(QUESTION, [picture], 32)  # including the end token, if it ends earlier
    found = model.logits(QUESTION, [picture])
    assert relative_l2(found, expected) <= LOGITS
    assert int(found.argmax()) == int(expected.argmax())
    answer = model.generate(QUESTION, [picture], max_tokens=32)
    assert answer.tokens == [token for token in said if token not in model.prompts.stop_tokens]
    assert (answer.finish_reason == "stop") == (said[-1] in model.prompts.stop_tokens)


@pytest.mark.parametrize("size", REAL_SIZES)
def test_from_pixels_to_answer(pair: Callable[..., Pair], size: tuple[int, int]) -> None:
    for spec in (GRANITE, LLAMA):
        reference, model = pair(spec)
        check_tiles(reference, model, size)
        check_values(reference, model, size)


@pytest.mark.parametrize("size", SIZES)
def test_the_published_tiles(pair: Callable[..., Pair], size: tuple[int, int]) -> None:
    """384 pixels are 27 patches of 14 pixels and 6 pixels that are not used."""
    reference, model = pair(REAL_TILES)
    assert model.engine.encoder().config.tokens_per_tile == 729
    check_tiles(reference, model, size)


def test_embeddings_of_the_published_tiles(pair: Callable[..., Pair]) -> None:
    reference, model = pair(REAL_TILES)
    check_values(reference, model, (384, 384))


@pytest.mark.parametrize("name", OTHERS)
def test_every_configuration(pair: Callable[..., Pair], name: str) -> None:
    check_values(*pair(OTHERS[name]), (150, 100))


def test_the_image_is_scaled_as_the_text_is(pair: Callable[..., Pair], make_model: Callable[..., Path]) -> None:
    """Granite multiplies all its input embeddings: without the multiplier images would have another weight."""
    reference, _ = pair(GRANITE)
    assert reference.model.config.text_config.embedding_multiplier == GRANITE.embedding_multiplier != 1.0
    with GgufFile.open(next(make_model(GRANITE).glob("text-*.gguf"))) as file:
        assert file["granite.embedding_scale"] == GRANITE.embedding_multiplier
        assert "granite.deepstack_mapping" not in file  # with one, llama.cpp leaves embeddings unscaled


@pytest.mark.parametrize("spec", [GRANITE, LLAMA], ids=["granite", "clip-llama"])
def test_all_tiles_at_once(
    spec: CheckpointSpec, pair: Callable[..., Pair], make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes a GPU's path on the CPU: one graph over all tiles, weights in the device's own buffer."""
    begin = Backend.__init__

    def as_accelerator(self: Backend, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self.is_cpu = False

    monkeypatch.setattr(Backend, "__init__", as_accelerator)
    picture = noise_picture((300, 200))
    with VisionEncoder(make_model(spec) / "mmproj-F32.gguf", "cpu") as encoder:
        found = encoder.encode([load_image(picture)])[0].streams[0]
    assert relative_l2(found, pair(spec)[0].streams(picture)[0]) <= EMBEDDINGS


# --- prompts ---

PART = {"type": "image"}


def words(role: str, text: str, *before: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": [*before, {"type": "text", "text": text}]}


CONVERSATIONS = {
    "a question": [words("user", "What?", PART)],
    "a system message": [words("system", "Be brief."), words("user", "What?", PART)],
    "a later picture": [words("user", "Hi."), words("assistant", "Yes."), words("user", "And now?", PART)],
    "two pictures": [words("user", "What differs?", PART, PART)],
    "text alone": [words("user", "Good morning, L'été 東京")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("spec", [GRANITE, LLAMA, MISTRAL], ids=["granite", "llama", "mistral"])
def test_prompts_are_the_references(pair: Callable[..., Pair], spec: CheckpointSpec, name: str) -> None:
    """Templates from a file, from JSON and from tokenizer_config.json; a bos token if the tokenizer adds one."""
    reference, model = pair(spec)
    messages = CONVERSATIONS[name]
    pictures = [noise_picture((70, 50), i) for i in range(json.dumps(messages).count('"image"'))]
    prompt = model.prepare(messages, pictures)
    assert prompt.text == reference.prompt_text(messages)
    found: list[int] = []
    for span in prompt.spans:
        found += span.tokens if isinstance(span, TextSpan) else (model.prompts.placeholder,) * span.n_tokens
    assert found == reference.prompt_ids(messages, pictures)


def test_a_person_may_write_the_placeholder(pair: Callable[..., Pair]) -> None:
    _, model = pair(LLAMA)
    picture = noise_picture((70, 50))
    usual = model.prepare("What?", [picture])
    assert usual.text == "USER: <image>\nWhat? ASSISTANT:"
    written = model.prepare("<image>\nWhat?", [picture])
    assert (written.text, written.spans) == (usual.text, usual.spans)
    middle = model.prepare([{"role": "user", "content": "This <image> or that <image>?"}], [picture, picture])
    assert middle.text == "USER: This <image> or that <image>? ASSISTANT:"
    assert middle.n_image_tokens == 2 * usual.n_image_tokens
    with pytest.raises(PromptError, match="2 image placeholders for 1 image|3 image placeholders"):
        model.prepare("<image> or <image>?", [picture])


# --- the converter ---


@pytest.mark.parametrize("spec", [GRANITE, LLAMA], ids=["granite", "clip-llama"])
def test_older_spellings_give_the_same_tensors(
    spec: CheckpointSpec, make_model: Callable[..., Path], tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    for naming in {"v5", "v4", "old"} - {spec.naming}:
        convert(make_checkpoint(replace(spec, naming=naming)), tmp_path / naming, Options("F32", "F32"))
        for name in ("text-F32.gguf", "mmproj-F32.gguf"):
            assert tensor_bytes(tmp_path / naming / name) == tensor_bytes(make_model(spec) / name)


def test_layers_that_nobody_takes_and_the_last_norm_stay_out(make_model: Callable[..., Path]) -> None:
    names = set(tensor_bytes(make_model(LLAMA) / "mmproj-F32.gguf"))
    assert "v.blk.2.ln1.weight" in names and "v.blk.3.ln1.weight" not in names
    assert {"v.class_embd", "v.pre_ln.weight", "mm.0.bias", "mm.2.weight", "v.image_newline"} <= names
    assert not {"v.post_ln.weight", "v.patch_embd.bias"} & names


WIDE: dict[str, CheckpointSpec] = {
    "granite": replace(GRANITE, text_hidden=256, text_ffn=512),
    "llama": replace(LLAMA, text_hidden=256, text_ffn=512),
    "qwen2": replace(QWEN2, text_hidden=256, text_ffn=512),
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", WIDE)
def test_quantized_files_are_llama_cpps_and_load(
    arch: str, make_checkpoint: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    whole = make_model(WIDE[arch]) / "text-F32.gguf"
    for name, vision in (("Q4_K_M", "Q4_0"), ("Q4_0", "Q8_0"), ("Q8_0", "F16"), ("Q6_K", "BF16"), ("IQ4_NL", "IQ4_NL")):
        assert name in policy.TEXT_TYPES and vision in policy.VISION_TYPES
        convert(make_checkpoint(WIDE[arch]), tmp_path / name, Options(name, vision))
        quantize(whole, tmp_path / "theirs.gguf", name)
        ours, theirs = tensor_bytes(tmp_path / name / f"text-{name}.gguf"), tensor_bytes(tmp_path / "theirs.gguf")
        assert [key for key in theirs if ours[key] != theirs[key]] == [], name
        with granite4v.load(tmp_path / name, device="cpu") as model:
            assert model.generate("What?", [noise_picture((70, 50))], max_tokens=2).tokens


@pytest.mark.parametrize("spec", [GRANITE, LLAMA, QWEN2], ids=["granite", "llama", "qwen2"])
def test_adapters_merged_and_separate(
    spec: CheckpointSpec, make_checkpoint: Callable[..., Path], load_reference: Callable[..., Reference], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", spec, AdapterSpec())
    expected = load_reference(spec, adapter).logits(QUESTION)
    for mode in ("merge", "separate", "ignore"):
        convert(make_checkpoint(spec), tmp_path / mode, Options("F32", "F32", lora=mode, adapter=str(adapter)))
        with granite4v.load(tmp_path / mode, device="cpu") as model:
            found = model.logits(QUESTION, lora=True if mode == "separate" else None)
        assert (relative_l2(found, expected) <= LOGITS) == (mode != "ignore"), mode


@pytest.mark.parametrize("spec", [LLAMA, MISTRAL, QWEN2], ids=["llama", "mistral", "qwen2"])
def test_stock_llama_cpp_computes_and_tokenizes_alike(
    spec: CheckpointSpec,
    make_checkpoint: Callable[..., Path],
    make_model: Callable[..., Path],
    pair: Callable[..., Pair],
) -> None:
    reference, _ = pair(spec)
    ids = reference.prompt_ids("Invoice 1,284.50 EUR")
    tokenizer = Tokenizer.from_file(str(make_checkpoint(spec) / "tokenizer.json"))
    with LlamaPeer(make_model(spec) / "text-F32.gguf") as peer:
        assert np.abs(peer.logits(ids)[-1] - reference.logits("Invoice 1,284.50 EUR")).max() < 1e-4
        assert peer.adds_bos() == (spec.vocabulary == "sentencepiece")
        for text in ("Total amount due: 1,284.50 EUR.", "L'été 東京 😀", "a  b\n\n c", "unit price and Subtotal"):
            assert peer.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_a_sliding_window_ends_the_context(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp's architectures attend to all tokens, which is the same up to the window's length."""
    source = shutil.copytree(make_checkpoint(MISTRAL), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["sliding_window"] = 256
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", Options("F32", "F32"))
    with GgufFile.open(tmp_path / "out" / "text-F32.gguf") as file:
        assert file["llama.context_length"] == 256


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (LLAMA, {"vision_feature_select_strategy": "full"}, "'full' and a tower with a class token"),
        (GRANITE, {"vision_feature_select_strategy": "default"}, "without a class token, whose first position"),
        (
            GRANITE,
            {"vision_feature_select_strategy": "some"},
            "'vision_feature_select_strategy' is 'some'; expected 'default' or 'full'",
        ),
        (GRANITE, {"vision_feature_layer": [-1, 9]}, "takes vision hidden state 9; the tower has 6 of them"),
        (
            GRANITE,
            {"vision_feature_layer": []},
            "'vision_feature_layer' is []; expected a number, or a list of at most 64",
        ),
        (GRANITE, {"image_grid_pinpoints": [[56, 57]]}, "'image_grid_pinpoints' differ"),
        (GRANITE, {"vision_config": {"model_type": "pixtral"}}, "the towers that convert are 'siglip_vision_model'"),
    ],
)
def test_what_the_reference_cannot_compute_is_refused(
    spec: CheckpointSpec, change: dict[str, Any], message: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(make_checkpoint(spec), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", Options("F32", "F32"))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_configurations_leave_out_is_transformers_default() -> None:
    import transformers

    for kind in KINDS:
        theirs = transformers.CONFIG_MAPPING[kind.hf_model_type]()
        assert {key: getattr(theirs, key) for key, _ in kind.defaults} == dict(kind.defaults)
    for model_type, defaults in DEFAULTS.items():
        theirs = transformers.CONFIG_MAPPING[model_type]()
        window = {"sliding_window"} if model_type == "qwen2" else set()  # None there unless it is enabled
        theirs.rope_theta, checked = theirs.rope_parameters["rope_theta"], set(defaults) - window
        known = {key: getattr(theirs, key) for key in checked}
        known = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
        assert known == {key: defaults[key] for key in checked}
