"""Mllama (Llama 3.2 Vision): a tower that attends over all tiles, and decoder layers that cross-attend to its output.

Formats: transformers 5.24 `models/mllama`, and Meta's `llama-models` (`models/llama3/multimodal`), whose rules the
weights were trained with. Conventions are resolved here: `intermediate_layers_indices` names layers BEFORE which states
are taken (transformers from 4.46 on takes them after), so the indices are hidden states, 0 = input of the first local
layer; aspect ratios are (height, width) in tiles; rows before the first image get no cross-attention.

The text file is the decoder without its cross-attention layers, which is how the model computes text without images.
The cross-attention layers are in the vision file, under their indices among all decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError, ModelFileError
from granite4v.families.anyres import MAX_TILES, pixel_scaling, scaling_from_gguf, scaling_metadata
from granite4v.families.base import (
    ACTIVATIONS,
    CanvasConfig,
    CrossAttentionConfig,
    LinearConfig,
    Shapes,
    TiledTowerConfig,
    VisionConfig,
)
from granite4v.families.fields import short
from granite4v.families.hf_fields import MAX_HEADS, MAX_LAYERS, MAX_PIXELS, MAX_WIDTH, Fields, Json
from granite4v.families.text import cross_attention_layers, text_section
from granite4v.families.text_config import n_text_layers
from granite4v.families.towers import check_channels, sizes_from_gguf, sizes_metadata
from granite4v.ggml.metadata import AGAIN, GgufMetadata

RULE = "original"
HALVES = (0.5, 0.5, 0.5)
NORM_EPS = 1e-5
INTERMEDIATE_LAYERS = (3, 7, 15, 23, 30)


class Mllama:
    name = "mllama"
    hf_model_types: tuple[str, ...] = ("mllama",)
    projector_type = "mllama"

    def config_from_hf(self, config: Json, preprocessor: Fields) -> VisionConfig:
        """The configuration from config.json and the image processor's settings; raises CheckpointError."""
        text = text_section(config)
        tower = _tower(Fields(config).section("vision_config"))
        cross = _cross(text)
        return VisionConfig(
            family=self.name,
            tower=tower,
            tiling=_canvas(preprocessor, tower),
            projector=LinearConfig(),
            streams=(),
            text_hidden_size=cross.hidden_size,
            newline=False,
            cross_attention=cross,
        )

    def config_from_gguf(self, metadata: GgufMetadata, shapes: Shapes) -> VisionConfig:
        """The configuration from an mmproj file's metadata and tensor shapes; raises ModelFileError."""
        tower = _tower_from_gguf(metadata)
        metadata.text(keys.CROSS_RULE, RULE, (RULE,))
        width = metadata.integer(keys.VISION_PROJECTION_DIM, 1, MAX_WIDTH)
        heads = metadata.integer(keys.CROSS_HEAD_COUNT, 1, MAX_HEADS)
        layers = metadata.integers(keys.CROSS_LAYERS, 0, MAX_LAYERS - 1, max_length=MAX_LAYERS)
        n_kv = metadata.integer(keys.CROSS_HEAD_COUNT_KV, 1, heads)
        if not layers or layers != sorted(set(layers)) or heads % n_kv:
            raise ModelFileError(
                f"'{metadata.path}' has cross-attention in layers {layers} with {heads} heads and {n_kv} of keys; "
                f"expected ascending layers, and a multiple of the heads of keys; {AGAIN}."
            )
        return VisionConfig(
            family=self.name,
            tower=tower,
            tiling=CanvasConfig(
                tile_px=tower.image_size,
                supported_aspect_ratios=tower.supported_aspect_ratios,
                **scaling_from_gguf(metadata, "bilinear"),
            ),
            projector=LinearConfig(),
            streams=(),
            text_hidden_size=width,
            newline=False,
            cross_attention=CrossAttentionConfig(
                layers=tuple(layers),
                hidden_size=width,
                intermediate_size=metadata.integer(keys.CROSS_FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
                num_attention_heads=heads,
                num_key_value_heads=n_kv,
                head_dim=metadata.integer(keys.CROSS_KEY_LENGTH, 1, MAX_WIDTH),
                rms_norm_eps=short(metadata.number(keys.CROSS_RMS_EPS, 0, 1)),
            ),
        )

    def gguf_names(self, config: VisionConfig, shapes: Shapes) -> Mapping[str, str]:
        """Empty: no other converter writes such files."""
        return {}

    def vision_metadata(self, config: VisionConfig) -> dict[str, Any]:
        """The mmproj metadata that `config_from_gguf` reads back."""
        tower, canvas, cross = config.tower, config.tiling, config.cross_attention
        assert isinstance(tower, TiledTowerConfig) and isinstance(canvas, CanvasConfig) and cross is not None
        return {
            keys.PROJECTOR_TYPE: self.projector_type,
            **sizes_metadata(tower),
            keys.GLOBAL_BLOCK_COUNT: tower.num_global_layers,
            keys.HIDDEN_ACT: tower.hidden_act,
            keys.MAX_TILES: tower.max_num_tiles,
            keys.ASPECT_RATIOS: [side for ratio in tower.supported_aspect_ratios for side in ratio],
            keys.INTERMEDIATE_STATES: list(tower.intermediate_states),
            **scaling_metadata(canvas),
            keys.VISION_PROJECTION_DIM: config.text_hidden_size,
            keys.CROSS_LAYERS: list(cross.layers),
            keys.CROSS_FEED_FORWARD_LENGTH: cross.intermediate_size,
            keys.CROSS_HEAD_COUNT: cross.num_attention_heads,
            keys.CROSS_HEAD_COUNT_KV: cross.num_key_value_heads,
            keys.CROSS_KEY_LENGTH: cross.head_dim,
            keys.CROSS_RMS_EPS: cross.rms_norm_eps,
            keys.CROSS_RULE: RULE,
        }

    def text_metadata(self, config: VisionConfig, n_text_layers: int) -> dict[str, Any]:
        """Empty: the text file is a plain llama."""
        return {}

    def reference_streams(self, output: Any) -> dict[int, Any]:
        """Empty: images reach the decoder by cross-attention."""
        return {}

    def reference_logits_divisor(self, config: Json) -> float:
        return 1.0


def _tower(vision: Fields) -> TiledTowerConfig:
    """Reads the tower of a vision_config, with transformers' defaults. Raises CheckpointError."""
    check_channels(vision)
    eps = vision.number("norm_eps", 0, 1, NORM_EPS)
    if eps != NORM_EPS:
        raise vision.error("norm_eps", f"{NORM_EPS:g}, which the norms before and after the layers have")
    heads = "attention_heads" if "attention_heads" in vision else "num_attention_heads"
    most = vision.integer("max_num_tiles", 1, MAX_TILES, 4)
    n_layers = vision.integer("num_hidden_layers", 1, MAX_LAYERS, 32)
    tower = TiledTowerConfig(
        hidden_size=vision.integer("hidden_size", 1, MAX_WIDTH, 1280),
        intermediate_size=vision.integer("intermediate_size", 1, MAX_WIDTH, 5120),
        num_hidden_layers=n_layers,
        num_global_layers=vision.integer("num_global_layers", 0, MAX_LAYERS, 8),
        num_attention_heads=vision.integer(heads, 1, MAX_HEADS, 16),
        image_size=vision.integer("image_size", 1, MAX_PIXELS, 448),
        patch_size=vision.integer("patch_size", 1, MAX_PIXELS, 14),
        hidden_act=vision.text("hidden_act", "gelu", ACTIVATIONS),
        layer_norm_eps=eps,
        max_num_tiles=most,
        supported_aspect_ratios=tuple(
            vision.pairs("supported_aspect_ratios", 1, most, aspect_ratios(most), most=MAX_TILES**2)
        ),
        intermediate_states=tuple(vision.integers("intermediate_layers_indices", 0, n_layers - 1, INTERMEDIATE_LAYERS)),
    )
    problem = _problem(tower)
    if problem:
        raise CheckpointError(f"vision_config has {problem}.")
    if vision.integer("vision_output_dim", 1, MAX_WIDTH * MAX_LAYERS, tower.output_size) != tower.output_size:
        raise vision.error("vision_output_dim", f"{tower.output_size}, the width times one more than the states taken")
    return tower


def aspect_ratios(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Lists (height, width) of every canvas of at most `max_tiles` tiles, in the order of their ids."""
    sides = range(1, max_tiles + 1)
    return tuple((h, w) for h in sides for w in sides if h * w <= max_tiles)


def _cross(text: Fields) -> CrossAttentionConfig:
    hidden = text.integer("hidden_size", 1, MAX_WIDTH)
    heads = text.integer("num_attention_heads", 1, MAX_HEADS)
    if hidden % heads:
        raise text.error("num_attention_heads", f"a divisor of the width, {hidden}")
    if text.integer("head_dim", 2, MAX_WIDTH, hidden // heads) != hidden // heads:
        raise text.error("head_dim", f"{hidden // heads}, which layers of cross-attention have")
    assert cross_attention_layers(text)[-1] < n_text_layers(text)
    return CrossAttentionConfig(
        layers=cross_attention_layers(text),
        hidden_size=hidden,
        intermediate_size=text.integer("intermediate_size", 1, MAX_WIDTH),
        num_attention_heads=heads,
        num_key_value_heads=text.integer("num_key_value_heads", 1, MAX_HEADS, heads),
        head_dim=hidden // heads,
        rms_norm_eps=text.number("rms_norm_eps", 0, 1, 1e-5),
    )


def _canvas(preprocessor: Fields, tower: TiledTowerConfig) -> CanvasConfig:
    """Reads the canvases of a checkpoint. Raises CheckpointError if those of processor and tower differ."""
    size = preprocessor.section("size", {"height": tower.image_size, "width": tower.image_size})
    if any(size.integer(side, 1, MAX_PIXELS) != tower.image_size for side in ("height", "width")):
        raise preprocessor.error("size", f"height and width {tower.image_size}, which the tower takes")
    most = preprocessor.integer("max_image_tiles", 1, MAX_TILES, tower.max_num_tiles)
    if aspect_ratios(most) != tower.supported_aspect_ratios:
        raise preprocessor.error(
            "max_image_tiles", "a number whose aspect ratios are vision_config's 'supported_aspect_ratios'"
        )
    return CanvasConfig(
        tile_px=tower.image_size,
        supported_aspect_ratios=tower.supported_aspect_ratios,
        **pixel_scaling(preprocessor, HALVES, HALVES, "bilinear"),
    )


def _tower_from_gguf(metadata: GgufMetadata) -> TiledTowerConfig:
    most = metadata.integer(keys.MAX_TILES, 1, MAX_TILES)
    sizes = sizes_from_gguf(metadata)
    flat = metadata.integers(keys.ASPECT_RATIOS, 1, most, max_length=2 * MAX_TILES**2)
    tower = TiledTowerConfig(
        **sizes,
        num_global_layers=metadata.integer(keys.GLOBAL_BLOCK_COUNT, 0, MAX_LAYERS),
        hidden_act=metadata.text(keys.HIDDEN_ACT, "gelu", ACTIVATIONS),
        layer_norm_eps=short(metadata.number(keys.VISION_LAYER_NORM_EPS, 0, 1)),
        max_num_tiles=most,
        supported_aspect_ratios=tuple(zip(flat[::2], flat[1::2], strict=False)),
        intermediate_states=tuple(
            metadata.integers(keys.INTERMEDIATE_STATES, 0, sizes["num_hidden_layers"], max_length=MAX_LAYERS)
        ),
    )
    problem = _problem(tower) or ("aspect ratios that are no pairs" if len(flat) % 2 else "")
    if problem:
        raise ModelFileError(f"'{metadata.path}' has {problem}; {AGAIN}.")
    return tower


def _problem(tower: TiledTowerConfig) -> str:
    """Describes the first setting that cannot be computed; empty if there is none."""
    if tower.hidden_size % tower.num_attention_heads:
        return f"a width of {tower.hidden_size} with {tower.num_attention_heads} heads; it must be a multiple of them"
    if tower.grid_side < 1:
        return f"patches of {tower.patch_size} px in a tile of {tower.image_size} px; a tile must hold at least one"
    states = tower.intermediate_states
    if list(states) != sorted(set(states)):
        return f"intermediate states {list(states)}; they must be different and ascending"
    ratios = tower.supported_aspect_ratios
    if not ratios or any(h * w > tower.max_num_tiles for h, w in ratios):
        return f"aspect ratios {[list(ratio) for ratio in ratios]}; each must have 1 to {tower.max_num_tiles} tiles"
    return ""
