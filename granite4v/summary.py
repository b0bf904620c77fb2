"""What a GGUF file holds, as plain data for people and programs to read. Reads headers only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import ModelFileError
from granite4v.families import read_vision
from granite4v.families.base import WindowQFormerConfig
from granite4v.ggml.gguf_file import GgufFile, TensorInfo

_TEXT_SIZES = {
    "layers": "{arch}.block_count",
    "width": "{arch}.embedding_length",
    "heads": "{arch}.attention.head_count",
    "kv_heads": "{arch}.attention.head_count_kv",
    "context": "{arch}.context_length",
}
_PROVENANCE = {
    "source": keys.PROVENANCE_SOURCE,
    "revision": keys.PROVENANCE_REVISION,
    "granite4v": keys.PROVENANCE_VERSION,
    "policy": keys.PROVENANCE_POLICY,
    "adapter": keys.PROVENANCE_ADAPTER,
    "adapter source": keys.PROVENANCE_ADAPTER_SOURCE,
    "pair": keys.PAIR_ID,
}


def summarize(path: Path | str) -> dict[str, Any]:
    """Architecture, sizes, tensor types, tokenizer, streams and provenance of one GGUF file.

    Every value is JSON-ready; what the file does not say is left out or None. Raises ModelFileError for a file that
    is not a whole GGUF.
    """
    with GgufFile.open(path) as file:
        architecture = file.get(keys.GENERAL_ARCHITECTURE)
        kind = _kind(file)
        summary: dict[str, Any] = {
            "path": str(path),
            "kind": kind,
            "architecture": architecture,
            "name": file.get(keys.GENERAL_NAME),
            "bytes": Path(path).stat().st_size,
            "parameters": sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        }
        if kind == "text":
            summary |= _text(file, str(architecture))
        elif kind == "vision":
            summary |= _vision(file)
        elif kind == "adapter":
            summary |= _adapter(file)
        summary["provenance"] = {label: file[key] for label, key in _PROVENANCE.items() if key in file}
        summary["tensor_types"] = tensor_types(file.tensors)
        return summary


def tensor_types(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, int]]:
    """{type name: {'tensors': count, 'bytes': size}}, the largest share first."""
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors.values():
        entry = types.setdefault(tensor.type_name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))


def _kind(file: GgufFile) -> str:
    if file.get(keys.GENERAL_TYPE) == keys.TYPE_ADAPTER:
        return "adapter"
    return "vision" if file.get(keys.GENERAL_ARCHITECTURE) == keys.ARCH_CLIP else "text"


def _text(file: GgufFile, architecture: str) -> dict[str, Any]:
    sizes = {label: file.get(key.format(arch=architecture)) for label, key in _TEXT_SIZES.items()}
    mapping = file.get(keys.DEEPSTACK_MAPPING.format(arch=architecture))
    injected = None if mapping is None else [layer for layer, slot in enumerate(mapping) if slot >= 0]
    return {
        "text": sizes,
        "injected_layers": injected,  # besides layer 0, whose stream is the input embedding itself
        "tokenizer": {
            "model": file.get("tokenizer.ggml.model"),
            "split": file.get("tokenizer.ggml.pre"),
            "tokens": len(file["tokenizer.ggml.tokens"]) if "tokenizer.ggml.tokens" in file else None,
            "tokenizer.json": keys.TOKENIZER_HF_JSON in file,
        },
        "chat_template": keys.CHAT_TEMPLATE in file,
    }


def _vision(file: GgufFile) -> dict[str, Any]:
    try:
        family, config = read_vision(file)
    except ModelFileError as error:  # still worth showing: other families' files, files of other programs
        return {"family": None, "note": str(error)}
    layers_known = keys.TEXT_LAYERS in file or len(config.streams) == 1  # a single stream is the input itself
    tower = config.tower
    seeded = isinstance(config.projector, WindowQFormerConfig)  # by a corner of each block, or by its mean
    return {
        "family": family.name,
        "vision": {
            "layers": tower.num_hidden_layers,
            "width": tower.hidden_size,
            "heads": tower.num_attention_heads,
            "tile": f"{config.tiling.tile_px} px",
            "patch": f"{tower.patch_size} px",
            "grids": len(config.tiling.image_grid_pinpoints),
            "tokens a tile": config.tokens_per_tile,
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


def _adapter(file: GgufFile) -> dict[str, Any]:
    ranks = {tensor.shape[0] for name, tensor in file.tensors.items() if name.endswith(".lora_a")}
    return {
        "adapter": {
            "type": file.get(keys.ADAPTER_TYPE),
            "alpha": file.get(keys.ADAPTER_LORA_ALPHA),
            "ranks": ", ".join(map(str, sorted(ranks))),
        }
    }
