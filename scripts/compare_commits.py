"""Compares the speed and memory of two source trees: cold start, image encoding, prefill, decoding, peak memory.

    python -m scripts.compare_commits BASE NEW --max-tokens 128 --repeat 3
    python -m scripts.compare_commits BASE NEW --model build/full-model --image tests/data/invoice.png

BASE and NEW are checkouts. Each run is a separate process, and the order alternates from run to run; figures are
medians, and ratios are NEW's medians divided by BASE's. Each tree has its own cache, which a run that is not counted
fills; NEW gets a copy of BASE's measurements of the machine, so that both choose the same kernels. 'cpu_s' is CPU time
on all cores, which a busy machine affects less. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.compare_records import copy_measurements

ROOT = Path(__file__).parents[1]
BAR = 0.03  # share by which a figure may be worse
# name of a figure: whether more is better
FIGURES = {
    "ask_text_s": False,
    "ask_text_cpu_s": False,
    "ask_image_s": False,
    "ask_image_cpu_s": False,
    "encode_s": False,
    "prefill_s": False,
    "decode_tok_s": True,
    "bench_cpu_s": False,
    "peak_rss_gb": False,
}


@dataclass(frozen=True)
class Tree:
    """One checkout and its cache."""

    name: str
    path: Path
    cache: Path

    @property
    def count_flag(self) -> str:
        """The option of 'bench' for the number of tokens to generate; older trees call it '--predict'."""
        command = [sys.executable, "-m", "granite4v", "bench", "--help"]
        words = subprocess.run(command, cwd=self.path, capture_output=True, text=True, check=True).stdout
        return "--predict" if "--predict" in words else "--max-tokens"

    def run(self, *arguments: str) -> tuple[str, float, float]:
        """Runs `granite4v` with the tree's code. Returns the last line of its output, seconds, and CPU seconds."""
        command = [sys.executable, "-m", "granite4v", *arguments]
        environment = {**os.environ, "GRANITE4V_CACHE": str(self.cache)}
        before, begin = os.times(), time.perf_counter()
        done = subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True)
        elapsed, after = time.perf_counter() - begin, os.times()
        if done.returncode != 0:
            raise SystemExit(f"status {done.returncode} from {command} in '{self.path}':\n{done.stderr[-2000:]}")
        cpu_s = after.children_user - before.children_user + after.children_system - before.children_system
        return (done.stdout.strip().splitlines() or [""])[-1], elapsed, cpu_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="checkout to compare with")
    parser.add_argument("new", type=Path, help="checkout that is compared")
    parser.add_argument("--model", default="nano", help="a model directory, or the embedded model (nano)")
    parser.add_argument("--image", type=Path, default=ROOT / "tests" / "data" / "invoice.png")
    parser.add_argument("--prompt", default="<tables_html>")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each tree (5)")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens that 'bench' generates (32)")
    parser.add_argument("--repeat", type=int, default=1, help="requests in one run of 'bench' (1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    model = options.model if options.model == "nano" else str(Path(options.model).absolute())
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    settings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        trees = [Tree(name, getattr(options, name).absolute(), Path(directory) / name) for name in ("base", "new")]
        measure_once(trees[0], model, options)
        copy_measurements(trees[0].cache, trees[1].cache)
        measure_once(trees[1], model, options)
        for i in range(options.runs):
            for tree in trees if i % 2 == 0 else trees[::-1]:
                figures, settings[tree.name] = measure_once(tree, model, options)
                results[tree.name].append(figures)
                print(f"run {i + 1} of {options.runs}, {tree.name}: {json.dumps(figures)}", file=sys.stderr, flush=True)
    summary = compare(results["base"], results["new"])
    for name, row in summary.items():
        note = "WORSE" if row["worse"] else ""
        print(f"{name:<16} {row['base']:>10.4f} {row['new']:>10.4f} {row['ratio']:>8.3f} {note}", file=sys.stderr)
    print(json.dumps({"model": options.model, "figures": summary, "runs": options.runs, "settings": settings}))
    return 1 if any(row["worse"] for row in summary.values()) else 0


def measure_once(tree: Tree, model: str, options: argparse.Namespace) -> tuple[dict[str, float], Any]:
    """Returns all figures of a tree, from three processes, and the settings that 'bench' chose for this machine."""
    common = ("--model", model, "--threads", str(options.threads))
    image = str(options.image.absolute())
    figures: dict[str, float] = {}
    for name, arguments in (("ask_text", ("Hello.",)), ("ask_image", (image, options.prompt))):
        _, elapsed, cpu_s = tree.run("ask", *arguments, "--max-tokens", "1", *common)
        figures |= {f"{name}_s": round(elapsed, 4), f"{name}_cpu_s": round(cpu_s, 4)}
    many = (tree.count_flag, str(options.max_tokens), "--repeat", str(options.repeat))
    line, _, cpu_s = tree.run("bench", "--image", image, "--prompt", options.prompt, *many, *common)
    result = json.loads(line)
    figures |= {name: result[name] for name in ("encode_s", "prefill_s", "decode_tok_s", "peak_rss_gb")}
    return {**figures, "bench_cpu_s": round(cpu_s, 4)}, result["settings"]


def compare(base: list[dict[str, float]], new: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Returns {figure: both medians, their ratio, the smallest and largest ratio of a pair of runs, and whether NEW is
    worse by more than `BAR`}."""
    summary: dict[str, dict[str, Any]] = {}
    for name, more_is_better in FIGURES.items():
        sides = [[run[name] for run in runs] for runs in (base, new)]
        middle = [statistics.median(values) for values in sides]
        ratio = middle[1] / middle[0]
        pairs = [other / one for one, other in zip(*sides, strict=True)]
        summary[name] = {
            "base": middle[0],
            "new": middle[1],
            "ratio": round(ratio, 4),
            "pairs": [round(min(pairs), 4), round(max(pairs), 4)],
            "worse": ratio < 1 - BAR if more_is_better else ratio > 1 + BAR,
        }
    return summary


if __name__ == "__main__":
    sys.exit(main())
