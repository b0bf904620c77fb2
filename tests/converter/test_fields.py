"""Fields of config.json and of the image processor's settings: wrong types, absurd sizes, older spellings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granite4v.converter import Options, convert, plan_conversion
from tests.helpers.damaged import edit, refusal
from tests.toy.checkpoint import PRESETS, CheckpointSpec

F32 = Options("F32", "F32")


@pytest.fixture
def source(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_checkpoint(PRESETS["tiny"]), tmp_path / "source")


@pytest.fixture
def llava(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_checkpoint(PRESETS["tiny-granite-3.3"]), tmp_path / "llava")


# --- config.json ---

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


@pytest.mark.parametrize("value", ["abc", 1.5, True, 0, -1, 10**30, [4], {"a": 1}, float("nan"), float("inf")])
def test_integers_of_other_types_or_sizes(value: Any, source: Path) -> None:
    found = repr(value) if isinstance(value, str) else json.dumps(value)
    original = (source / "config.json").read_bytes()
    for field, most in INTEGERS.items():
        (source / "config.json").write_bytes(original)
        edit(source / "config.json", put_field(field, value))
        assert refusal(source) == f"'config.json': '{field}' is {found}; expected an integer from 1 to {most}."


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


# --- the image processor ---


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
    from transformers import AutoImageProcessor

    from granite4v.clip_projector import VisionEncoder
    from granite4v.clip_projector.pixels import normalize
    from granite4v.clip_projector.tiles_anyres import cut
    from tests.helpers.pictures import noise_picture

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
