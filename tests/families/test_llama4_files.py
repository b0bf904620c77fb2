"""Llama 4's files: what config.json says is in the vision file, and what no such model can be is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from granite4v.errors import CheckpointError
from granite4v.families.base import CanvasConfig, PixelShuffleMlpConfig, VisionConfig
from granite4v.families.hf_fields import Fields
from granite4v.families.llama4 import Llama4, canvases
from tests.toy.checkpoint import PRESETS, CheckpointSpec, model_tensors

SPEC, SCOUT = PRESETS["tiny-llama4"], PRESETS["tiny-llama4-scout"]


def configuration(folder: Path, section: str = "", **changes: Any) -> VisionConfig:
    config, preprocessor = (
        json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")
    )
    {"": config, "preprocessor": preprocessor}.get(section, config.get(section)).update(changes)
    return Llama4().config_from_hf(config, Fields(preprocessor, "preprocessor_config.json"))


@pytest.mark.parametrize("spec", [SPEC, SCOUT], ids=["today's names", "published names"])
def test_the_tiny_checkpoint_is_what_transformers_loads(
    spec: CheckpointSpec, make_checkpoint: Callable[..., Path]
) -> None:
    from transformers import Llama4ForConditionalGeneration

    folder = make_checkpoint(spec)
    model, loading = Llama4ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    n_vocab = model.config.text_config.vocab_size
    assert {tensor.name: tensor.shape for tensor in model_tensors(spec, n_vocab)} == expected


@pytest.mark.parametrize("spec", [SPEC, SCOUT], ids=["today's names", "published names"])
def test_facts_of_config_json(spec: CheckpointSpec, make_checkpoint: Callable[..., Path]) -> None:
    config = configuration(make_checkpoint(spec))
    tower, canvas = config.tower, config.tiling
    assert (tower.hidden_size, tower.num_hidden_layers, tower.head_dim, tower.rope_theta) == (64, 3, 16, 10000.0)
    assert (tower.class_token, tower.class_token_last, tower.n_positions) == (True, True, 17)
    assert (tower.pre_norm, tower.post_norm, tower.patch_bias, tower.hidden_act) == (True, True, False, "gelu")
    assert isinstance(canvas, CanvasConfig) and canvas.overview and canvas.low_precision
    assert (canvas.tile_px, canvas.resample, canvas.image_mean) == (56, 2, (0.5, 0.5, 0.5))
    assert config.projector == PixelShuffleMlpConfig(block_side=2, width=96)
    assert (config.tokens_per_tile, config.text_hidden_size) == (4, 64)
    assert config.streams[0].hidden_states == (3,) and config.streams[0].text_layer == 0
    assert config.frame is not None and config.frame.patch == "<|patch|>"


def test_the_published_facts(make_checkpoint: Callable[..., Path]) -> None:
    """Scout's and Maverick's vision_config: 144 tokens a tile."""
    folder = make_checkpoint(SPEC)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {
        "hidden_size": 1408,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_hidden_layers": 34,
        "image_size": 336,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "vision_output_dim": 4096,
    }
    found = Llama4().config_from_hf(config, Fields({}))
    assert (found.tokens_per_tile, found.tower.head_dim, found.tower.n_positions) == (144, 88, 577)
    assert len(found.tiling.supported_aspect_ratios) == sum(16 // h for h in range(1, 17))


def test_canvases_are_in_the_order_of_the_reference() -> None:
    """`find_supported_resolutions`: its docstring's example, and every canvas once."""
    assert canvases(4) == ((1, 4), (2, 2), (1, 1), (4, 1), (1, 3), (3, 1), (1, 2), (2, 1))
    assert sorted(canvases(16)) == sorted((h, w) for h in range(1, 17) for w in range(1, 17) if h * w <= 16)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision_config", {"intermediate_size": 128}, "expected 256, the width of 2x2 joined patches"),
        ("vision_config", {"num_attention_heads": 3}, "a head must be a multiple of 4"),
        ("vision_config", {"num_attention_heads": 32}, "a head must be a multiple of 4"),
        ("vision_config", {"pixel_shuffle_ratio": 0.4}, "expected 1 divided by an integer"),
        ("vision_config", {"projector_output_dim": 64}, "expected 96, as 'projector_input_dim'"),
        ("vision_config", {"vision_output_dim": 7680}, "expected 96, as 'projector_input_dim'"),
        ("vision_config", {"multi_modal_projector_bias": True}, "expected false; the projector has no biases"),
        ("vision_config", {"rope_parameters": {"rope_type": "linear"}}, "expected 'default', which the tower computes"),
        ("vision_config", {"num_channels": 1}, "the channels of an RGB image"),
        ("preprocessor", {"size": {"height": 336, "width": 336}}, "height and width 56, which the tower takes"),
        ("preprocessor", {"do_normalize": False}, "'do_normalize' is false; expected true"),
        ("preprocessor", {"resize_to_max_canvas": True}, "'resize_to_max_canvas' is true; expected false"),
        ("preprocessor", {"max_patches": 0}, "an integer from 1 to 256"),
    ],
)
def test_what_no_such_model_can_be(
    section: str, change: dict[str, Any], message: str, make_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        configuration(make_checkpoint(SPEC), section, **change)
    assert message in str(caught.value)


def test_blocks_of_patches_must_fill_a_tile(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(replace(SPEC, tile_px=42))
    with pytest.raises(CheckpointError, match="must hold whole blocks of 2x2 patches"):
        configuration(folder)


def test_the_rescale_factor_is_exact(make_checkpoint: Callable[..., Path]) -> None:
    config = configuration(make_checkpoint(SPEC))
    written = Llama4().vision_metadata(config)
    assert math.isclose(float(written["granite4v.vision.rescale_factor"]), 1 / 255, rel_tol=0)
