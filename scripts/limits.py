"""Computes the least time an image can take: its arithmetic divided by the rate at which ggml multiplies here.

    python -m scripts.limits MODEL_DIR IMAGE

Counts the arithmetic of the tower, the projectors and the decoder's prefill, and measures ggml's matrix product for
each weight type and kernel, in a child process (a kernel may crash). The limit assumes products at that rate and
everything else free. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.clip_projector import load_image
from granite4v.clip_projector.grid_anyres import layout
from granite4v.families.base import MlpConfig, VisionConfig, WindowQFormerConfig
from granite4v.families.registry import read_vision
from granite4v.ggml import autotune
from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import GgufFile, TensorInfo
from scripts.side_by_side import find_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    print(json.dumps(limits(*find_files(options.model, options.mmproj), options.image, options.threads)))


def limits(text: Path, mmproj: Path, image: Path, n_threads: int) -> dict[str, Any]:
    """Returns GFLOP, GFLOP/s by type and kernel, and the least seconds of image encoding and image prefill."""
    with GgufFile.open(mmproj) as vision_file, GgufFile.open(text) as text_file:
        config = read_vision(vision_file)[1]
        where = layout(load_image(image).size, config.tiling, config.tokens_side)
        vision_type, text_type = main_type(vision_file.tensors), main_type(text_file.tensors)
        up = vision_file.tensors.get(keys.PROJ.format(p=0, part="ffn_up.weight"))
        qformer_ffn = up.shape[0] if up is not None else 0
        encode = encode_gflop(config, qformer_ffn, where.n_tiles)
        prefill = prefill_gflop(text_file, where.n_tokens)
    backend = Backend("cpu", n_threads)
    known = autotune.rates(backend, sorted({vision_type, text_type}))
    rates = {kind: {name: rate for name, rate in by_kernel.items() if rate} for kind, by_kernel in known.items()}
    fastest = {kind: max(kernels.values()) for kind, kernels in rates.items()}
    return {
        "tiles": where.n_tiles,
        "image_tokens": where.n_tokens,
        "encode_gflop": round(encode, 1),
        "prefill_gflop": round(prefill, 1),
        "gflop_s": {kind: {name: round(rate, 1) for name, rate in kernels.items()} for kind, kernels in rates.items()},
        "encode_limit_s": round(encode / fastest[vision_type], 3),
        "prefill_limit_s": round(prefill / fastest[text_type], 3),
    }


def encode_gflop(config: VisionConfig, qformer_ffn: int, n_tiles: int) -> float:
    """Returns the GFLOP of the tower's and all projectors' products, for `n_tiles` different tiles."""
    tower = config.tower
    n_patches, n, width, ffn = tower.grid_side**2, tower.n_positions, tower.hidden_size, tower.intermediate_size
    last = max(state for stream in config.streams for state in stream.hidden_states)
    layer = 2 * n * (4 * width * width + 2 * width * ffn) + 4 * n * n * width
    patches = 2 * n_patches * width * 3 * tower.patch_size**2
    projectors = sum(_projector_flop(config, len(stream.hidden_states), qformer_ffn) for stream in config.streams)
    return n_tiles * (patches + last * layer + projectors) / 1e9


def _projector_flop(config: VisionConfig, n_states: int, qformer_ffn: int) -> int:
    """Returns the FLOP of one projector's products on one tile."""
    n_patches, width, out = config.tower.grid_side**2, config.tower.hidden_size, config.text_hidden_size
    projector = config.projector
    if isinstance(projector, MlpConfig):
        return 2 * n_patches * (n_states * width * out + out * out)
    assert isinstance(projector, WindowQFormerConfig)
    # keys and values of every patch, everything else for the queries only
    n_queries, n_inside = config.tokens_per_tile, projector.query_side**2
    linear = 2 * 2 * n_patches * width * width + 2 * n_queries * (6 * width * width + width * out)
    return (
        linear + 2 * n_queries * 2 * width * qformer_ffn + 4 * n_queries * width * (n_inside + projector.window_side**2)
    )


def prefill_gflop(file: GgufFile, n_tokens: int) -> float:
    """Returns the GFLOP of every decoder matrix times `n_tokens` rows, and of their attention (causal: half)."""
    matrices = [info for name, info in file.tensors.items() if name.startswith("blk.") and len(info.shape) == 2]
    products = 2 * n_tokens * sum(info.shape[0] * info.shape[1] for info in matrices)
    queries = [info for info in matrices if info.name.endswith("attn_q.weight")]
    attention = sum(2 * n_tokens * n_tokens * info.shape[0] for info in queries)
    return (products + attention) / 1e9


def main_type(tensors: Mapping[str, TensorInfo]) -> str:
    """Returns the type that most of the matrices' bytes have."""
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        if len(info.shape) == 2:
            sizes[info.type_name] += info.nbytes
    return sizes.most_common(1)[0][0]


if __name__ == "__main__":
    main()
