"""Converts an 11B-shaped Llama 3.2 Vision of zeros and checks peak memory, and that it writes only the two files.

    python -m tests.acceptance.mllama_conversion FOLDER [--text-type Q4_0]

The checkpoint's 21 GB are sparse files; the model takes about 7 GB. Both are removed. The last line is one JSON object.
The exit status is 1 if the conversion failed, took more than 1.5 GB of memory or wrote another file of weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.toy.checkpoint import PRESETS, CheckpointSpec, stored_tensors
from tests.toy.language import build_tokenizer, write_language_files
from tests.toy.mllama import TEMPLATE, mllama_preprocessor, mllama_tokenizer
from tests.toy.spec import model_config

MOST_BYTES = 1.5e9
BYTES = 2  # of a bfloat16
SHARD_BYTES = 5_000_000_000
POLL_SECONDS = 0.5
LARGE_BYTES = 64_000_000


def write_sparse(folder: Path, spec: CheckpointSpec) -> int:
    """Writes a checkpoint whose tensors are holes; returns its size in bytes with the holes."""
    tokenizer = mllama_tokenizer(build_tokenizer(spec.n_bpe))
    write_language_files(folder, tokenizer, template=TEMPLATE)
    _json(folder / "config.json", model_config(spec, tokenizer))
    _json(folder / "preprocessor_config.json", mllama_preprocessor(spec))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = total = 0
    for name, (tensor,) in stored_tensors(spec, tokenizer.n_vocab):
        n_bytes = BYTES * math.prod(tensor.shape)
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor.shape))
        size, total = size + n_bytes, total + n_bytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file_name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _holes(folder / file_name, shard)
        weight_map |= {name: file_name for name, _ in shard}
    _json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return total


def _holes(path: Path, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in tensors:
        end = offset + BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _is_large(path: Path) -> bool:
    """Whether a file is large enough to contain weights; the one from the tokenizer's check in a child is smaller."""
    try:
        return path.is_file() and path.stat().st_size > LARGE_BYTES
    except FileNotFoundError:  # moved into place meanwhile
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where there are 8 GB of room")
    parser.add_argument("--text-type", default="Q4_0")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        source, out, scratch = work / "source", work / "out", work / "tmp"
        source.mkdir()
        scratch.mkdir()
        source_bytes = write_sparse(source, PRESETS["full-mllama-11b"])
        options = ("--text-type", args.text_type, "--vision-type", "Q8_0")
        began = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "granite4v", "convert", source, out, *options],
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        names: set[str] = set()
        while child.poll() is None:
            names |= {path.name for path in work.rglob("*") if source not in path.parents and _is_large(path)}
            time.sleep(POLL_SECONDS)
        wanted = sorted(path.name for path in out.glob("*.gguf")) if out.exists() else []
        found: dict[str, Any] = {
            "status": child.returncode,
            "source_bytes": source_bytes,
            "model_bytes": sum((out / name).stat().st_size for name in wanted),
            "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "seconds": round(time.perf_counter() - began, 1),
            "files": wanted,
            "other_files": sorted(names - set(wanted)),
        }
    finally:
        shutil.rmtree(work)
    print(json.dumps(found))
    sys.exit(found["status"] != 0 or found["peak_bytes"] > MOST_BYTES or bool(found["other_files"]))


if __name__ == "__main__":
    main()
