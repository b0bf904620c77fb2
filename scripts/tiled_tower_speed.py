"""Measures a tower that attends over all tiles of an image, like Llama 3.2 Vision's, against PyTorch.

    python -m scripts.tiled_tower_speed --layers 4 --global-layers 1 --runs 3

Random weights of the published width, for tiles of 560 px; `--layers 32 --global-layers 8` is the complete depth. Every
run is a separate process, one at a time, and the order alternates from round to round; figures are medians. The time
covers tower and projector for one image of four tiles; for granite4v also cutting the tiles and reading the weights.
`rms` is |ours - reference| / |reference| against PyTorch in float32. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from granite4v.cli.bench import peak_rss_gb
from granite4v.clip_projector.cross_features import STATES, canvas_inputs, fill_states, max_nodes
from granite4v.clip_projector.weights import Weights
from granite4v.ggml import autotune
from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import GgufFile, n_weights
from granite4v.ggml.graph import Graph
from scripts.draw_page import draw_page
from scripts.measuring import in_turn, middle, run_json
from tests.peers.reference import relative_l2
from tests.toy.tiled_tower import TowerSpec, reference_tower, write_tower

PATCH_PX = 14
SIZES = ("threads", "layers", "global_layers", "width", "ffn", "heads", "tile_px", "text_width")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="local layers (4)")
    parser.add_argument("--global-layers", type=int, default=1, help="gated global layers (1)")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--ffn", type=int, default=5120)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tile-px", type=int, default=560)
    parser.add_argument("--text-width", type=int, default=4096, help="of the projector's output (4096)")
    parser.add_argument("--kinds", nargs="+", default=["Q8_0"], help="weight types that granite4v runs (Q8_0)")
    parser.add_argument("--torch", nargs="*", default=["float32", "bfloat16"], help="what PyTorch computes in")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        side, folder = options.one
        run = run_torch if side in ("float32", "bfloat16") else run_ours
        print(json.dumps(run(options, side, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))))


def spec_of(options: argparse.Namespace) -> TowerSpec:
    """Returns the tower's sizes, with five intermediate states like the published tower, or one per layer if fewer."""
    taken = tuple(sorted({round(i * (options.layers - 1) / 4) for i in range(5)}))
    return TowerSpec(
        options.width,
        options.ffn,
        options.layers,
        options.global_layers,
        options.heads,
        options.tile_px,
        PATCH_PX,
        taken,
        options.text_width,
    )


def page(spec: TowerSpec) -> Image:
    """Draws a page of four tiles, two by two."""
    return draw_page().resize((spec.image_px * 2, spec.image_px * 2)).convert("RGB")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    tower, projector = reference_tower(spec_of(options))
    for kind in options.kinds:
        write_tower(folder / f"{kind}.gguf", tower, projector, kind)
    del tower, projector
    command = [sys.executable, "-m", "scripts.tiled_tower_speed"]
    for name in SIZES:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    sides: dict[str, Callable[[], dict[str, Any]]] = {
        side: functools.partial(run_json, [*command, "--one", side, str(folder)])
        for side in (*options.kinds, *options.torch)
    }
    results = in_turn(sides, options.runs)
    rows = {side: {**runs[-1], "encode_s": middle([run["encode_s"] for run in runs])} for side, runs in results.items()}
    for kind in (*options.kinds, "bfloat16"):
        if kind in rows and "float32" in rows:
            error = relative_l2(np.load(folder / f"{kind}.npy"), np.load(folder / "float32.npy"))
            rows[kind]["rms"] = float(f"{error:.3g}")
    ratios = {
        kind: {
            peer: round(rows[kind]["encode_s"]["median"] / rows[peer]["encode_s"]["median"], 4)
            for peer in options.torch
        }
        for kind in options.kinds
    }
    return {"sizes": {name: getattr(options, name) for name in SIZES}, "sides": rows, "ratios": ratios}


def run_ours(options: argparse.Namespace, kind: str, folder: Path) -> dict[str, Any]:
    spec = spec_of(options)
    config, picture = spec.config(), page(spec)
    backend = Backend("cpu", options.threads)
    with GgufFile.open(folder / f"{kind}.gguf") as file:
        matrices = [info for info in file.tensors.values() if len(info.shape) > 1 and info.type_name == kind]
        kernels = autotune.vision_kernels(backend, n_weights(matrices))
        weights = Weights(file, backend, kernels)
    start = time.perf_counter()
    graph = Graph(backend, max_nodes(config))
    where, inputs = canvas_inputs(picture, config, spec.canvas())
    fill_states(graph, weights, config, spec.text_hidden, where.n_tiles)
    states = graph.run(lambda *_: weights.release(), **inputs)[STATES]
    seconds = time.perf_counter() - start
    np.save(folder / f"{kind}.npy", states)
    result = {"encode_s": round(seconds, 4), "peak_rss_gb": round(peak_rss_gb() or 0.0, 3), "n_tiles": where.n_tiles}
    graph.close()
    weights.close()
    backend.close()
    return {**result, "kernels": {name: kernel.name for name, kernel in kernels.items()}}


def run_torch(options: argparse.Namespace, dtype: str, folder: Path) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    spec = spec_of(options)
    tower, projector = reference_tower(spec, getattr(torch, dtype))
    where, inputs = canvas_inputs(page(spec), spec.config(), spec.canvas())
    side, patch = spec.image_px // spec.patch_px, spec.patch_px
    patches = torch.from_numpy(inputs["pixels"]).reshape(1, 1, 4, side, side, 3, patch, patch)
    pixels = patches.permute(0, 1, 2, 5, 3, 6, 4, 7).reshape(1, 1, 4, 3, spec.image_px, spec.image_px)
    mask = (torch.arange(4) < where.n_tiles).long()[None, None]
    ids = torch.tensor([[where.aspect_ratio_id]])
    start = time.perf_counter()
    with torch.inference_mode():
        output = tower(pixel_values=pixels, aspect_ratio_ids=ids, aspect_ratio_mask=mask).last_hidden_state
        states = projector(output)[0, 0].float().numpy()
    seconds = time.perf_counter() - start
    np.save(folder / f"{dtype}.npy", states)
    return {"encode_s": round(seconds, 4), "peak_rss_gb": round(peak_rss_gb() or 0.0, 3)}


if __name__ == "__main__":
    main()
