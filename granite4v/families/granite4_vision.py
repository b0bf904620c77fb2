"""Granite 4 Vision: SigLIP2 tower, eight window Q-Formers, one stream of embeddings per decoder layer.

Formats: transformers 5.23 `models/granite4_vision`, and llama.cpp's `conversion/granite.py` and
`tools/mtmd/clip.cpp` as shipped with llama-cpp-python 0.3.36. Conventions are resolved here: hidden
state 0 is the embedding output, streams are sorted by decoder layer, a decoder layer named twice
keeps the last projector (as in transformers), and projectors for a decoder layer outside the model
are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError, ModelFileError
from granite4v.families.anyres import tiling_from_gguf, tiling_from_hf, tiling_metadata
from granite4v.families.base import (
    ACTIVATIONS,
    Shapes,
    Stream,
    TowerConfig,
    VisionConfig,
    WindowQFormerConfig,
)
from granite4v.families.fields import hidden_state_index, short
from granite4v.families.hf_fields import MAX_LAYERS, MAX_PIXELS, MAX_WIDTH, Fields, Json, shown
from granite4v.families.text import text_section
from granite4v.families.text_config import n_text_layers
from granite4v.families.towers import (
    CLIP,
    SIGLIP,
    check_strategy,
    tower_from_gguf,
    tower_from_hf,
    tower_kind,
    tower_metadata,
)
from granite4v.ggml.metadata import AGAIN, GgufMetadata

QFORMER_HEAD_DIM = 64  # transformers' Granite4VisionConfig sets num_attention_heads to hidden_size // 64
N_SPATIAL_PROJECTORS = N_CORNERS = 4  # one projector per corner of a 2x2 block
SPATIAL_STRIDE = 2
SPATIAL_TARGET_LAYERS = (12, 15, 18, 21)
DOWNSAMPLE_RATE = re.compile(r"(\d{1,4})/(\d{1,4})")

# Field names in checkpoints from before transformers had the family -> today's names.
OLDER_NAMES = {
    "vision_layer_to_llm_layer": "deepstack_layer_map",
    "use_checkerboard_sampling": "use_spatial_sampling",
    "checkerboard_stride": "spatial_stride",
    "checkerboard_vision_layer": "spatial_vision_layer",
    "checkerboard_llm_layers": "spatial_target_layers",
}
IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)


class Granite4Vision:
    name = "granite4_vision"
    hf_model_types: tuple[str, ...] = ("granite4_vision",)
    projector_type = "granite4_vision"

    def config_from_hf(self, config: Json, preprocessor: Fields) -> VisionConfig:
        """The configuration from config.json and the image processor's settings; raises CheckpointError."""
        fields, text = Fields(renamed(config)), text_section(config)
        vision = fields.section("vision_config")
        # a fixed-size SigLIP2 is a SigLIP; other kinds of SigLIP2 have patches of another shape
        is_siglip = str(vision.get("model_type", "siglip")).startswith("siglip")
        tower = tower_from_hf(vision, SIGLIP if is_siglip else tower_kind(vision))
        check_strategy(fields, tower)
        return VisionConfig(
            family=self.name,
            tower=tower,
            tiling=tiling_from_hf(fields, preprocessor, tower, IMAGE_MEAN, IMAGE_STD),
            projector=_projector_from_hf(fields, tower),
            streams=_streams_from_hf(fields, tower.num_hidden_layers, n_text_layers(text)),
            text_hidden_size=text.integer("hidden_size", 1, MAX_WIDTH),
            newline=fields.flag("use_image_newline_parameter", True),
        )

    def config_from_gguf(self, metadata: GgufMetadata, shapes: Shapes) -> VisionConfig:
        """The configuration from an mmproj file's metadata; raises ModelFileError.

        Files without our keys do not name decoder layers. Each stream then gets its own index as text_layer; the text
        file's deepstack_mapping gives the real layers.
        """
        kind = CLIP if keys.CLASS_EMBD in shapes else SIGLIP
        tower = tower_from_gguf(metadata, kind, str(dict(kind.defaults)["hidden_act"]))
        most = tower.num_hidden_layers - 1
        features = metadata.integers(keys.FEATURE_LAYER, -1, most, max_length=MAX_LAYERS)
        offsets = metadata.integers(keys.PROJECTOR_SPATIAL_OFFSETS, -1, N_CORNERS - 1, max_length=MAX_LAYERS)
        unnumbered = list(range(len(features)))
        layers = metadata.integers(keys.TEXT_LAYERS, 0, MAX_LAYERS - 1, unnumbered, max_length=MAX_LAYERS)
        if not len(features) == len(offsets) == len(layers):
            raise ModelFileError(
                f"'{metadata.path}' lists {len(features)} feature layers, {len(offsets)} spatial offsets and "
                f"{len(layers)} text layers, expected the same number of each; {AGAIN}."
            )
        if sorted(set(layers)) != layers:
            raise ModelFileError(
                f"'{metadata.path}': '{keys.TEXT_LAYERS}' is {layers}, expected each layer once, in ascending order; "
                f"{AGAIN}."
            )
        return VisionConfig(
            family=self.name,
            tower=tower,
            tiling=tiling_from_gguf(metadata, tower),
            projector=_projector_from_gguf(metadata, tower),
            streams=tuple(
                Stream((feature + 1,), layer, None if offset < 0 else offset)
                for feature, layer, offset in zip(features, layers, offsets, strict=True)
            ),
            text_hidden_size=metadata.integer(keys.VISION_PROJECTION_DIM, 1, MAX_WIDTH),
            newline=metadata.flag(keys.HAS_NEWLINE, True),
        )

    def gguf_names(self, config: VisionConfig, shapes: Shapes) -> Mapping[str, str]:
        """Every converter gives these tensors the same names."""
        return {}

    def vision_metadata(self, config: VisionConfig) -> dict[str, Any]:
        """The mmproj metadata that `config_from_gguf` reads back."""
        projector = config.projector
        assert isinstance(projector, WindowQFormerConfig)
        return {
            keys.PROJECTOR_TYPE: self.projector_type,
            **tower_metadata(config.tower),
            **tiling_metadata(config.tiling),
            keys.VISION_PROJECTION_DIM: config.text_hidden_size,
            keys.PROJECTOR_QUERY_SIDE: projector.query_side,
            keys.PROJECTOR_WINDOW_SIDE: projector.window_side,
            keys.PROJECTOR_HEAD_COUNT: projector.num_attention_heads,
            keys.PROJECTOR_LAYER_NORM_EPS: projector.layer_norm_eps,
            keys.PROJECTOR_HIDDEN_ACT: projector.hidden_act,
            keys.FEATURE_LAYER: [stream.hidden_states[0] - 1 for stream in config.streams],
            keys.PROJECTOR_SPATIAL_OFFSETS: [
                -1 if stream.spatial_offset is None else stream.spatial_offset for stream in config.streams
            ],
            keys.TEXT_LAYERS: [stream.text_layer for stream in config.streams],
            **({} if config.newline else {keys.HAS_NEWLINE: False}),
        }

    def text_metadata(self, config: VisionConfig, n_text_layers: int) -> dict[str, Any]:
        """`deepstack_mapping`: for each decoder layer the slot of the stream added before it, -1 for none.

        Slot 0 of the embedding row is the input of layer 0 and does not appear in the mapping. A model without a
        stream at layer 0 keeps that slot, filled with zeros, so its streams are numbered from 1. With 6 decoder layers,
        streams at layers 0, 2, 4 give [-1, -1, 1, -1, 2, -1]; streams at layers 2 and 4 give the same.
        """
        mapping = [-1] * n_text_layers
        first = 0 if config.streams[0].text_layer == 0 else 1
        for slot, stream in enumerate(config.streams, start=first):
            if slot > 0:
                mapping[stream.text_layer] = slot
        return {keys.DEEPSTACK_MAPPING: mapping}

    def reference_streams(self, output: Any) -> dict[int, Any]:
        """The streams that transformers' `get_image_features` returned for one image, including those for layers
        outside the model."""
        return {layer: packed[0] for layer, packed in output.deepstack_features}

    def reference_logits_divisor(self, config: Json) -> float:
        """1: transformers itself divides by `logits_scaling`."""
        return 1.0


def renamed(config: Json) -> Json:
    """Renames the fields of a config.json to today's names. Raises CheckpointError if both names have different values.

    transformers reads only today's names; vLLM reads both.
    """
    fields, today = Fields(config), dict(config)
    for old, new in OLDER_NAMES.items():
        if old not in fields:
            continue
        if new in fields and fields.get(new) != fields.get(old):
            raise CheckpointError(
                f"'{fields.file}' has '{new}' {shown(fields.get(new))} and, under its older name, '{old}' "
                f"{shown(fields.get(old))}; remove the one that is wrong."
            )
        today[new] = fields.get(old)
    return today


def _projector_from_hf(config: Fields, tower: TowerConfig) -> WindowQFormerConfig:
    if tower.hidden_size % QFORMER_HEAD_DIM:
        raise CheckpointError(
            f"vision_config has hidden_size {tower.hidden_size}; it must be a multiple of {QFORMER_HEAD_DIM} (the "
            "projector's head size)."
        )
    rate = config.text("downsample_rate")
    match = DOWNSAMPLE_RATE.fullmatch(rate)
    if match is None:
        raise config.error("downsample_rate", "query and window sides such as '4/8'")
    query_side, window_side = int(match[1]), int(match[2])
    if not query_side or not window_side or tower.grid_side % window_side:
        raise CheckpointError(
            f"config.json has downsample_rate {rate!r}; its window must divide the {tower.grid_side} patches of a side."
        )
    if window_side != 2 * query_side:
        raise CheckpointError(
            f"config.json has downsample_rate {rate!r}; the spatial projectors take one patch of every 2x2 "
            "block, so the window must be twice the query side."
        )
    qformer = config.section("qformer_config", {})
    if qformer.integer("num_hidden_layers", 1, MAX_LAYERS, 1) != 1:
        raise qformer.error("num_hidden_layers", "1, the layers of a granite4_vision projector")
    return WindowQFormerConfig(
        query_side=query_side,
        window_side=window_side,
        num_attention_heads=tower.hidden_size // QFORMER_HEAD_DIM,
        layer_norm_eps=qformer.number("layer_norm_eps", 0, 1, 1e-12),
        hidden_act=qformer.text("hidden_act", "gelu", ACTIVATIONS),
    )


def _projector_from_gguf(metadata: GgufMetadata, tower: TowerConfig) -> WindowQFormerConfig:
    query_side = metadata.integer(keys.PROJECTOR_QUERY_SIDE, 1, tower.grid_side)
    window_side = metadata.integer(keys.PROJECTOR_WINDOW_SIDE, 1, tower.grid_side)
    if window_side != 2 * query_side or tower.grid_side % window_side:
        raise ModelFileError(
            f"'{metadata.path}' has projector windows of {window_side} patches a side for {query_side} queries a side, "
            f"expected twice as many patches as queries, in windows that divide the {tower.grid_side} patches of a "
            f"tile's side; {AGAIN}."
        )
    default = max(tower.hidden_size // QFORMER_HEAD_DIM, 1)
    heads = metadata.integer(keys.PROJECTOR_HEAD_COUNT, 1, tower.hidden_size, default)
    if tower.hidden_size % heads:
        raise ModelFileError(
            f"'{metadata.path}' has projectors with {heads} heads for a width of {tower.hidden_size}, expected heads "
            f"that divide it ('{keys.PROJECTOR_HEAD_COUNT}'); {AGAIN}."
        )
    return WindowQFormerConfig(
        query_side=query_side,
        window_side=window_side,
        num_attention_heads=heads,
        layer_norm_eps=short(metadata.number(keys.PROJECTOR_LAYER_NORM_EPS, 0, 1, 1e-12)),
        hidden_act=metadata.text(keys.PROJECTOR_HIDDEN_ACT, "gelu", ACTIVATIONS),
    )


def layer_map(config: Fields) -> list[tuple[int, int]]:
    """`deepstack_layer_map`: (vision hidden state, decoder layer) of each layerwise projector."""
    return config.pairs("deepstack_layer_map", -MAX_LAYERS, MAX_LAYERS, (), most=MAX_LAYERS)


def has_spatial(config: Fields) -> bool:
    """Whether the model has spatial projectors; transformers supports no model without them."""
    if not config.flag("use_spatial_sampling", True):
        return False
    if config.integer("spatial_stride", 1, MAX_PIXELS, SPATIAL_STRIDE) != SPATIAL_STRIDE:
        raise config.error("spatial_stride", f"{SPATIAL_STRIDE}: a projector for each corner of a 2x2 block")
    return True


def _streams_from_hf(config: Fields, n_vision_layers: int, n_text_layers: int) -> tuple[Stream, ...]:
    """The streams of all projectors, sorted by decoder layer; see the module docstring for the conventions."""

    def hidden_state(index: int) -> tuple[int, ...]:
        return (hidden_state_index(index, n_vision_layers),)

    by_layer: dict[int, Stream] = {}
    for i, (vision_layer, text_layer) in enumerate(layer_map(config)):
        by_layer[text_layer] = Stream(hidden_state(vision_layer), text_layer, None, f"layerwise_projectors.{i}")
    if has_spatial(config):
        spatial = hidden_state(config.integer("spatial_vision_layer", -MAX_LAYERS, MAX_LAYERS, -1))
        targets = config.integers(
            "spatial_target_layers", -MAX_LAYERS, MAX_LAYERS, SPATIAL_TARGET_LAYERS, most=N_SPATIAL_PROJECTORS
        )
        for i, text_layer in enumerate(targets):
            by_layer[text_layer] = Stream(spatial, text_layer, i, f"spatial_projectors.{i}")
    streams = tuple(by_layer[layer] for layer in sorted(by_layer) if 0 <= layer < n_text_layers)
    if not streams:
        raise CheckpointError(
            f"config.json adds image features before decoder layers {sorted(by_layer)}, but the text model "
            f"has {n_text_layers} layers."
        )
    return streams
