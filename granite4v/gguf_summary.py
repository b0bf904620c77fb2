"""Summarizes a GGUF file as plain data, for display and for programs. Reads headers only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import ModelFileError
from granite4v.families.base import (
    CanvasConfig,
    CrossAttentionConfig,
    TiledTowerConfig,
    Tiling,
    VisionConfig,
    WindowQFormerConfig,
)
from granite4v.families.registry import read_vision
from granite4v.ggml.gguf_file import GgufFile, TensorInfo
from granite4v.gguf_role import role

_MAX_SHOWN = 512  # longest list that is shown: one value per layer of the deepest models
_TEXT_SIZES = {
    "layers": keys.BLOCK_COUNT,
    "width": keys.EMBEDDING_LENGTH,
    "heads": keys.HEAD_COUNT,
    "kv_heads": keys.HEAD_COUNT_KV,
    "context": keys.CONTEXT_LENGTH,
}
_PROVENANCE = {
    "source": keys.PROVENANCE_SOURCE,
    "revision": keys.PROVENANCE_REVISION,
    "granite4v": keys.PROVENANCE_VERSION,
    "policy": keys.PROVENANCE_POLICY,
    "requantized from": keys.REQUANTIZED_FROM,
    "requantized from type": keys.REQUANTIZED_FROM_TYPE,
    "adapter": keys.PROVENANCE_ADAPTER,
    "adapter source": keys.PROVENANCE_ADAPTER_SOURCE,
    "pair": keys.PAIR_ID,
}


def summarize(path: Path | str) -> dict[str, Any]:
    """Returns architecture, sizes, tensor types, tokenizer, streams and provenance of one GGUF file.

    Every value is JSON-ready; values that the file lacks are left out or None. `kind` is 'text', 'vision', 'adapter' or
    'other'. Raises ModelFileError for an invalid or incomplete GGUF file.
    """
    with GgufFile.open(path) as file:
        architecture, kind = file.get(keys.GENERAL_ARCHITECTURE), role(file)
        summary: dict[str, Any] = {
            "path": str(path),
            "kind": kind,
            "architecture": _shown(architecture),
            "name": _shown(file.get(keys.GENERAL_NAME)),
            "bytes": Path(path).stat().st_size,
            "parameters": sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        }
        if kind == "text":
            summary |= _text(file, str(architecture))
        elif kind == "vision":
            summary |= _vision(file)
        elif kind == "adapter":
            summary |= _adapter(file)
        summary["provenance"] = {label: _shown(file[key]) for label, key in _PROVENANCE.items() if key in file}
        summary["tensor_types"] = tensor_types(file.tensors)
        return summary


def tensor_types(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, int]]:
    """Returns {type name: {'tensors': count, 'bytes': size}}, the type with the most bytes first."""
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors.values():
        entry = types.setdefault(tensor.type_name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))


def _shown(value: Any) -> Any:
    """Makes a metadata value of any type JSON-ready: NaN and infinities become text, a long list its length."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list) and len(value) > _MAX_SHOWN:
        return f"{len(value):,} values"
    return [_shown(item) for item in value] if isinstance(value, list) else value


def _text(file: GgufFile, architecture: str) -> dict[str, Any]:
    sizes = {label: _shown(file.get(keys.text_key(key, architecture))) for label, key in _TEXT_SIZES.items()}
    mapping = file.get(keys.text_key(keys.DEEPSTACK_MAPPING, architecture))
    injected = None
    if isinstance(mapping, list):
        injected = [layer for layer, slot in enumerate(mapping) if isinstance(slot, int) and slot >= 0]
    return {
        "text": sizes,
        "injected_layers": injected,  # in addition to layer 0, whose stream is the input embedding itself
        "tokenizer": {
            "model": _shown(file.get(keys.TOKENIZER_MODEL)),
            "split": _shown(file.get(keys.TOKENIZER_PRE)),
            "tokens": file.n_texts(keys.TOKENS) or None,
            "tokenizer.json": keys.TOKENIZER_HF_JSON in file,
        },
        "chat_template": keys.CHAT_TEMPLATE in file,
    }


def _vision(file: GgufFile) -> dict[str, Any]:
    try:
        family, config = read_vision(file)
    except ModelFileError as error:  # other families' files and other programs' files are still worth showing
        return {"family": None, "note": str(error)}
    layers_known = keys.TEXT_LAYERS in file or len(config.streams) == 1  # a single stream is the input embedding
    tower, tiling, cross = config.tower, config.tiling, config.cross_attention
    if cross is not None:
        return {"family": family.name, **_cross(config, cross)}
    seeded = isinstance(config.projector, WindowQFormerConfig)  # queries start from a corner or the mean of each block
    return {
        "family": family.name,
        "vision": {
            "layers": tower.num_hidden_layers,
            "width": tower.hidden_size,
            "heads": tower.num_attention_heads,
            "tile": f"{tiling.tile_px} px",
            "patch": f"{tower.patch_size} px",
            **_grids(tiling),
            "tokens a tile": config.tokens_per_tile,
            **_limits(tiling),
            "projector": config.projector.label,
        },
        "streams": [
            {
                "hidden_states": list(stream.hidden_states),
                "text_layer": stream.text_layer if layers_known else None,
                **({"spatial_offset": stream.spatial_offset} if seeded else {}),
            }
            for stream in config.streams
        ],
    }


def _grids(tiling: Tiling) -> dict[str, Any]:
    if isinstance(tiling, CanvasConfig):
        return {"tiles": max(math.prod(canvas) for canvas in tiling.supported_aspect_ratios), "overview": "last"}
    return {"grids": len(tiling.image_grid_pinpoints)}


def _limits(tiling: Tiling) -> dict[str, Any]:
    """The optional features of a tiling: a token limit per image, square tiles for several images, video."""
    if isinstance(tiling, CanvasConfig):
        return {}
    found = {
        "tokens of at most": None if tiling.max_tiles_of_tokens is None else f"{tiling.max_tiles_of_tokens} tiles",
        "several images": "one square tile each" if tiling.square_if_several else None,
        "videos": None if tiling.video_pooling is None else f"one tile a frame, tokens 1:{tiling.video_pooling**2}",
    }
    return {name: value for name, value in found.items() if value is not None}


def _cross(config: VisionConfig, cross: CrossAttentionConfig) -> dict[str, Any]:
    """The image side of a model whose decoder attends to images."""
    tower = config.tower
    assert isinstance(tower, TiledTowerConfig)
    return {
        "vision": {
            "layers": tower.num_hidden_layers,
            "global layers": tower.num_global_layers,
            "width": tower.hidden_size,
            "heads": tower.num_attention_heads,
            "tile": f"{tower.image_size} px",
            "tiles": tower.max_num_tiles,
            "patch": f"{tower.patch_size} px",
            "intermediate states": ", ".join(map(str, tower.intermediate_states)),
            "projector": config.projector.label,
        },
        "cross_attention": {
            "layers": ", ".join(map(str, cross.layers)),
            "heads": cross.num_attention_heads,
            "kv_heads": cross.num_key_value_heads,
        },
        "sequences": "one at a time",
    }


def _adapter(file: GgufFile) -> dict[str, Any]:
    ranks = {tensor.shape[0] for name, tensor in file.tensors.items() if name.endswith(keys.LORA_A.format(name=""))}
    return {
        "adapter": {
            "type": _shown(file.get(keys.ADAPTER_TYPE)),
            "alpha": _shown(file.get(keys.ADAPTER_LORA_ALPHA)),
            "ranks": ", ".join(map(str, sorted(ranks))),
        }
    }
