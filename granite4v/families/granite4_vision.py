"""Granite 4 Vision: SigLIP2 tower, eight window Q-Formers, one stream of embeddings a decoder layer.

Formats: transformers 5.23 `models/granite4_vision`, and llama.cpp's `conversion/granite.py` and
`tools/mtmd/clip.cpp` as shipped with llama-cpp-python 0.3.36. Conventions are resolved here: hidden
states count from 0 = embedding output, streams are sorted by decoder layer, a decoder layer named twice
keeps the last projector (as transformers does), a decoder layer outside the model gets none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError, ModelFileError
from granite4v.families.base import (
    Metadata,
    Stream,
    TilingConfig,
    TowerConfig,
    VisionConfig,
    WindowQFormerConfig,
)

if TYPE_CHECKING:
    from granite4v.families.tensor_rules import TensorGroup

QFORMER_HEAD_DIM = 64  # transformers' Granite4VisionConfig sets num_attention_heads to hidden_size // 64
N_SPATIAL_PROJECTORS = 4


class Granite4Vision:
    name = "granite4_vision"
    hf_model_types: tuple[str, ...] = ("granite4_vision",)
    projector_type = "granite4_vision"

    def config_from_hf(self, config: Metadata, preprocessor: Metadata) -> VisionConfig:
        """The configuration from config.json and preprocessor_config.json; raises CheckpointError."""
        vision, text = _section(config, "vision_config"), _section(config, "text_config")
        tower = _tower_from_hf(vision)
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "full":
            raise CheckpointError(
                f"config.json has vision_feature_select_strategy {strategy!r}; a tower without a class token "
                "needs 'full'."
            )
        projector = _projector_from_hf(config, tower)
        n_text_layers = _number(text, "num_hidden_layers", "text_config")
        return VisionConfig(
            family=self.name,
            tower=tower,
            tiling=_tiling_from_hf(config, preprocessor, tower),
            projector=projector,
            streams=_streams_from_hf(config, tower.num_hidden_layers, n_text_layers),
            text_hidden_size=_number(text, "hidden_size", "text_config"),
        )

    def config_from_gguf(self, metadata: Metadata) -> VisionConfig:
        """The configuration from an mmproj file's metadata; raises ModelFileError.

        Files without our keys say nothing about decoder layers: their streams get text_layer = the index
        of the stream, and the text file's deepstack_mapping gives the layers.
        """

        def need(key: str) -> Any:
            if key not in metadata:
                raise ModelFileError(f"the vision file has no key '{key}'; convert it again with 'granite4v convert'.")
            return metadata[key]

        hidden_size = int(need(keys.VISION_EMBEDDING_LENGTH))
        tower = TowerConfig(
            hidden_size=hidden_size,
            intermediate_size=int(need(keys.VISION_FEED_FORWARD_LENGTH)),
            num_hidden_layers=int(need(keys.VISION_BLOCK_COUNT)),
            num_attention_heads=int(need(keys.VISION_HEAD_COUNT)),
            image_size=int(need(keys.IMAGE_SIZE)),
            patch_size=int(need(keys.PATCH_SIZE)),
            hidden_act=str(metadata.get(keys.HIDDEN_ACT, "gelu_pytorch_tanh")),
            layer_norm_eps=_short(need(keys.VISION_LAYER_NORM_EPS)),
        )
        flat = [int(value) for value in need(keys.IMAGE_GRID_PINPOINTS)]
        features = [int(value) for value in need(keys.FEATURE_LAYER)]
        offsets = [int(value) for value in need(keys.PROJECTOR_SPATIAL_OFFSETS)]
        layers = [int(value) for value in metadata.get(keys.TEXT_LAYERS, range(len(features)))]
        if not len(features) == len(offsets) == len(layers):
            raise ModelFileError(
                f"the vision file lists {len(features)} feature layers, {len(offsets)} spatial offsets and "
                f"{len(layers)} text layers; the three must have the same length."
            )
        return VisionConfig(
            family=self.name,
            tower=tower,
            tiling=TilingConfig(
                tile_px=int(metadata.get(keys.PREPROC_IMAGE_SIZE, tower.image_size)),
                image_grid_pinpoints=tuple((h, w) for w, h in zip(flat[::2], flat[1::2], strict=True)),
                image_mean=tuple(_short(value) for value in need(keys.IMAGE_MEAN)),
                image_std=tuple(_short(value) for value in need(keys.IMAGE_STD)),
                rescale_factor=float(metadata.get(keys.RESCALE_FACTOR, 1 / 255)),
                resample=int(metadata.get(keys.RESAMPLE, 3)),
            ),
            projector=WindowQFormerConfig(
                query_side=int(need(keys.PROJECTOR_QUERY_SIDE)),
                window_side=int(need(keys.PROJECTOR_WINDOW_SIDE)),
                num_attention_heads=int(metadata.get(keys.PROJECTOR_HEAD_COUNT, hidden_size // QFORMER_HEAD_DIM)),
                layer_norm_eps=_short(metadata.get(keys.PROJECTOR_LAYER_NORM_EPS, 1e-12)),
                hidden_act=str(metadata.get(keys.PROJECTOR_HIDDEN_ACT, "gelu")),
            ),
            streams=tuple(
                Stream(feature + 1, layer, None if offset < 0 else offset)
                for feature, layer, offset in zip(features, layers, offsets, strict=True)
            ),
            text_hidden_size=int(need(keys.VISION_PROJECTION_DIM)),
        )

    def vision_metadata(self, config: VisionConfig) -> dict[str, Any]:
        """The mmproj metadata that `config_from_gguf` reads back."""
        tower, tiling, projector = config.tower, config.tiling, config.projector
        return {
            keys.PROJECTOR_TYPE: self.projector_type,
            keys.HAS_VISION_ENCODER: True,
            keys.USE_GELU: True,
            keys.IMAGE_SIZE: tower.image_size,
            keys.PREPROC_IMAGE_SIZE: tiling.tile_px,
            keys.PATCH_SIZE: tower.patch_size,
            keys.VISION_EMBEDDING_LENGTH: tower.hidden_size,
            keys.VISION_FEED_FORWARD_LENGTH: tower.intermediate_size,
            keys.VISION_BLOCK_COUNT: tower.num_hidden_layers,
            keys.VISION_PROJECTION_DIM: config.text_hidden_size,
            keys.VISION_HEAD_COUNT: tower.num_attention_heads,
            keys.VISION_LAYER_NORM_EPS: tower.layer_norm_eps,
            keys.HIDDEN_ACT: tower.hidden_act,
            keys.IMAGE_MEAN: list(tiling.image_mean),
            keys.IMAGE_STD: list(tiling.image_std),
            keys.RESCALE_FACTOR: repr(tiling.rescale_factor),  # as text: float32 would move pixels by a last bit
            keys.RESAMPLE: tiling.resample,
            keys.IMAGE_GRID_PINPOINTS: [px for h, w in tiling.image_grid_pinpoints for px in (w, h)],
            keys.PROJECTOR_QUERY_SIDE: projector.query_side,
            keys.PROJECTOR_WINDOW_SIDE: projector.window_side,
            keys.PROJECTOR_HEAD_COUNT: projector.num_attention_heads,
            keys.PROJECTOR_LAYER_NORM_EPS: projector.layer_norm_eps,
            keys.PROJECTOR_HIDDEN_ACT: projector.hidden_act,
            keys.FEATURE_LAYER: [stream.hidden_state - 1 for stream in config.streams],
            keys.PROJECTOR_SPATIAL_OFFSETS: [
                -1 if stream.spatial_offset is None else stream.spatial_offset for stream in config.streams
            ],
            keys.TEXT_LAYERS: [stream.text_layer for stream in config.streams],
        }

    def text_metadata(self, config: VisionConfig, n_text_layers: int) -> dict[str, Any]:
        """`deepstack_mapping`: for each decoder layer the stream added before it, -1 for none.

        Slot 0 of the embedding row is the input of layer 0 and is named nowhere. A model that adds
        nothing there keeps that slot, filled with zeros, so its streams are numbered from 1.
        """
        mapping = [-1] * n_text_layers
        first = 0 if config.streams[0].text_layer == 0 else 1
        for slot, stream in enumerate(config.streams, start=first):
            if slot > 0:
                mapping[stream.text_layer] = slot
        return {keys.DEEPSTACK_MAPPING.removeprefix("{arch}."): mapping}

    def vision_tensors(self, config: VisionConfig, hf_config: Metadata) -> tuple[TensorGroup, ...]:
        """The table of the mmproj file's tensors, for a checkpoint with this config.json."""
        from granite4v.families.granite4_vision_tensors import granite4_vision_tensors

        return granite4_vision_tensors(config, hf_config)


def _section(config: Metadata, name: str) -> Metadata:
    section = config.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"config.json has no '{name}' section; granite4_vision checkpoints have one.")
    return section


def _number(section: Metadata, key: str, where: str) -> int:
    value = section.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{where} has '{key}' = {value!r}; expected a positive integer.")
    return value


def _short(value: Any) -> float:
    """A float32 read from GGUF as the decimal number that was written (1e-06, not 9.99999997e-07)."""
    import numpy as np

    return float(str(np.float32(value)))


def _tower_from_hf(vision: Metadata) -> TowerConfig:
    tower = TowerConfig(
        hidden_size=_number(vision, "hidden_size", "vision_config"),
        intermediate_size=_number(vision, "intermediate_size", "vision_config"),
        num_hidden_layers=_number(vision, "num_hidden_layers", "vision_config"),
        num_attention_heads=_number(vision, "num_attention_heads", "vision_config"),
        image_size=_number(vision, "image_size", "vision_config"),
        patch_size=_number(vision, "patch_size", "vision_config"),
        hidden_act=str(vision.get("hidden_act", "gelu_pytorch_tanh")),
        layer_norm_eps=float(vision.get("layer_norm_eps", 1e-6)),
    )
    if tower.hidden_size % tower.num_attention_heads or tower.hidden_size % QFORMER_HEAD_DIM:
        raise CheckpointError(
            f"vision_config has hidden_size {tower.hidden_size} with {tower.num_attention_heads} heads; it must "
            f"be a multiple of the heads and of {QFORMER_HEAD_DIM} (the projector's head size)."
        )
    return tower


def _projector_from_hf(config: Metadata, tower: TowerConfig) -> WindowQFormerConfig:
    rate = config.get("downsample_rate")
    try:
        query_side, window_side = (int(part) for part in str(rate).split("/"))
    except ValueError:
        raise CheckpointError(
            f"config.json has downsample_rate {rate!r}; expected query/window sides such as '4/8'."
        ) from None
    if query_side <= 0 or window_side <= 0 or tower.grid_side % window_side:
        raise CheckpointError(
            f"config.json has downsample_rate {rate!r}; its window must divide the {tower.grid_side} patches of a side."
        )
    if window_side != 2 * query_side:
        raise CheckpointError(
            f"config.json has downsample_rate {rate!r}; the spatial projectors take one patch of every 2x2 "
            "block, so the window must be twice the query side."
        )
    qformer = config.get("qformer_config") or {}
    layers = qformer.get("num_hidden_layers", 1)
    if layers != 1:
        raise CheckpointError(f"qformer_config has {layers} layers; granite4_vision projectors have one.")
    return WindowQFormerConfig(
        query_side=query_side,
        window_side=window_side,
        num_attention_heads=tower.hidden_size // QFORMER_HEAD_DIM,
        layer_norm_eps=float(qformer.get("layer_norm_eps", 1e-12)),
        hidden_act=str(qformer.get("hidden_act", "gelu")),
    )


def _tiling_from_hf(config: Metadata, preprocessor: Metadata, tower: TowerConfig) -> TilingConfig:
    size = preprocessor.get("size") or {}
    tile_px = size.get("height") or size.get("shortest_edge") or tower.image_size
    if tile_px != tower.image_size or size.get("width", tile_px) != tile_px:
        raise CheckpointError(
            f"preprocessor_config.json makes tiles of size {size!r}, but the tower takes "
            f"{tower.image_size}x{tower.image_size}."
        )
    pinpoints = config.get("image_grid_pinpoints")
    if not pinpoints:
        raise CheckpointError("config.json has no 'image_grid_pinpoints'; expected (height, width) pairs.")
    if preprocessor.get("image_grid_pinpoints", pinpoints) != pinpoints:
        raise CheckpointError(
            "'image_grid_pinpoints' differ between config.json and preprocessor_config.json; they must agree."
        )
    if any(side % tile_px for pair in pinpoints for side in pair):
        raise CheckpointError(f"'image_grid_pinpoints' {pinpoints} are not all multiples of the {tile_px} px tile.")
    return TilingConfig(
        tile_px=tile_px,
        image_grid_pinpoints=tuple((int(h), int(w)) for h, w in pinpoints),
        image_mean=tuple(float(value) for value in preprocessor.get("image_mean", (0.5, 0.5, 0.5))),
        image_std=tuple(float(value) for value in preprocessor.get("image_std", (0.5, 0.5, 0.5))),
        rescale_factor=float(preprocessor.get("rescale_factor", 1 / 255)),
        resample=int(preprocessor.get("resample", 3)),
    )


def _streams_from_hf(config: Metadata, n_vision_layers: int, n_text_layers: int) -> tuple[Stream, ...]:
    def hidden_state(index: int) -> int:
        resolved = index + n_vision_layers + 1 if index < 0 else index
        if not 0 <= resolved <= n_vision_layers:
            raise CheckpointError(
                f"config.json takes vision hidden state {index}; the tower has {n_vision_layers + 1} of them."
            )
        return resolved

    by_layer: dict[int, Stream] = {}
    for i, (vision_layer, text_layer) in enumerate(config.get("deepstack_layer_map") or ()):
        by_layer[text_layer] = Stream(hidden_state(vision_layer), text_layer, None, f"layerwise_projectors.{i}")
    targets = config.get("spatial_target_layers", [12, 15, 18, 21])
    if len(targets) > N_SPATIAL_PROJECTORS:
        raise CheckpointError(
            f"config.json has {len(targets)} spatial_target_layers; at most {N_SPATIAL_PROJECTORS} are possible."
        )
    spatial = hidden_state(config.get("spatial_vision_layer", -1))
    for i, text_layer in enumerate(targets):
        by_layer[text_layer] = Stream(spatial, text_layer, i, f"spatial_projectors.{i}")
    streams = tuple(by_layer[layer] for layer in sorted(by_layer) if 0 <= layer < n_text_layers)
    if not streams:
        raise CheckpointError(
            f"config.json adds image features before decoder layers {sorted(by_layer)}, but the text model "
            f"has {n_text_layers} layers."
        )
    return streams
