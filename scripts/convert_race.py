"""Converts one checkpoint with granite4v and with llama.cpp's converter and quantizer, and compares time and memory.

    python -m scripts.convert_race CHECKPOINT --llama-cpp LLAMA_CPP_SOURCE --work DIR

llama.cpp needs up to three steps: its converter for the text model (to BF16, or to the final type if it can write it),
its converter for the vision part, and, after BF16, its quantizer. Times run from start to end of each process; peak
memory is the largest process's. Both sides write to DIR, which needs room for an unquantized copy. The last line on
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = (sys.executable, "-m", "granite4v")
UNQUANTIZED = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}  # what the converter writes by itself
QUANTIZE = """
import ctypes, os, sys, llama_cpp
source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.ftype = os.cpu_count(), getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind)
sys.exit(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)))
"""

# Starts the command from a small process: on Linux a process's peak memory starts at that of its parent.
TIMED = """
import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[2:]).returncode
with open(sys.argv[1], "w") as out:
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=out)
sys.exit(status)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp's source tree")
    parser.add_argument("--work", type=Path, required=True, help="folder for the results; two subfolders are replaced")
    parser.add_argument("--text-type", default="Q4_K_M")
    parser.add_argument("--vision-type", default="F16", choices=sorted(UNQUANTIZED))
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the files of the last run")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    read_through(options.checkpoint)
    for i in range(options.runs):
        order = ("ours", "peer") if i % 2 == 0 else ("peer", "ours")
        for side in order:
            folder = options.work / side
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            steps = ours(options, folder) if side == "ours" else peer(options, folder)
            results[side].append(race(steps, folder))
            print(
                f"run {i + 1} of {options.runs}, {side}: {json.dumps(results[side][-1])}", file=sys.stderr, flush=True
            )
    summary = compare(results)
    for name, row in summary.items():
        print(f"{name:<14} ours {row['ours']:>10.3f}   peer {row['peer']:>10.3f}   ours/peer {row['ratio']:>7.3f}")
    if not options.keep:
        for side in results:
            shutil.rmtree(options.work / side)
    print(json.dumps(summary))


Step = tuple[str, list[str]]


def ours(options: argparse.Namespace, folder: Path) -> list[Step]:
    types = ["--text-type", options.text_type, "--vision-type", options.vision_type]
    return [("convert", [*OURS, "convert", str(options.checkpoint), str(folder / "model"), *types])]


def peer(options: argparse.Namespace, folder: Path) -> list[Step]:
    converter = [sys.executable, "-m", "tests.peers.llama_cpp_convert", str(options.llama_cpp), str(options.checkpoint)]
    direct = UNQUANTIZED.get(options.text_type)
    text, unquantized = folder / f"text-{options.text_type}.gguf", folder / "text-unquantized.gguf"
    steps: list[Step] = [
        ("text", [*converter, str(text if direct else unquantized), "--outtype", direct or "bf16"]),
        (
            "vision",
            [*converter, str(folder / "mmproj.gguf"), "--mmproj", "--outtype", UNQUANTIZED[options.vision_type]],
        ),
    ]
    if not direct:
        steps.append(("quantize", [sys.executable, "-c", QUANTIZE, str(unquantized), str(text), options.text_type]))
    return steps


def race(steps: list[Step], folder: Path) -> dict[str, Any]:
    """Runs the steps one after another. Returns seconds of each and in total, peak memory, and GB of files written."""
    result: dict[str, Any] = {"seconds": 0.0, "peak_rss_gb": 0.0}
    for name, command in steps:
        seconds, rss_gb = timed(command, folder / f"{name}.log")
        result[f"{name}_s"] = round(seconds, 2)
        result["seconds"] = round(result["seconds"] + seconds, 2)
        result["peak_rss_gb"] = round(max(result["peak_rss_gb"], rss_gb), 3)
    result["written_gb"] = round(sum(path.stat().st_size for path in folder.rglob("*.gguf")) / 1e9, 3)
    return result


def timed(command: list[str], log: Path) -> tuple[float, float]:
    """Runs one process, its output to the log. Returns seconds and peak resident memory in GB."""
    figures = log.with_suffix(".figures")
    with log.open("wb") as output:
        status = subprocess.run(
            [sys.executable, "-c", TIMED, figures, *command], stdout=output, stderr=output
        ).returncode
    if status != 0:
        raise SystemExit(f"status {status} from {command}:\n{log.read_text(errors='replace')[-4000:]}")
    seconds, max_rss = figures.read_text().split()
    return float(seconds), int(max_rss) * (1 if sys.platform == "darwin" else 1024) / 1e9


def read_through(checkpoint: Path) -> None:
    """Reads the weights once, so that the first side to run does not alone pay for a cold file cache."""
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def compare(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    summary = {}
    for name in ("seconds", "peak_rss_gb", "written_gb"):
        middle = {side: statistics.median([run[name] for run in runs]) for side, runs in results.items()}
        summary[name] = {**middle, "ratio": round(middle["ours"] / middle["peer"], 4)}
    return summary


if __name__ == "__main__":
    main()
