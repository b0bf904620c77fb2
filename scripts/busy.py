"""Measures granite4v next to busy processes and on a quiet machine, with different waiting policies of OpenMP threads.

    python -m scripts.busy                                                     # the embedded model
    python -m scripts.busy --model MODEL --max-tokens 24 --spin 300000 1000 0  # what the product's choice is among

Sides: 'default' is the product's own choice, 'one thread' has --threads 1, 'spin N' always uses all threads with
GOMP_SPINCOUNT=N (300000 is GCC's default). All sides run first next to --busy processes that never rest, then without
them, in turn and each in its own process; figures are medians. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from granite4v.ggml.cpu import default_threads
from scripts.measuring import in_turn, middle, run_json

ROOT = Path(__file__).parents[1]
FIGURES = {"encode_s": "encode, s", "prefill_s": "prefill, s", "decode_tok_s": "decode, tokens/s"}
ENDLESS = (sys.executable, "-c", "while True: pass")
LIBGOMP_SPINS = 300000  # libgomp's default with OMP_WAIT_POLICY unset
DEFAULT, ONE_THREAD = "default", "one thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a model directory, or the embedded model (nano)")
    parser.add_argument("--image", type=Path, default=ROOT / "tests" / "data" / "invoice.png")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--busy", type=int, default=2, help="processes that never rest (2)")
    parser.add_argument("--spin", type=int, nargs="*", default=[LIBGOMP_SPINS], metavar="N")
    parser.add_argument("--only", choices=("busy", "quiet"), help="by default both")
    options = parser.parse_args()
    summary = {}
    for state, n_busy in (("busy", options.busy), ("quiet", 0)):
        if options.only in (None, state):
            with busy_processes(n_busy):
                summary[state] = summarize(in_turn(sides(options), options.runs))
            print_table(state, summary[state])
    print(json.dumps({"model": options.model, "busy_processes": options.busy, "runs": options.runs, **summary}))


@contextlib.contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Runs `n` processes that compute all the time, until the end of the block."""
    processes = [subprocess.Popen(ENDLESS) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def sides(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns the sides to measure, by name."""
    command = [sys.executable, "-m", "granite4v", "bench", "--json", "--device", "cpu", "--image", str(options.image)]
    command += ["--model", options.model, "--max-tokens", str(options.max_tokens), "--prompt", "<tables_html>"]
    free = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found: dict[str, Callable[[], dict[str, Any]]] = {
        DEFAULT: functools.partial(run, command, free),
        ONE_THREAD: functools.partial(run, [*command, "--threads", "1"], free),
    }
    for n in options.spin:
        fixed = [*command, "--threads", str(default_threads())]
        found[f"spin {n}"] = functools.partial(run, fixed, free | {"GOMP_SPINCOUNT": str(n)})
    return found


def run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    result = run_json(command, environment=environment)
    return {name: result[name] for name in FIGURES}


def summarize(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Returns {side: {figure: median, range, and speed relative to each of the first two sides (more is better)}}."""
    summary: dict[str, dict[str, Any]] = {}
    for side, runs in results.items():
        summary[side] = {name: middle([run[name] for run in runs]) for name in FIGURES}
    for row in summary.values():
        for name in FIGURES:
            for other in (DEFAULT, ONE_THREAD):
                ratio = row[name]["median"] / summary[other][name]["median"]
                row[name][f"of {other}"] = round(ratio if name == "decode_tok_s" else 1 / ratio, 3)
    return summary


def print_table(state: str, summary: dict[str, dict[str, Any]]) -> None:
    print(f"{state + ' (speed of default, of one thread)':<40}" + "".join(f"{label:>28}" for label in FIGURES.values()))
    for side, row in summary.items():
        cells = [
            f"{row[name]['median']:>12.3f} ({row[name]['of default']:>5.2f}, {row[name]['of one thread']:>5.2f})"
            for name in FIGURES
        ]
        print(f"{side:<40}" + "".join(f"{cell:>28}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
