"""Converts a model of many experts from sparse files, and lets it answer with less memory than its weights need.

    python -m tests.acceptance.many_experts FOLDER [--layers 4] [--text-type Q4_0] [--limit-mb 3000]

The checkpoint has the widths of a published one; with four layers it has 22 GB, of which all but 0.2 GB are holes. The
converted model takes 6.5 GB in Q4_0. Both are removed. The time of the conversion is compared with that of a plain copy
of the checkpoint followed by quantizing as many numbers into the same types in memory, with as many threads. In
addition, `ratio_to_least` compares it with the minimal work, which writes no more than the result. All of them begin
with a checkpoint that is not in the page cache. The copy temporarily takes another 22 GB. Then `granite4v ask` runs in
a control group with limited memory, which includes the pages of mapped files (Linux, as root; version 1 or 2).
Embeddings and routers are random, so that tokens are routed to all experts. The last line is one JSON object. The exit
status is 1 if the conversion took more than 3 GB of memory or 1.2 times that time, or if there was no answer.
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
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from granite4v.converter.stream import CHUNK_ELEMENTS, n_cores
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.quantize import quantize_rows
from tests.toy.checkpoint import PRESETS, CheckpointSpec, stored_tensors, write_configuration

MOST_BYTES, MOST_TIME = 3e9, 1.2
BYTES = 2  # of a bfloat16
SMALL = 1_000_000  # values; up to this many a tensor is written in full: norms and routers
EMBEDDED = 4096  # tokens at both ends of the vocabulary with random embeddings
COPIED = 1 << 24
MEASURED = 400  # chunks at most
WIDTH = 5120
GROUPS = Path("/sys/fs/cgroup")


def write_holes(folder: Path, spec: CheckpointSpec) -> int:
    """Writes a checkpoint whose matrices are holes; returns its size in bytes with the holes."""
    tokenizer = write_configuration(folder, spec)
    tensors = [(name, parts[0].shape) for name, parts in stored_tensors(spec, tokenizer.n_vocab)]
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in tensors:
        end = offset + BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    start, rng = 8 + len(text), np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + offset)
        for name, shape in tensors:
            for first, count in _filled(name, shape):
                file.seek(start + header[name]["data_offsets"][0] + BYTES * first)
                file.write(rng.uniform(0.5, 1.5, count).astype(ml_dtypes.bfloat16).tobytes())
    return offset


def _filled(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields (start, count) of the ranges of a tensor that have values."""
    n = math.prod(shape)
    if n <= SMALL:
        yield 0, n
    elif "embed_tokens" in name:
        yield 0, EMBEDDED * shape[1]
        yield n - EMBEDDED * shape[1], EMBEDDED * shape[1]


def forget(path: Path, other: Path) -> None:
    """Evicts a file from the page cache and fills the cache with another file, larger than memory. The host of a
    virtual machine reclaims free memory after some seconds, and getting it back page by page would take longer than
    what is measured here; the page cache does not count as free."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not other.exists():
        other.touch()
        os.truncate(other, int(1.1 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    read_all(other)


def read_all(path: Path) -> None:
    buffer = bytearray(COPIED)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def other_seconds(source: Path, model: Path, scratch: Path, other: Path) -> dict[str, float]:
    """Returns the seconds for copying the checkpoint's file, for only reading it, for writing a file as large as the
    model, and for quantizing as many numbers as the model has."""
    forget(source, other)
    read = timed(lambda: read_all(source))
    write = timed(lambda: write_zeros(scratch, sum(path.stat().st_size for path in model.glob("*.gguf"))))
    forget(source, other)
    copied = timed(lambda: copy(source, scratch))
    scratch.unlink()
    n_values: Counter[str] = Counter()
    for path in model.glob("*.gguf"):
        with GgufFile.open(path) as gguf:
            for tensor in gguf.tensors.values():
                n_values[tensor.type_name] += math.prod(tensor.shape)
    quantize = sum(map(quantizing_seconds, n_values, n_values.values()))
    return {"copy": copied, "read": read, "write": write, "quantize": quantize}


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy(source: Path, target: Path) -> None:
    """Copies a file; holes are read and written as zeros."""
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        while piece := read.read(COPIED):
            write.write(piece)


def write_zeros(target: Path, n_bytes: int) -> None:
    zeros = bytes(COPIED)
    with target.open("wb", buffering=0) as file:
        for _ in range(0, n_bytes, COPIED):
            file.write(zeros)


def quantizing_seconds(type_name: str, n_values: int) -> float:
    """Returns the seconds for quantizing this many zeros, like the checkpoint's holes. At most `MEASURED` chunks are
    measured, and the time is extrapolated."""
    rows = np.zeros((CHUNK_ELEMENTS // WIDTH, WIDTH), ml_dtypes.bfloat16)
    n_chunks = min(-(-n_values // rows.size), MEASURED)

    def quantize(_: int) -> None:
        quantize_rows(rows.astype(np.float32), type_name, n_threads=1)

    began = time.perf_counter()
    with ThreadPoolExecutor(n_cores()) as pool:
        list(pool.map(quantize, range(n_chunks)))
    return (time.perf_counter() - began) * n_values / (n_chunks * rows.size)


def limited_group(n_bytes: int) -> Path:
    """Creates a control group with a memory limit and returns its directory."""
    old = GROUPS / "memory"
    group = (old if old.is_dir() else GROUPS) / f"granite4v-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(n_bytes))
    return group


def ask(model: Path, limit: int) -> dict[str, Any]:
    """Asks a question in a control group; returns the status, the seconds, the limit, the peak of memory there, and the
    last line on stderr."""
    group = limited_group(limit)
    command = [sys.executable, "-m", "granite4v", "ask", "What is in the table, and what do its rows add up to?"]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, "--model", model, "--max-tokens", "4", "--ctx-size", "512"],
            preexec_fn=lambda: (group / "cgroup.procs").write_text("0"),
            capture_output=True,
            text=True,
        )
        peak = next(path for name in ("memory.max_usage_in_bytes", "memory.peak") if (path := group / name).exists())
        return {
            "status": done.returncode,
            "seconds": round(time.perf_counter() - began, 1),
            "limit_bytes": limit,
            "peak_bytes": int(peak.read_text()),
            "said": done.stderr.splitlines()[-1:],
        }
    finally:
        group.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where there are 24 GB of room")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--text-type", default="Q4_0")
    parser.add_argument("--limit-mb", type=int, default=3000)
    parser.add_argument("--no-answer", action="store_true", help="only convert")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        source, out = work / "source", work / "out"
        source.mkdir()
        n_source = write_holes(source, replace(PRESETS["full-llama4-4-layers"], text_layers=args.layers))
        options = ("--text-type", args.text_type, "--vision-type", "F16")
        weights, other = source / "model.safetensors", work / "other"
        forget(weights, other)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "granite4v", "convert", source, out, *options])
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        n_model = sum(path.stat().st_size for path in out.glob("*.gguf"))
        others = other_seconds(weights, out, work / "copy", other)
        found: dict[str, Any] = {
            "status": done.returncode,
            "source_bytes": n_source,
            "model_bytes": n_model,
            "peak_bytes": peak,
            "seconds": round(seconds, 1),
            "other_seconds": {name: round(value, 1) for name, value in others.items()},
            "ratio": round(seconds / (others["copy"] + others["quantize"]), 3),
            "ratio_to_least": round(seconds / (others["read"] + others["write"] + others["quantize"]), 3),
        }
        if done.returncode == 0 and not args.no_answer:
            found["answer"] = ask(out, args.limit_mb * 1_000_000)
    finally:
        shutil.rmtree(work)
    print(json.dumps(found))
    answered = args.no_answer or found.get("answer", {}).get("status") == 0
    return int(done.returncode or not answered or peak > MOST_BYTES or found["ratio"] > MOST_TIME)


if __name__ == "__main__":
    sys.exit(main())
