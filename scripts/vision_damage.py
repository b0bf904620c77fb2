"""Measures how far the image embeddings of each vision type are from those of float32 weights, on one image.

    python -m scripts.vision_damage build/full-model tests/data/invoice.png --work build/damage

MODEL is a directory with an F16, BF16 or F32 vision file, or that file. It is requantized to every type in turn, in
the folder WORK, which needs room for a float32 file and one more; 'int8' rows quantize the file in memory. Prints a
Markdown table: the relative L2 error of all streams and of the worst one, the file's size, and the seconds of opening
and encoding, which are from one run and show only the magnitude. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from granite4v.choices import VisionCompute
from granite4v.clip_projector import ImageFeatures, VisionEncoder, load_image
from granite4v.converter import requantize
from granite4v.converter.policy import VISION_TYPES
from granite4v.converter.requantize import find_vision_file
from granite4v.ggml.gguf_file import GgufFile
from granite4v.gguf_summary import tensor_types


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model directory, or a vision file")
    parser.add_argument("image", type=Path)
    parser.add_argument("--types", default=",".join([*VISION_TYPES, "int8 Q8_0", "int8 Q6_K"]))
    parser.add_argument("--work", type=Path, required=True, help="folder for the files that are made")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = find_vision_file(options.model)
    exact = encoded(source, "F32", options)
    rows = []
    for name in options.types.split(","):
        found = encoded(source, name, options)
        rows.append({"type": name, **errors(found.pop("streams"), exact["streams"]), **found})
        print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    print(table(rows))
    print(json.dumps({"model": str(options.model), "image": str(options.image), "types": rows}))


def encoded(source: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the streams `(n_streams, n_tokens, n_embd)`, times and size with one type. Removes the file it makes."""
    in_memory: VisionCompute = {"int8 Q8_0": "Q8_0", "int8 Q6_K": "Q6_K"}.get(name, "file")  # type: ignore[assignment]
    path = source
    if in_memory == "file" and name != own_type(source):
        path = requantize(source, name, options.work / f"{name}.gguf", force=True)
    start = time.perf_counter()
    with VisionEncoder(path, "cpu", options.threads, vision_compute=in_memory) as encoder:
        image, opened = load_image(options.image), time.perf_counter()
        features = encoder.encode([image])[0]
        streams = features.streams.copy() if isinstance(features, ImageFeatures) else features.states[None]
        done, kernels = time.perf_counter(), {kind: kernel.name for kind, kernel in encoder.kernels.items()}
    size = path.stat().st_size
    if path != source:
        path.unlink()
    return {
        "streams": streams,
        "file_gb": round(size / 1e9, 3),
        "open_s": round(opened - start, 2),
        "encode_s": round(done - opened, 2),
        "kernels": kernels,
    }


def own_type(path: Path) -> str:
    """Returns the type that most of a file's bytes have."""
    with GgufFile.open(path) as file:
        return next(iter(tensor_types(file.tensors)))


def errors(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Returns the relative L2 errors of all streams together, and of the worst one."""
    each = [relative_l2(a, b) for a, b in zip(found, expected, strict=True)]
    return {"error": relative_l2(found, expected), "worst_stream": max(each)}


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| vision type | error of all streams | of the worst | file, GB | opening, s | encoding, s |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        values = (row["file_gb"], row["open_s"], row["encode_s"])
        lines.append(
            f"| {row['type']} | {row['error']:.2g} | {row['worst_stream']:.2g} | {' | '.join(map(str, values))} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
