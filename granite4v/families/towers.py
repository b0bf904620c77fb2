"""Reads and writes vision towers in config.json and GGUF: SigLIP and CLIP, which differ in four ways.

CLIP has a class token, a LayerNorm before its layers, no bias in patch embedding, and other defaults. The defaults are
those of transformers 5.23's `models/siglip` and `models/clip` (a test compares them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError, ModelFileError
from granite4v.families.base import ACTIVATIONS, TiledTowerConfig, TowerConfig
from granite4v.families.fields import short
from granite4v.families.hf_fields import MAX_HEADS, MAX_LAYERS, MAX_PIXELS, MAX_WIDTH, Fields
from granite4v.ggml.metadata import AGAIN, GgufMetadata

N_CHANNELS = 3


@dataclass(frozen=True)
class TowerKind:
    """One kind of tower. `defaults`: values of the fields that its vision_config may leave out."""

    hf_model_type: str
    class_token: bool
    pre_norm: bool
    patch_bias: bool
    defaults: tuple[tuple[str, Any], ...]


SIGLIP = TowerKind(
    "siglip_vision_model",
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    defaults=(
        ("hidden_size", 768),
        ("intermediate_size", 3072),
        ("num_hidden_layers", 12),
        ("num_attention_heads", 12),
        ("image_size", 224),
        ("patch_size", 16),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("layer_norm_eps", 1e-6),
    ),
)
CLIP = TowerKind(
    "clip_vision_model",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    defaults=(
        ("hidden_size", 768),
        ("intermediate_size", 3072),
        ("num_hidden_layers", 12),
        ("num_attention_heads", 12),
        ("image_size", 224),
        ("patch_size", 32),
        ("hidden_act", "quick_gelu"),
        ("layer_norm_eps", 1e-5),
    ),
)
KINDS = (SIGLIP, CLIP)


def tower_kind(vision: Fields) -> TowerKind:
    """The kind that a vision_config names; raises CheckpointError for an unknown kind."""
    model_type = vision.get("model_type")
    for kind in KINDS:
        if kind.hf_model_type == model_type:
            return kind
    known = ", ".join(repr(kind.hf_model_type) for kind in KINDS)
    raise CheckpointError(f"vision_config has model_type {model_type!r}; the towers that convert are {known}.")


def tower_from_hf(vision: Fields, kind: TowerKind) -> TowerConfig:
    """Reads the tower of a vision_config, with defaults filled in. Raises CheckpointError."""
    default = dict(kind.defaults)

    def size(key: str, high: int) -> int:
        return vision.integer(key, 1, high, default[key])

    check_channels(vision)
    tower = TowerConfig(
        hidden_size=size("hidden_size", MAX_WIDTH),
        intermediate_size=size("intermediate_size", MAX_WIDTH),
        num_hidden_layers=size("num_hidden_layers", MAX_LAYERS),
        num_attention_heads=size("num_attention_heads", MAX_HEADS),
        image_size=size("image_size", MAX_PIXELS),
        patch_size=size("patch_size", MAX_PIXELS),
        hidden_act=vision.text("hidden_act", default["hidden_act"], ACTIVATIONS),
        layer_norm_eps=vision.number("layer_norm_eps", 0, 1, default["layer_norm_eps"]),
        class_token=kind.class_token,
        pre_norm=kind.pre_norm,
        patch_bias=kind.patch_bias,
    )
    problem = _problem(tower)
    if problem:
        raise CheckpointError(f"vision_config has {problem}.")
    return tower


def check_channels(vision: Fields) -> None:
    """Raises CheckpointError unless the tower takes RGB images."""
    if vision.integer("num_channels", 1, MAX_WIDTH, N_CHANNELS) != N_CHANNELS:
        raise vision.error("num_channels", f"{N_CHANNELS}, the channels of an RGB image")


def check_strategy(config: Fields, tower: TowerConfig) -> None:
    """Raises CheckpointError unless `vision_feature_select_strategy` keeps exactly the patches.

    `default` drops the first position, `full` keeps all; only the patches fit the grid that is unpadded.
    """
    strategy = config.text("vision_feature_select_strategy", "default", ("default", "full"))
    if tower.class_token and strategy == "full":
        raise CheckpointError(
            "config.json has vision_feature_select_strategy 'full' and a tower with a class token, which has no place "
            "in the grid of patches (transformers fails on it too); such a tower needs 'default'."
        )
    if not tower.class_token and strategy == "default":
        raise CheckpointError(
            "config.json has vision_feature_select_strategy 'default', which drops the first position, and a tower "
            "without a class token, whose first position is a patch that the grid needs (transformers fails on it "
            "too); such a tower needs 'full'."
        )


def tower_from_gguf(metadata: GgufMetadata, kind: TowerKind, hidden_act: str) -> TowerConfig:
    """Reads the tower of a vision file. `hidden_act`: the activation of files without our key. Raises
    ModelFileError."""
    tower = TowerConfig(
        **sizes_from_gguf(metadata),
        hidden_act=metadata.text(keys.HIDDEN_ACT, hidden_act, ACTIVATIONS),
        layer_norm_eps=short(metadata.number(keys.VISION_LAYER_NORM_EPS, 0, 1)),
        class_token=kind.class_token,
        pre_norm=kind.pre_norm,
        patch_bias=kind.patch_bias,
    )
    problem = _problem(tower)
    if problem:
        raise ModelFileError(f"'{metadata.path}' has {problem}; {AGAIN}.")
    return tower


def sizes_from_gguf(metadata: GgufMetadata) -> dict[str, Any]:
    """Reads the fields that all tower configurations share from a vision file. Raises ModelFileError."""
    return {
        "hidden_size": metadata.integer(keys.VISION_EMBEDDING_LENGTH, 1, MAX_WIDTH),
        "intermediate_size": metadata.integer(keys.VISION_FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
        "num_hidden_layers": metadata.integer(keys.VISION_BLOCK_COUNT, 1, MAX_LAYERS),
        "num_attention_heads": metadata.integer(keys.VISION_HEAD_COUNT, 1, MAX_HEADS),
        "image_size": metadata.integer(keys.IMAGE_SIZE, 1, MAX_PIXELS),
        "patch_size": metadata.integer(keys.PATCH_SIZE, 1, MAX_PIXELS),
    }


def sizes_metadata(tower: TowerConfig | TiledTowerConfig) -> dict[str, Any]:
    """The metadata that `sizes_from_gguf` reads back, plus what llama.cpp reads for every tower."""
    return {
        keys.HAS_VISION_ENCODER: True,
        keys.IMAGE_SIZE: tower.image_size,
        keys.PATCH_SIZE: tower.patch_size,
        keys.VISION_EMBEDDING_LENGTH: tower.hidden_size,
        keys.VISION_FEED_FORWARD_LENGTH: tower.intermediate_size,
        keys.VISION_BLOCK_COUNT: tower.num_hidden_layers,
        keys.VISION_HEAD_COUNT: tower.num_attention_heads,
        keys.VISION_LAYER_NORM_EPS: tower.layer_norm_eps,
    }


def tower_metadata(tower: TowerConfig) -> dict[str, Any]:
    """The metadata that `tower_from_gguf` reads back, plus libmtmd's flag for the activation."""
    return {
        **sizes_metadata(tower),
        keys.USE_GELU: tower.hidden_act != "quick_gelu",  # libmtmd computes quick gelu without the flag
        keys.HIDDEN_ACT: tower.hidden_act,
    }


def _problem(tower: TowerConfig) -> str:
    """Describes the first setting that cannot be computed; empty if there is none."""
    if tower.hidden_size <= 0 or tower.num_attention_heads <= 0 or tower.hidden_size % tower.num_attention_heads:
        return f"a width of {tower.hidden_size} with {tower.num_attention_heads} heads; it must be a multiple of them"
    if tower.patch_size <= 0 or tower.grid_side <= 0:
        return f"patches of {tower.patch_size} px in a tile of {tower.image_size} px; a tile must hold at least one"
    return ""
