"""Tests of a model's files: found by their metadata; files that do not fit together are refused with the reason."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import granite4v
from granite4v.errors import DeviceError, ModelFileError
from granite4v.ggml.gguf_file import GgufFile
from granite4v.runtime.llama.files import ModelFiles
from tests.helpers.gguf_edit import copy_gguf
from tests.toy.spec import MAPPING_CASES, PRESETS

OURS = ("granite4v.", "tokenizer.huggingface")
TINY = PRESETS["tiny"]
OTHER = replace(TINY, seed=5)
WIDE = PRESETS["tiny-wide"]


@pytest.fixture
def folder(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a model directory that a test may change."""
    return shutil.copytree(make_model(TINY), tmp_path / "model")


def message_of(*args: Any, **options: Any) -> str:
    with pytest.raises(ModelFileError) as caught:
        ModelFiles.open(*args, **options).close()
    return str(caught.value)


def test_a_directory_of_one_conversion(folder: Path) -> None:
    with ModelFiles.open(folder) as files:
        assert files.text.path.name == "text-F32.gguf"
        assert files.vision is not None and files.vision.path.name == "mmproj-F32.gguf"
        assert files.adapter is None
        assert files.injection is not None and files.injection.layers == (0, 2, 3, 4, 5, 7)
        assert files.injection.slots == tuple(range(6)) and files.injection.n_slots == 6


def test_names_do_not_matter(folder: Path) -> None:
    (folder / "text-F32.gguf").rename(folder / "mmproj.gguf")
    (folder / "mmproj-F32.gguf").rename(folder / "model.gguf")
    with ModelFiles.open(folder) as files:
        assert files.vision is not None
        assert (files.text.path.name, files.vision.path.name) == ("mmproj.gguf", "model.gguf")


def test_a_text_file_finds_the_vision_file_beside_it(folder: Path) -> None:
    with ModelFiles.open(folder / "text-F32.gguf") as files:
        assert files.vision is not None and files.vision.path.parent == folder


def test_a_text_file_does_not_take_another_conversions_vision_file(
    folder: Path, make_model: Callable[..., Path]
) -> None:
    shutil.copy(make_model(OTHER) / "mmproj-F32.gguf", folder / "mmproj-F32.gguf")
    with ModelFiles.open(folder / "text-F32.gguf") as files:
        assert files.vision is None


def test_a_text_file_alone_has_no_vision(folder: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(folder / "text-F32.gguf", tmp_path))
    with ModelFiles.open(alone) as files:
        assert files.vision is None and files.vision_config is None


def test_the_vision_file_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    elsewhere = shutil.move(folder / "mmproj-F32.gguf", tmp_path / "v.gguf")
    with ModelFiles.open(folder / "text-F32.gguf", mmproj=elsewhere) as files:
        assert files.vision is not None


@pytest.mark.parametrize("name", MAPPING_CASES)
def test_streams_go_where_the_configuration_says(make_model: Callable[..., Path], name: str) -> None:
    spec = MAPPING_CASES[name]
    layers = {layer for _, layer in spec.deepstack_layer_map} | set(spec.spatial_target_layers)
    with ModelFiles.open(make_model(spec)) as files:
        assert files.injection is not None
        assert files.injection.layers == tuple(sorted(layers))
        assert files.injection.n_slots == len(layers | {0})


def test_files_of_other_converters_number_their_streams(folder: Path, tmp_path: Path) -> None:
    text = copy_gguf(folder / "text-F32.gguf", tmp_path / "t.gguf", without=OURS)
    vision = copy_gguf(folder / "mmproj-F32.gguf", tmp_path / "v.gguf", without=OURS)
    with ModelFiles.open(text, mmproj=vision) as files:
        assert files.injection is not None
        assert files.injection.layers == (0, 2, 3, 4, 5, 7) and files.injection.slots == tuple(range(6))


# File names of ibm-granite/granite-vision-4.1-4b-GGUF, and the metadata keys of its vision file.
OFFICIAL_NAMES = ("granite-vision-4.1-4b-Q4_K_M.gguf", "mmproj-model-f16.gguf")
OFFICIAL_KEYS = (
    "general.architecture",
    "clip.projector_type",
    "clip.use_gelu",
    "clip.has_vision_encoder",
    "clip.vision.image_size",
    "clip.vision.preproc_image_size",
    "clip.vision.patch_size",
    "clip.vision.embedding_length",
    "clip.vision.feed_forward_length",
    "clip.vision.block_count",
    "clip.vision.projection_dim",
    "clip.vision.attention.head_count",
    "clip.vision.attention.layer_norm_epsilon",
    "clip.vision.image_mean",
    "clip.vision.image_std",
    "clip.vision.feature_layer",
    "clip.vision.image_grid_pinpoints",
    "clip.vision.projector.query_side",
    "clip.vision.projector.window_side",
    "clip.vision.projector.spatial_offsets",
)


def test_a_pair_with_the_names_and_keys_of_the_official_repository(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model(TINY, "Q8_0", "F16")
    text_name, vision_name = OFFICIAL_NAMES
    copy_gguf(source / "text-Q8_0.gguf", tmp_path / text_name, without=OURS)
    with GgufFile.open(source / "mmproj-F16.gguf") as file:
        others = [key for key in file if key not in OFFICIAL_KEYS]
    vision = copy_gguf(source / "mmproj-F16.gguf", tmp_path / vision_name, without=others)
    with GgufFile.open(vision) as file:
        assert set(file) == set(OFFICIAL_KEYS)
    for path in (tmp_path, tmp_path / text_name):
        with ModelFiles.open(path) as files, ModelFiles.open(source) as ours:
            assert files.vision is not None and files.vision.path == vision
            assert files.vision_config is not None and ours.vision_config is not None
            assert files.injection == ours.injection
            assert files.vision_config.tower == ours.vision_config.tower
            assert files.vision_config.tiling == ours.vision_config.tiling
    from granite4v.clip_projector import VisionEncoder

    VisionEncoder(vision, device="cpu").close()


# --- what is wrong, and the message for it ---


TENSORS = [
    ("I32", np.int32, "v.blk.0.ffn_up.weight", "as I32, expected a type that weights are multiplied in"),
    ("F64", np.float64, "v.blk.0.ffn_up.weight", "as F64, expected a type that weights are multiplied in"),
    ("I64", np.int64, "v.blk.0.ln1.bias", "as I64 (192,), expected F32 with 192 values"),
    ("F32", None, "v.blk.1.attn_q.weight", "with shape (3, 5), expected (192, 192) by its metadata"),
    ("F32", None, "v.position_embd.weight", "expected 64 vectors of 192 values"),
    ("", None, "v.blk.1.attn_q.weight", "has no tensor 'v.blk.1.attn_q.weight'"),
    ("", None, "v.image_newline", "has no tensor 'v.image_newline'"),
]


@pytest.mark.parametrize(("kind", "dtype", "name", "expected"), TENSORS)
def test_a_vision_tensor_that_cannot_be_used_is_named_when_the_file_is_opened(
    folder: Path, kind: str, dtype: Any, name: str, expected: str
) -> None:
    from granite4v.clip_projector import VisionEncoder

    path = folder / "mmproj-F32.gguf"
    reader = gguf.GGUFReader(path)
    shape = next(tuple(map(int, tensor.shape))[::-1] for tensor in reader.tensors if tensor.name == name)
    data = np.ones(shape, dtype) if dtype else np.zeros((3, 5), np.float32)
    copy_gguf(path, folder / "copy.gguf", tensors={name: data if kind else None}).replace(path)
    with pytest.raises(ModelFileError) as caught:
        VisionEncoder(path, device="cpu").close()
    assert f"'{path}' has" in str(caught.value) and expected in str(caught.value)


def test_weights_that_are_not_numbers_are_said(folder: Path) -> None:
    from PIL import Image

    for name, tensor in (("mmproj-F32.gguf", "v.blk.0.ln1.bias"), ("text-F32.gguf", "blk.0.attn_norm.weight")):
        path = folder / name
        reader = gguf.GGUFReader(path)
        n = next(int(entry.n_elements) for entry in reader.tensors if entry.name == tensor)
        damaged = copy_gguf(path, folder / f"{name}.copy", tensors={tensor: np.full(n, np.nan, np.float32)})
        good = path.rename(folder / "good")
        damaged.rename(path)
        with (
            granite4v.load(folder, device="cpu") as model,
            pytest.raises(ModelFileError, match="non-finite|not finite") as caught,
        ):
            model.logits("x", [Image.new("RGB", (40, 30))])
        assert str(path) in str(caught.value)
        good.rename(path)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "'granite4v convert'" in message_of(tmp_path / "nowhere")
    assert f"'{tmp_path / 'nowhere'}' does not exist" in message_of(tmp_path / "nowhere")
    assert "'https://host/model' is a URL; download the model" in message_of(Path("https://host/model"))


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    assert f"'{tmp_path}' contains no text model" in message_of(tmp_path)


@pytest.mark.parametrize(("role", "name"), [("text model", "text-F32"), ("vision file", "mmproj-F32")])
def test_a_directory_with_two_of_a_kind(folder: Path, role: str, name: str) -> None:
    shutil.copy(folder / f"{name}.gguf", folder / f"{name}-again.gguf")
    message = message_of(folder)
    assert f"contains more than one {role}" in message and f"'{name}-again.gguf'" in message
    assert ("give the text GGUF itself" if "text" in role else "choose one with '--mmproj'") in message


def test_files_in_the_wrong_place(folder: Path) -> None:
    text, vision = folder / "text-F32.gguf", folder / "mmproj-F32.gguf"
    assert "is a vision file (mmproj), but a text model is needed there" in message_of(vision)
    assert "is a text model, but a vision file (mmproj) is needed there" in message_of(text, mmproj=text)
    assert "is a text model, but a LoRA adapter is needed there" in message_of(text, adapter=text)


def test_files_of_two_conversions(folder: Path, make_model: Callable[..., Path]) -> None:
    other = make_model(OTHER) / "mmproj-F32.gguf"
    message = message_of(folder / "text-F32.gguf", mmproj=other)
    assert "come from different conversions" in message and str(other) in message


def test_a_vision_file_of_another_width(folder: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    vision = copy_gguf(make_model(WIDE) / "mmproj-F32.gguf", tmp_path / "v.gguf", without=["granite4v.pair_id"])
    message = message_of(folder / "text-F32.gguf", mmproj=vision)
    assert "embeddings of width 256" in message and "takes width 64" in message


def test_a_vision_file_with_streams_for_other_layers(
    folder: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model(MAPPING_CASES["unsorted"]) / "mmproj-F32.gguf"
    vision = copy_gguf(source, tmp_path / "v.gguf", without=["granite4v.pair_id"])
    message = message_of(folder / "text-F32.gguf", mmproj=vision)
    assert "streams for decoder layers [0, 1, 2, 3, 4, 5, 7]" in message and "[0, 2, 3, 4, 5, 7]" in message


def test_a_foreign_vision_file_with_another_number_of_streams(
    folder: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model(MAPPING_CASES["unsorted"]) / "mmproj-F32.gguf"
    vision = copy_gguf(source, tmp_path / "v.gguf", without=OURS)
    assert "makes 7 image streams, but" in message_of(folder / "text-F32.gguf", mmproj=vision)


def test_a_text_file_that_takes_no_streams(folder: Path, tmp_path: Path) -> None:
    text = copy_gguf(folder / "text-F32.gguf", tmp_path / "t.gguf", without=["granite.deepstack_mapping", *OURS])
    assert "takes them at [0]; the two belong to different models" in message_of(
        text, mmproj=folder / "mmproj-F32.gguf"
    )


def test_a_mapping_with_a_gap(folder: Path, tmp_path: Path) -> None:
    text = copy_gguf(
        folder / "text-F32.gguf",
        tmp_path / "t.gguf",
        change={"granite.deepstack_mapping": [-1, -1, 1, 2, 3, 4, -1, 6]},
    )
    assert "numbers its image streams [1, 2, 3, 4, 6]" in message_of(text, mmproj=folder / "mmproj-F32.gguf")


@pytest.mark.parametrize(
    "key", ["granite.embedding_length", "granite.block_count", "granite.context_length", "general.architecture"]
)
def test_missing_keys_of_the_text_file(folder: Path, key: str) -> None:
    path = folder / "text-F32.gguf"
    if key == "general.architecture":
        path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architectura", 1))
    else:
        copy = copy_gguf(path, folder / "copy.gguf", without=[key])
        copy.replace(path)
    assert f"has no key '{key}'; convert it again" in message_of(path)


@pytest.mark.parametrize("n_layers", [0, 513])
def test_a_number_of_layers_that_would_end_the_process(folder: Path, n_layers: int) -> None:
    path = folder / "text-F32.gguf"
    copy_gguf(path, folder / "copy.gguf", change={"granite.block_count": n_layers}).replace(path)
    assert f"has {n_layers} layers; llama.cpp takes 1 to 512" in message_of(folder)


def test_missing_keys_of_the_vision_file(folder: Path) -> None:
    copy = copy_gguf(folder / "mmproj-F32.gguf", folder / "copy.gguf", without=["clip.vision.feature_layer"])
    copy.replace(folder / "mmproj-F32.gguf")
    assert "has no key 'clip.vision.feature_layer'" in message_of(folder)


def test_an_unknown_projector(folder: Path) -> None:
    change = {"clip.projector_type": "somebody_elses"}
    copy = copy_gguf(folder / "mmproj-F32.gguf", folder / "copy.gguf", change=change)
    copy.replace(folder / "mmproj-F32.gguf")
    assert "'clip.projector_type' = 'somebody_elses'" in message_of(folder)


@pytest.mark.parametrize("name", ["text-F32.gguf", "mmproj-F32.gguf"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: data[: len(data) // 2], "is cut short"),
        (lambda data: data[:100], "header is broken or cut short"),
        (lambda data: b"GGML" + data[4:], "is not a GGUF file: it begins with b'GGML'"),
        (lambda data: b"", "is not a GGUF file"),
    ],
)
def test_damaged_files(folder: Path, name: str, damage: Callable[[bytes], bytes], expected: str) -> None:
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    message = message_of(folder)
    assert expected in message and str(path) in message


def test_hidden_files_are_left_out(folder: Path) -> None:
    (folder / "._text-F32.gguf").write_bytes(b"\0\5\x16\7")  # macOS writes one next to each file on foreign disks
    shutil.copy(folder / "text-F32.gguf", folder / ".text-Q4.gguf")  # an unfinished download
    for path in (folder, folder / "text-F32.gguf"):
        with ModelFiles.open(path) as files:
            assert files.text.path.name == "text-F32.gguf" and files.vision is not None


def test_an_importance_matrix_and_a_vocabulary_are_no_text_models(folder: Path) -> None:
    for name, architecture, kind in (("imatrix.gguf", "", "imatrix"), ("vocab.gguf", "granite", "")):
        writer = gguf.GGUFWriter(folder / name, architecture)
        if kind:
            writer.add_type(kind)
            writer.add_tensor("blk.0.ffn_up.weight.in_sum2", np.ones((1, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with ModelFiles.open(folder) as files:
        assert files.text.path.name == "text-F32.gguf"
    assert "is a GGUF file without a model (an importance matrix" in message_of(folder / "vocab.gguf")


def test_a_broken_file_of_somebody_else_beside_a_whole_model_does_not_matter(folder: Path) -> None:
    (folder / "other.gguf").write_bytes(b"nonsense")
    for path in (folder, folder / "text-F32.gguf"):
        with granite4v.load(path, device="cpu") as model:
            assert model.has_vision
            assert [f"is ignored: '{folder / 'other.gguf'}' is not a GGUF file" in line for line in model.warnings] == [
                True
            ]


def test_a_model_with_a_separate_adapter_does_not_run_without_it_when_that_is_damaged(folder: Path) -> None:
    path = folder / "text-F32.gguf"
    copy_gguf(path, folder / "copy.gguf", change={"granite4v.adapter": "separate"}).replace(path)
    (folder / "lora-F32.gguf").write_bytes(b"GGUF" + bytes(50))
    for given in (folder, path):
        assert "lora-F32.gguf' is GGUF version 0" in message_of(given)


def test_a_vision_file_with_names_that_are_not_utf8_beside_a_text_file_does_not_matter(folder: Path) -> None:
    data = (folder / "mmproj-F32.gguf").read_bytes()
    (folder / "other.gguf").write_bytes(data.replace(b"granite4v.pair_id", b"granite4v.pair\xff\xff\xff", 1))
    ModelFiles.open(folder / "text-F32.gguf").close()


WRONG_VALUES = [
    ("text", "granite.embedding_length", "wide", "an integer from 1 to"),
    ("text", "granite.embedding_length", 0, "an integer from 1 to"),
    ("text", "granite.context_length", 1.5, "an integer from 1 to"),
    ("text", "granite.deepstack_mapping", "x", "a list of 1 to 512 integers"),
    ("text", "granite.deepstack_mapping", [0.5], "a list of 1 to 512 integers"),
    ("mmproj", "clip.vision.patch_size", 0, "an integer from 1 to"),
    ("mmproj", "clip.vision.patch_size", [16], "an integer from 1 to"),
    ("mmproj", "clip.vision.embedding_length", 1 << 30, "an integer from 1 to"),
    ("mmproj", "clip.vision.attention.layer_norm_epsilon", math.nan, "a number from 0 to 1"),
    ("mmproj", "clip.vision.attention.layer_norm_epsilon", "small", "a number from 0 to 1"),
    ("mmproj", "clip.vision.image_mean", [0.5], "a list of 3 numbers"),
    ("mmproj", "clip.vision.image_std", [0.5, 0.0, 0.5], "a list of 3 numbers"),
    ("mmproj", "clip.vision.image_grid_pinpoints", [0, 48], "integers from 1 to"),
    ("mmproj", "clip.vision.image_grid_pinpoints", [48, 48, 48], "holds 3 numbers, expected pairs"),
    ("mmproj", "clip.vision.image_grid_pinpoints", [48, 48 << 12], "expected multiples of the"),
    ("mmproj", "clip.vision.feature_layer", [99] * 6, "integers from -1 to"),
    ("mmproj", "clip.vision.feature_layer", [1], "lists 1 feature layers, 6 spatial offsets and 6 text layers"),
    ("mmproj", "clip.vision.projector.spatial_offsets", [4] * 6, "integers from -1 to 3"),
    ("mmproj", "clip.vision.projector.window_side", 0, "an integer from 1 to"),
    ("mmproj", "clip.vision.projector.query_side", 1, "expected twice as many patches as queries"),
    ("mmproj", "granite4v.vision.projector.head_count", 7, "expected heads that divide it"),
    ("mmproj", "granite4v.vision.text_layers", [5, 4, 3, 2, 1, 0], "expected each layer once, in ascending order"),
    ("mmproj", "granite4v.vision.rescale_factor", "nan", "a number from"),
    ("mmproj", "granite4v.vision.resample", 9, "an integer from 0 to 5"),
    ("mmproj", "clip.projector_type", 7, "expected text"),
]


@pytest.mark.parametrize(("part", "key", "value", "expected"), WRONG_VALUES)
def test_a_value_that_no_model_can_have_is_named(folder: Path, part: str, key: str, value: Any, expected: str) -> None:
    path = folder / f"{part}-F32.gguf"
    copy_gguf(path, folder / "copy.gguf", change={key: value}, retype=True).replace(path)
    message = message_of(folder)
    assert str(path) in message and expected in message, message


def test_a_broken_file_of_somebody_else_beside_a_text_file_does_not_matter(folder: Path) -> None:
    (folder / "other.gguf").write_bytes(b"nonsense")
    ModelFiles.open(folder / "text-F32.gguf").close()


def test_a_file_that_llama_cpp_refuses_is_explained_in_its_words(folder: Path) -> None:
    path = folder / "text-F32.gguf"
    copy_gguf(path, folder / "copy.gguf", change={"granite.feed_forward_length": 99}).replace(path)
    with granite4v.load(folder, device="cpu") as model, pytest.raises(ModelFileError) as caught:
        model.logits("x")
    assert f"llama.cpp cannot load '{path}': error loading model: " in str(caught.value)
    assert "tensor 'blk.0.ffn_gate.weight' has wrong shape" in str(caught.value)


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda", "device 'cuda' is not available"), ("tpu", "unknown device")]
)
def test_a_missing_device_is_said_at_once(make_model: Callable[..., Path], device: str, expected: str) -> None:
    from granite4v.ggml.backend import find_device

    try:
        find_device(device)
    except DeviceError:
        with pytest.raises(DeviceError, match=expected):
            granite4v.load(make_model(TINY), device=device)
    else:
        pytest.skip(f"this machine has a '{device}' device")
