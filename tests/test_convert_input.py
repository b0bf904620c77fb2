"""What people bring instead of a checkpoint: other files in its place, odd fields, quantized weights, old settings."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter
from safetensors.numpy import load_file, save_file
from test_quant import tensor_bytes

from granite4v.converter import Options, convert, plan_conversion
from granite4v.errors import CheckpointError

TINY, LLAVA = PRESETS["tiny"], PRESETS["tiny-granite-3.3"]
F32 = Options("F32", "F32")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 8000\n"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja")


@pytest.fixture
def source(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_checkpoint(TINY), tmp_path / "source")


@pytest.fixture
def llava(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_checkpoint(LLAVA), tmp_path / "llava")


def refusal(folder: Path, **options: Any) -> str:
    """The message for a checkpoint that cannot be planned."""
    with pytest.raises(CheckpointError) as caught:
        plan_conversion(folder, Options(**options))
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = read_raw(path)
    change(header)
    write_raw(path, header, data)


# --- other things in a file's place ---


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "is a Git LFS pointer, not the file itself; run 'git lfs pull'"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page, perhaps an error message of the server"),
        (b"", "is empty; download it again"),
    ],
    ids=["LFS pointer", "web page", "empty"],
)
def test_a_placeholder_is_named(content: bytes, message: str, name: str, source: Path) -> None:
    (source / name).write_bytes(content)
    assert f"'{source / name}' {message}" in refusal(source)


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "link to itself", "link to nothing"])
def test_only_regular_files_are_opened(kind: str, name: str, source: Path) -> None:
    """A pipe would wait for its writer for ever."""
    path = source / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link to itself": name, "link to nothing": "../blobs/4d7a21"}[kind])
    message = refusal(source)
    assert f"'{path}'" in message
    expected = {"link to itself": "symbolic links", "link to nothing": "is a link to '../blobs/4d7a21', which does"}
    assert expected.get(kind, "expected a file") in message


@pytest.mark.parametrize("name", FILES[:4])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "is not valid JSON ("),
        (b"[1, 2]", "holds a list; expected a JSON object"),
        (b"null", "holds null; expected a JSON object"),
        (b'{"a": 1}'.decode().encode("utf-16"), "is UTF-16; expected UTF-8"),
        (b'{"a": "\xff"}', "is not UTF-8 (byte 7)"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "is nested too deeply; expected at most 100 levels"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b'{"a": "\\ud800"}', "holds half of a surrogate pair (\\ud800)"),
    ],
    ids=["cut", "list", "null", "UTF-16", "not UTF-8", "deep", "deeper", "surrogate"],
)
def test_json_that_is_none(content: bytes, message: str, name: str, source: Path) -> None:
    (source / name).write_bytes(content)
    found = refusal(source)
    assert f"'{source / name}' {message}" in found


def test_a_byte_order_mark_is_skipped(source: Path) -> None:
    path = source / "config.json"
    expected = plan_conversion(source).files[0].metadata
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert plan_conversion(source).files[0].metadata == expected


# --- safetensors headers ---


def put(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


NAME = "model.image_newline"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update({NAME: 5}), f"'{NAME}' in 'model.safetensors' has a header entry without dtype, shape or"),
        (lambda h: h.update({NAME: [["dtype", "F32"]]}), "has a header entry without dtype, shape or offsets"),
        (put(NAME, shape=["64"]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, shape=[64.0]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, shape=[True]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, data_offsets=[-256, 0]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, data_offsets=[0, 2**80]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, data_offsets=[256, 0]), "has -256 bytes for F32 [64]"),
        (put(NAME, shape=[2**62, 2**62]), "bytes for F32 [4611686018427387904, 4611686018427387904]"),
        (put(NAME, shape=[2**61, 8], data_offsets=[0, 0]), "has 0 bytes for F32 [2305843009213693952, 8]"),
        (put(NAME, dtype="F33"), f"'{NAME}' in 'model.safetensors' has type F33; expected F32, F16, BF16"),
        (put(NAME, data_offsets=[0, 256]), " lie on the same bytes of 'model.safetensors'"),
        (lambda h: h.update({"\x1b[2J": h[NAME]}), "unknown tensor '\\x1b[2J'"),
    ],
)
def test_header_entries_that_are_wrong(change: Callable[[dict[str, Any]], Any], message: str, source: Path) -> None:
    change_header(source / "model.safetensors", change)
    assert message in refusal(source)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"null", b'"a"', b"5", b"{" * 1000, b"[" * 100_000, b'{"a": ', b"\xff\xfe{\x00"],
    ids=["list", "null", "text", "number", "cut", "deep", "cut entry", "UTF-16"],
)
def test_a_header_that_is_no_object(header: bytes, source: Path) -> None:
    write_raw(source / "model.safetensors", header, b"")
    assert "has a broken safetensors header (not " in refusal(source)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8])
def test_a_header_longer_than_its_file(length: int, source: Path) -> None:
    raw = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", length) + raw[8:])
    assert "its header does not fit in" in refusal(source)


@pytest.mark.parametrize(
    ("file", "shown"),
    [("../other.safetensors", "'../other.safetensors'"), ("/etc/x.safetensors", "'/etc/x.safetensors'"), (7, "7")],
)
def test_an_index_that_points_elsewhere(file: Any, shown: str, source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "other.safetensors")
    index = {"weight_map": {NAME: file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"places tensors in {shown}; expected the name of a .safetensors file beside it" in refusal(source)


# --- buffers and quantized weights ---


@pytest.mark.parametrize(
    ("dtype", "n_bytes"), [("I64", 8), ("I32", 4), ("BOOL", 1), ("F64", 8)], ids=["I64", "I32", "BOOL", "F64"]
)
def test_buffers_that_are_dropped_may_be_of_any_type(dtype: str, n_bytes: int, source: Path) -> None:
    expected = plan_conversion(source)
    header, data = read_raw(source / "model.safetensors")
    names = [
        "model.vision_tower.embeddings.position_ids",
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
    for name in names:
        header[name] = {"dtype": dtype, "shape": [1, 64], "data_offsets": [len(data), len(data) + 64 * n_bytes]}
        data += bytes(64 * n_bytes)
    write_raw(source / "model.safetensors", header, data)
    found = plan_conversion(source)
    assert {name for name, _ in found.dropped} - {name for name, _ in expected.dropped} == set(names)
    assert [t.name for f in found.files for t in f.tensors] == [t.name for f in expected.files for t in f.tensors]


LINEAR = "model.language_model.layers.0.mlp.up_proj.weight"
QUANTIZED: dict[str, tuple[dict[str, Any] | None, dict[str, np.ndarray], str]] = {
    "bitsandbytes 4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {LINEAR: np.zeros((5632, 1), np.uint8), f"{LINEAR}.absmax": np.zeros(176, np.uint8)},
        "bitsandbytes",
    ),
    "bitsandbytes 8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {LINEAR: np.zeros((176, 64), np.int8), LINEAR.replace("weight", "SCB"): np.zeros(176, np.float32)},
        "bitsandbytes",
    ),
    "bitsandbytes, config.json says nothing": (
        None,
        {LINEAR: np.zeros((5632, 1), np.uint8), f"{LINEAR}.quant_state.bitsandbytes__nf4": np.zeros(80, np.uint8)},
        "bitsandbytes",
    ),
    "fp8": ({"quant_method": "fp8"}, {f"{LINEAR}_scale_inv": np.zeros((2, 1), np.float32)}, "FP8"),
    "fp8, config.json says nothing": (None, {f"{LINEAR}_scale_inv": np.zeros((2, 1), np.float32)}, "FP8"),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4},
        {LINEAR.replace("weight", "qweight"): np.zeros((8, 176), np.int32)},
        "GPTQ",
    ),
    "GPTQ, config.json says nothing": (
        None,
        {
            LINEAR.replace("weight", "g_idx"): np.zeros(64, np.int32),
            LINEAR.replace("weight", "qweight"): np.zeros((8, 176), np.int32),
        },
        "GPTQ",
    ),
    "AWQ": ({"quant_method": "awq"}, {LINEAR.replace("weight", "qzeros"): np.zeros((1, 22), np.int32)}, "AWQ"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {f"{LINEAR}_packed": np.zeros((176, 8), np.int32)},
        "compressed-tensors",
    ),
    "MXFP4": (
        {"quant_method": "mxfp4"},
        {LINEAR.replace(".weight", "_blocks"): np.zeros((176, 2, 16), np.uint8)},
        "MXFP4",
    ),
    "torchao": ({"quant_method": "torchao"}, {LINEAR: np.zeros((176, 64), np.int8)}, "torchao"),
    "weights of eight bits, nothing said": (None, {LINEAR: np.zeros((176, 64), np.int8)}, "weights of type I8"),
    "of no method": ({"bits": 4}, {LINEAR: np.zeros((176, 64), np.int8)}, "of an unnamed method"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_checkpoint_is_one_message(case: str, source: Path) -> None:
    config, tensors, method = QUANTIZED[case]
    if config is not None:
        edit(source / "config.json", lambda values: values.update(quantization_config=config))
    weights = load_file(source / "model.safetensors")
    save_file(weights | tensors, source / "model.safetensors")
    message = refusal(source)
    assert message.startswith(f"this checkpoint is quantized ({method}); convert the full-precision one.")
    assert "\n" not in message


def test_full_precision_that_says_it_is_quantized_converts_with_a_warning(source: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(source / "config.json", lambda values: values.update(quantization_config=config))
    assert plan_conversion(source).warnings == (
        "config.json says that the checkpoint is quantized (bitsandbytes), but its weights are full precision; they "
        "are converted as such",
    )


# --- fields of config.json ---

INTEGERS = {
    "text_config.num_hidden_layers": 512,
    "text_config.num_attention_heads": 4096,
    "text_config.hidden_size": 262144,
    "text_config.intermediate_size": 262144,
    "text_config.vocab_size": 16777216,
    "text_config.max_position_embeddings": 2147483647,
    "vision_config.hidden_size": 262144,
    "vision_config.num_hidden_layers": 512,
    "vision_config.num_attention_heads": 4096,
    "vision_config.image_size": 16384,
    "vision_config.patch_size": 16384,
    "vision_config.intermediate_size": 262144,
    "qformer_config.intermediate_size": 262144,
}


def put_field(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *sections, key = path.split(".")
        for section in sections:
            config = config[section]
        config[key] = value

    return change


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", ["abc", 1.5, True, 0, -1, 10**30, [4], {"a": 1}, float("nan"), float("inf")])
def test_integers_of_other_types_or_sizes(field: str, value: Any, source: Path) -> None:
    edit(source / "config.json", put_field(field, value))
    found = repr(value) if isinstance(value, str) else json.dumps(value)
    assert refusal(source) == f"'config.json': '{field}' is {found}; expected an integer from 1 to {INTEGERS[field]}."


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("text_config.rms_norm_eps", "1e-5", "expected a number from 0 to 1"),
        ("text_config.rms_norm_eps", float("nan"), "is NaN; expected a number from 0 to 1"),
        ("text_config.attention_multiplier", [1], "expected a number from 0 to 1e+12"),
        ("text_config.logits_scaling", 0, "expected a positive number up to 1e+12"),
        ("text_config.logits_scaling", 10**400, "is a number of 1329 bits; expected a positive number"),
        ("text_config.rope_parameters", 5, "expected a section (a JSON object)"),
        ("text_config.rope_parameters", {"rope_theta": "x"}, "'text_config.rope_parameters.rope_theta' is 'x'"),
        (
            "text_config.rope_parameters",
            {"rope_type": "linear", "factor": None},
            "'text_config.rope_parameters.factor'",
        ),
        ("text_config.num_key_value_heads", 3, "is 3; expected a divisor of the 4 attention heads"),
        ("text_config.head_dim", 15, "gives heads of 15 values"),
        ("text_config.tie_word_embeddings", "yes", "is 'yes'; expected true or false"),
        ("text_config.attention_bias", 1, "is 1; expected true or false"),
        ("text_config", [], "'text_config' is []; expected a section"),
        ("vision_config", "x", "'vision_config' is 'x'; expected a section"),
        ("vision_config.num_channels", 4, "is 4; expected 3, the channels of an RGB image"),
        ("vision_config.hidden_act", "relu", "expected 'gelu_pytorch_tanh' or 'gelu' or 'quick_gelu'"),
        ("downsample_rate", 2, "'downsample_rate' is 2; expected a string"),
        ("downsample_rate", "2:4", "expected query and window sides such as '4/8'"),
        ("downsample_rate", "0/0", "its window must divide the 8 patches"),
        ("deepstack_layer_map", 5, "'deepstack_layer_map' is 5; expected a list"),
        ("deepstack_layer_map", [[1, 2], [3]], "'deepstack_layer_map[1]' is [3]; expected a pair of integers"),
        ("deepstack_layer_map", [["a", 2]], "'deepstack_layer_map[0]' is [\"a\", 2]; expected a pair"),
        ("deepstack_layer_map", [[99, 2]], "takes vision hidden state 99; the tower has 5"),
        ("spatial_target_layers", [1.5], "'spatial_target_layers[0]' is 1.5; expected an integer"),
        ("spatial_target_layers", [1, 2, 3, 4, 5], "expected a list of at most 4 items"),
        ("spatial_vision_layer", "x", "'spatial_vision_layer' is 'x'; expected an integer"),
        ("use_spatial_sampling", "no", "'use_spatial_sampling' is 'no'; expected true or false"),
        ("image_grid_pinpoints", {"a": 1}, "'image_grid_pinpoints' is {\"a\": 1}; expected a list"),
        ("image_grid_pinpoints", [[64, 0]], "'image_grid_pinpoints[0]' is [64, 0]; expected a pair"),
        ("image_grid_pinpoints", [[64 * 17, 64 * 17]], "'image_grid_pinpoints' differ between config.json and pre"),
        ("image_token_index", 406, "'image_token_index' is 406; expected an integer from 0 to 405"),
        ("image_token_id", 7, "'image_token_id' is 7; expected the same as 'image_token_index', 405"),
        ("qformer_config.num_hidden_layers", 2, "is 2; expected 1, the layers of a granite4_vision projector"),
        ("quantization_config", [1], "'quantization_config' is [1]; expected a section"),
    ],
)
def test_fields_of_other_types_or_sizes(field: str, value: Any, expected: str, source: Path) -> None:
    edit(source / "config.json", put_field(field, value))
    message = refusal(source)
    assert expected in message
    assert "config.json" in message


def test_a_field_that_is_null_counts_as_absent(source: Path) -> None:
    expected = plan_conversion(source)
    for name in ("head_dim", "mlp_bias", "rope_scaling"):
        edit(source / "config.json", put_field(f"text_config.{name}", None))
    assert plan_conversion(source).files[0].tensors == expected.files[0].tensors


# --- settings of the image processor ---


@pytest.mark.parametrize(
    "change",
    [
        {"size": 56, "crop_size": 56},
        {"size": [56, 56], "crop_size": [56, 56]},
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        {"size": {"shortest_edge": 56}, "crop_size": 56},
        {"size": {"height": 56, "width": 56}, "crop_size": None},
        {"resample": "bicubic"},
    ],
    ids=["integers", "lists", "shortest edge", "edge and integer", "no crop", "name of a filter"],
)
def test_older_forms_of_sizes_are_what_they_stand_for(change: dict[str, Any], llava: Path, tmp_path: Path) -> None:
    expected = plan_conversion(llava).files[1].metadata
    edit(llava / "preprocessor_config.json", lambda values: values.update(change))
    assert plan_conversion(llava).files[1].metadata == expected


@pytest.mark.parametrize(
    "change",
    [{"size": 56, "crop_size": 56}, {"do_normalize": False}, {"do_rescale": False}, {"resample": 2}],
    ids=["integer sizes", "not normalized", "not rescaled", "bilinear"],
)
def test_pixels_are_those_of_transformers_processor(change: dict[str, Any], llava: Path, tmp_path: Path) -> None:
    from pictures import noise_picture
    from transformers import AutoImageProcessor

    from granite4v.clip_projector import VisionEncoder
    from granite4v.clip_projector.tiles import cut, normalize

    edit(llava / "preprocessor_config.json", lambda values: values.update(change))
    convert(llava, tmp_path / "out", F32)
    picture = noise_picture((150, 100))
    with VisionEncoder(tmp_path / "out" / "mmproj-F32.gguf") as encoder:
        tiling = encoder.config.tiling
        found = normalize(cut(picture, tiling), tiling).transpose(0, 3, 1, 2)
    processor = AutoImageProcessor.from_pretrained(llava, backend="pil")
    expected = np.asarray(processor(images=picture).pixel_values[0])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "big"}, "'preprocessor_config.json': 'size' is 'big'; expected a side in pixels from 1 to 16384"),
        ({"size": {"longest_edge": 56}}, "'size' is {\"longest_edge\": 56}; expected a side in pixels"),
        ({"size": [1, 2, 3]}, "'size' is [1, 2, 3]; expected a side"),
        ({"size": 48, "crop_size": 48}, "preprocessor_config.json makes tiles of size 48, but the tower takes 56x56"),
        ({"crop_size": 48}, "cropped to 48, but the tower takes 56x56"),
        ({"crop_size": 0}, "'crop_size' is 0; expected a side in pixels"),
        ({"image_mean": [0.5]}, "'image_mean' is [0.5]; expected a list of 3 numbers"),
        ({"image_mean": 0.5}, "'image_mean' is 0.5; expected a list of 3 numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "'image_std' is [0.5, 0, 0.5]; expected a list of 3 numbers from 1e-06"),
        ({"rescale_factor": "1/255"}, "'rescale_factor' is '1/255'; expected a positive number up to 1"),
        ({"resample": "sharp"}, "'resample' is 'sharp'; expected one of Pillow's filters, 0 to 5"),
        ({"resample": 9}, "'resample' is 9; expected one of Pillow's filters"),
        ({"do_normalize": "no"}, "'do_normalize' is 'no'; expected true or false"),
    ],
)
def test_settings_that_no_tile_can_have(change: dict[str, Any], message: str, llava: Path) -> None:
    edit(llava / "preprocessor_config.json", lambda values: values.update(change))
    assert message in refusal(llava)


# --- adapters ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "'adapter_config.json': 'r' is 0; expected an integer from 1 to 262144."),
        ({"r": -4}, "'r' is -4; expected an integer"),
        ({"r": "4"}, "'r' is '4'; expected an integer"),
        ({"lora_alpha": float("nan")}, "'lora_alpha' is NaN; expected a number"),
        ({"lora_alpha": "8"}, "'lora_alpha' is '8'; expected a number"),
        ({"use_rslora": "yes"}, "'use_rslora' is 'yes'; expected true or false"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern' is [\"q_proj\"]; expected a section"),
        ({"rank_pattern": {"q_proj": 0}}, "'rank_pattern.q_proj' is 0; expected an integer from 1"),
        ({"alpha_pattern": {"q_proj": "x"}}, "'alpha_pattern.q_proj' is 'x'; expected a number"),
        ({"rank_pattern": {"(": 4}}, "the pattern '(', which is not a regular expression"),
        ({"rank_pattern": {"(.*x)*y": 4}}, "the pattern '(.*x)*y'; expected the end of a module's name, or a regular"),
        ({"rank_pattern": {".*" * 20 + "z": 4}}, "at most 4 repetitions and no repeated groups"),
        ({"alpha_pattern": {"a?" * 30 + "a" * 30: 4}}, "at most 4 repetitions and no repeated groups"),
        ({"base_model_name_or_path": 7}, "'base_model_name_or_path' is 7; expected a string"),
        ({"base_model_name_or_path": "/no/such/folder"}, "names '/no/such/folder' as its base model, and there is no"),
        ({"base_model_name_or_path": "../gone"}, "names '../gone' as its base model, and there is no such directory"),
        ({"base_model_name_or_path": "x" * 5000}, "as its base model, and there is no such directory; give the base"),
    ],
)
def test_adapters_with_odd_settings(change: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec(base_model_name_or_path=str(source)))
    edit(adapter / "adapter_config.json", lambda values: values.update(change))
    assert message in refusal(adapter)


def test_an_adapter_of_another_type_of_numbers_is_refused(source: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec(base_model_name_or_path=str(source)))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].astype(np.int8)}, adapter / "adapter_model.safetensors")
    assert f"'{name}' in 'adapter_model.safetensors' has type I8; expected F32, F16, BF16" in refusal(adapter)


@pytest.mark.parametrize("spelling", ["as peft saves", "without the prefix", "with the adapter's name"])
def test_an_adapter_that_peft_wrote(spelling: str, source: Path, tmp_path: Path) -> None:
    """Saved by peft itself, merged by peft itself: the three spellings of keys that its versions have written."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    modules = r".*language_model.*\.(q_proj|down_proj)"
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=modules, rank_pattern={"layers.1.self_attn.q_proj": 2})
    wrapped = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    assert all(name.startswith("base_model.model.") for name in tensors)
    rename = {
        "as peft saves": lambda name: name,
        "without the prefix": lambda name: name.removeprefix("base_model.model."),
        "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    }[spelling]
    save_file({rename(name): values for name, values in tensors.items()}, path)
    convert(source, tmp_path / "out", Options("F32", "F32", adapter=str(tmp_path / "adapter")))
    merged = wrapped.merge_and_unload().state_dict()
    found = tensor_bytes(tmp_path / "out" / "text-F32.gguf")
    for i in range(TINY.text_layers):
        expected = merged[f"model.language_model.layers.{i}.mlp.down_proj.weight"].numpy()
        ours = np.frombuffer(found[f"blk.{i}.ffn_down.weight"][1], np.float32).reshape(expected.shape)
        assert np.abs(ours - expected).max() <= 4e-7 * np.abs(expected).max()
    expected = merged["model.language_model.layers.1.self_attn.q_proj.weight"].numpy()
    halves = expected.reshape(TINY.text_heads, 2, TINY.head_dim // 2, -1).swapaxes(1, 2).reshape(expected.shape)
    ours = np.frombuffer(found["blk.1.attn_q.weight"][1], np.float32).reshape(expected.shape)
    assert np.abs(ours - halves).max() <= 4e-7 * np.abs(expected).max()
