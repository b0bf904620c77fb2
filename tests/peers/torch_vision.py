"""Encodes an image with PyTorch: transformers' tower and projectors with a checkpoint's weights, and nothing else.

    python -m tests.peers.torch_vision CHECKPOINT IMAGE --dtype bfloat16 --threads 2 [--save STREAMS.npy]

The peer in figures about image encoding. An image of one tile is encoded first, so that PyTorch's one-time work is not
counted, and the measured image's tiles are cut before the clock starts. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.peers.mtmd import peak_rss_gb
from tests.peers.onevision import OnevisionReference
from tests.peers.reference import Reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", type=Path, help="write the streams (n_streams, n_tokens, n_embd) here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = json.loads((options.checkpoint / "config.json").read_text())["model_type"]
    peer = OnevisionReference if kind == "llava_onevision" else Reference
    reference = peer(options.checkpoint, dtype=getattr(torch, options.dtype), attention="sdpa", vision_only=True)
    reference.streams(Image.new("RGB", (64, 64)))
    pixels = reference.pixels(Image.open(options.image).convert("RGB"))
    start = time.perf_counter()
    by_layer = reference.encoded(*pixels)
    seconds = time.perf_counter() - start
    streams = np.stack([by_layer[layer] for layer in sorted(by_layer)])
    if options.save:
        np.save(options.save, streams)
    result = {"image_tokens": streams.shape[1], "encode_s": round(seconds, 4), "peak_rss_gb": round(peak_rss_gb(), 4)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
