"""LLaVA-NeXT and Granite Vision 3.x: ours against transformers in float32, and against stock libmtmd.

Tolerances as in the tests of the first family: F32 files differ from the reference by the order of float32 sums only
(observed 7e-7 for embeddings, 2e-6 for logits).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

import granite4v
from granite4v.cli.main import app
from granite4v.clip_projector import VisionEncoder, count_tokens, load_image
from granite4v.clip_projector.pixels import normalize
from granite4v.clip_projector.tiles_anyres import cut
from granite4v.converter import Options, convert, policy
from granite4v.errors import CheckpointError, PromptError
from granite4v.families.registry import read_vision
from granite4v.families.text import DEFAULTS
from granite4v.families.towers import KINDS
from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import GgufFile
from tests.helpers.gguf_edit import copy_gguf, tensor_bytes
from tests.helpers.pictures import SIZES, noise_picture, text_picture
from tests.peers.llama import LlamaPeer, encode_pieces, quantize
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
    """The reference and our model from F32 files, for one specification."""
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
    expected, found = reference.logits(QUESTION, [picture]), model.logits(QUESTION, [picture])
    assert relative_l2(found, expected) <= LOGITS
    assert int(found.argmax()) == int(expected.argmax())
    said = reference.greedy(QUESTION, [picture], 32)  # with the end token, where it ends before
    answer = model.generate(QUESTION, [picture], max_tokens=32)
    assert answer.tokens == [token for token in said if token not in model.prompts.stop_tokens]
    assert (answer.finish_reason == "stop") == (said[-1] in model.prompts.stop_tokens)


@pytest.mark.parametrize("size", SIZES)
def test_from_pixels_to_answer(pair: Callable[..., Pair], size: tuple[int, int]) -> None:
    for spec in (GRANITE, LLAMA):
        reference, model = pair(spec)
        check_tiles(reference, model, size)
        check_values(reference, model, size)


@pytest.mark.parametrize("size", SIZES)
def test_the_published_tiles(pair: Callable[..., Pair], size: tuple[int, int]) -> None:
    """384 pixels are 27 patches of 14 and 6 pixels that nobody looks at."""
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
    """Granite multiplies all its input embeddings: without the multiplier pictures would count otherwise."""
    reference, _ = pair(GRANITE)
    assert reference.model.config.text_config.embedding_multiplier == GRANITE.embedding_multiplier != 1.0
    with GgufFile.open(next(make_model(GRANITE).glob("text-*.gguf"))) as file:
        assert file["granite.embedding_scale"] == GRANITE.embedding_multiplier
        assert "granite.deepstack_mapping" not in file  # with one, llama.cpp leaves embeddings unscaled


@pytest.mark.parametrize("spec", [GRANITE, LLAMA], ids=["granite", "clip-llama"])
def test_all_tiles_at_once(
    spec: CheckpointSpec, pair: Callable[..., Pair], make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way a GPU takes, walked on the CPU: one graph over all tiles, weights in the device's own buffer."""
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
    """Templates from a file, from JSON and from tokenizer_config.json; the first token where the tokenizer adds one."""
    reference, model = pair(spec)
    messages = CONVERSATIONS[name]
    pictures = [noise_picture((70, 50), i) for i in range(json.dumps(messages).count('"image"'))]
    prompt = model.prepare(messages, pictures)
    assert prompt.text == reference.prompt_text(messages)
    found: list[int] = []
    for span in prompt.spans:
        found += getattr(span, "tokens", (model.prompts.placeholder,) * span.n_tokens)
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
    """llama.cpp's architectures see all tokens; up to the window that is the same."""
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
        window = {"sliding_window"} if model_type == "qwen2" else set()  # None there until it is switched on
        assert {k: getattr(theirs, k) for k in defaults if k not in window} == {
            k: value for k, value in defaults.items() if k not in window
        }


# --- stock libmtmd, and files made by its converter ---


def test_stock_libmtmd_makes_the_same_embeddings_of_every_tile(make_model: Callable[..., Path]) -> None:
    """As near as it comes: it rounds patches to F16 and takes gelu's other form, from an F16 table, in the projector.

    Its packing is another: the overview last, padding kept and of another colour, no newlines, and no grid for a
    picture that is no larger than a tile.
    """
    folder, side = make_model(GRANITE), GRANITE.tile_px
    picture = noise_picture((2 * side, side))
    pieces = encode_pieces(folder / "text-F32.gguf", folder / "mmproj-F32.gguf", np.asarray(picture))
    with VisionEncoder(folder / "mmproj-F32.gguf", "cpu") as encoder:
        rows = encoder.encode([load_image(picture)])[0].streams[0]
        n = encoder.config.tokens_side
    overview, grid = rows[: n * n], rows[n * n :].reshape(n, 2 * n + 1, -1)[:, : 2 * n]
    ours = [*(grid[:, n * i : n * (i + 1)].reshape(n * n, -1) for i in range(2)), overview]
    assert len(pieces) == 3
    for found, expected in zip(pieces, ours, strict=True):
        assert relative_l2(found, expected) < 6e-4


def test_where_libmtmd_parts_from_the_reference_with_a_class_token(make_model: Callable[..., Path]) -> None:
    """It puts the class token last and then drops the first patch. Ours goes with the reference."""
    folder = make_model(LLAMA)
    picture = noise_picture((LLAMA.tile_px,) * 2)
    (found,) = encode_pieces(folder / "text-F32.gguf", folder / "mmproj-F32.gguf", np.asarray(picture))
    with VisionEncoder(folder / "mmproj-F32.gguf", "cpu") as encoder:
        ours = encoder.encode([load_image(picture)])[0].streams[0][: len(found)]
    assert relative_l2(found, ours) > 0.1


def as_published(source: Path, target: Path, spec: CheckpointSpec) -> Path:
    """A vision file in the layout of llama.cpp's older converter, with our file's values in half precision."""
    reader = gguf.GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    writer = gguf.GGUFWriter(target, "clip")
    for key in ("has_text_encoder", "has_vision_encoder", "has_llava_projector", "use_gelu"):
        writer.add_bool(f"clip.{key}", key in ("has_vision_encoder", "has_llava_projector"))
    writer.add_file_type(1)
    writer.add_name("siglip-model")
    writer.add_description("image encoder for LLaVA")
    writer.add_string("clip.projector_type", "mlp")
    for key in ("image_size", "patch_size", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"clip.vision.{key}", fields[f"clip.vision.{key}"])
    writer.add_uint32("clip.vision.projection_dim", 0)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_uint32("clip.vision.block_count", fields["clip.vision.block_count"])
    writer.add_array("clip.vision.image_grid_pinpoints", [px for pair in spec.grid_pinpoints for px in pair])
    writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
    writer.add_array("clip.vision.feature_layer", fields["clip.vision.feature_layer"])
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    for tensor in reader.tensors:
        parts = [swapped.get(part, part) for part in tensor.name.split(".")]
        name = "model.image_newline" if tensor.name == "v.image_newline" else ".".join(parts)
        matrix = name.endswith(".weight") and len(tensor.shape) > 1
        writer.add_tensor(name, tensor.data.astype(np.float16 if matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_pair_as_published_runs(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Swapped feed-forward names, the newline's old name, half-precision positions, no width, no activation."""
    folder = make_model(GRANITE)
    mmproj = as_published(folder / "mmproj-F32.gguf", tmp_path / "mmproj-model-f16.gguf", GRANITE)
    text = tmp_path / "granite-vision-3.2-2b-F32.gguf"
    copy_gguf(folder / "text-F32.gguf", text, without=("granite4v.", "tokenizer.huggingface"))
    with GgufFile.open(mmproj) as theirs, GgufFile.open(folder / "mmproj-F32.gguf") as ours:
        assert read_vision(theirs)[1] == read_vision(ours)[1]
    picture = noise_picture((150, 100))
    with granite4v.load(text, mmproj=mmproj, device="cpu") as found, granite4v.load(folder, device="cpu") as expected:
        assert any("carries no tokenizer.json" in warning for warning in found.warnings)
        streams = [model.encode_image(picture).streams for model in (found, expected)]
        assert relative_l2(*streams) < 1.5e-3  # half-precision weights
        assert found.prepare(QUESTION, [picture]).spans == expected.prepare(QUESTION, [picture]).spans
        assert relative_l2(found.logits(QUESTION, [picture]), expected.logits(QUESTION, [picture])) < 1e-2


# --- commands ---


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "page.png"
    text_picture((150, 100)).save(path)
    return path


def test_ask_bench_and_extract(make_model: Callable[..., Path], page: Path) -> None:
    folder = make_model(GRANITE)
    asked = run("ask", page, "What is this?", "--model", folder, "--max-tokens", 6)
    assert asked.exit_code == 0 and asked.stdout.endswith("\n")
    measured = run("bench", "--model", folder, "--image", page, "--max-tokens", 4)
    assert measured.exit_code == 0, measured.stderr
    assert json.loads(measured.stdout.splitlines()[-1])["image_tokens"] > 0
    read = run("extract", page, "--prompt", "What is this?", "--model", folder, "--max-tokens", 6, "--json")
    record = json.loads(read.stdout.splitlines()[-1])
    assert (record["task"], record["error"]) == ("prompt", None)


def test_task_tags_are_offered_only_where_the_template_knows_them(make_model: Callable[..., Path], page: Path) -> None:
    result = run("extract", page, "--task", "tables_json", "--model", make_model(GRANITE))
    assert result.exit_code == 1
    assert "does not know the task 'tables_json'; it knows kvp, and any model takes a question" in result.stderr


def test_inspect_shows_the_joined_hidden_states(make_model: Callable[..., Path]) -> None:
    shown = run("inspect", make_model(GRANITE)).stdout
    assert "hidden state 1, 2, 4, 5 -> decoder layer 0\n" in shown
    assert "llava_next" in shown and "two layers" in shown


@pytest.mark.parametrize("spec", [GRANITE, LLAMA, MISTRAL], ids=["granite", "clip-llama", "clip-mistral"])
def test_verify(
    spec: CheckpointSpec, make_checkpoint: Callable[..., Path], make_model: Callable[..., Path], page: Path
) -> None:
    """The processor of the second says nothing of patches, the template of the third stands with the tokenizer."""
    result = run(
        *("verify", make_model(spec), "--reference", make_checkpoint(spec), "--image", page),
        *("--exact", "--positions", 4, "--json"),
    )
    assert result.exit_code == 0, result.stderr
    with_picture, text_only = json.loads(result.stdout)["comparisons"]
    assert with_picture["n_image_tokens"] == with_picture["n_image_tokens_reference"] > 0
    assert [stream["relative_l2"] < EMBEDDINGS for stream in with_picture["streams"]] == [True]
    for comparison in (with_picture, text_only):
        assert comparison["same_prompt_tokens"] is True
        assert comparison["same_top"] == 1.0 and comparison["logits_max"] < 1e-4
