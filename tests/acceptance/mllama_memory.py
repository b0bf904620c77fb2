"""Measures peak memory for an answer about an image, with 8 of the 40 layers of the published Llama 3.2 Vision 11B.

    python -m tests.acceptance.mllama_memory FOLDER [--text-type Q4_0] [--layers 8]

The model is converted from sparse files of zeros: layers of the published width, and the complete tower, vocabulary and
projector; memory does not depend on the values. `granite4v ask` then answers about an image of four tiles. The folder
takes about 3 GB, which are removed. The last line is one JSON object. The exit status is 1 if the process took more
than its files' sizes plus 15%.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.draw_page import draw_page
from tests.acceptance.mllama_conversion import write_sparse
from tests.toy.checkpoint import PRESETS

MOST = 1.15  # times the files' sizes
SIDE_PX = 1100  # of an image of 2x2 tiles


def peak_bytes(command: list[Any]) -> tuple[int, float]:
    """Returns the peak memory of a program and its children, and its seconds. Raises CalledProcessError when it fails,
    and SystemExit when an earlier program had the higher peak."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    began = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if after == before:
        raise SystemExit("a program before took more memory than this one, so its own is not known")
    return after * 1024, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where there are 3 GB of room")
    parser.add_argument("--text-type", default="Q4_0")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=4)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    whole = PRESETS["full-mllama-11b"]
    spec = replace(
        whole,
        text_layers=args.layers,
        cross_layers=tuple(i for i in whole.cross_layers if i < args.layers),
    )
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        source, model, page = work / "source", work / "model", work / "page.png"
        source.mkdir()
        write_sparse(source, spec)
        types = ("--text-type", args.text_type, "--vision-type", "Q8_0")
        converted, _ = peak_bytes([sys.executable, "-m", "granite4v", "convert", source, model, *types])
        draw_page().resize((SIDE_PX, SIDE_PX)).save(page)
        files = sum(path.stat().st_size for path in model.glob("*.gguf"))
        ask = ["ask", page, "What is this?", "--model", model, "--max-tokens", args.max_tokens]
        peak, seconds = peak_bytes([sys.executable, "-m", "granite4v", *ask])
    finally:
        shutil.rmtree(work)
    ratio = peak / files
    found = {
        "cpus": os.cpu_count(),
        "layers": [spec.text_layers, list(spec.cross_layers)],
        "convert_peak_bytes": converted,
        "files_bytes": files,
        "peak_bytes": peak,
        "ratio": round(ratio, 3),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(found))
    return int(ratio > MOST)


if __name__ == "__main__":
    sys.exit(main())
