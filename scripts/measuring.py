"""Helpers of the measuring scripts: running programs one at a time, in turn, and summarizing the figures they print."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Killed(SystemExit):
    """A signal ended a program, for example because ggml used instructions that fault."""


def run_json(
    command: Sequence[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs a program and returns the JSON object on its last line of output.

    Raises Killed when a signal ended it, and SystemExit with the end of its stderr when it failed.
    """
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        raise Killed(f"signal {-done.returncode} ended {command}")
    if done.returncode != 0:
        raise SystemExit(f"status {done.returncode} from {command}:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def in_turn(sides: Mapping[str, Callable[[], dict[str, Any]]], n_runs: int) -> dict[str, list[dict[str, Any]]]:
    """Runs every side in each of `n_runs` rounds and returns the results. The order alternates from round to round."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for i in range(n_runs):
        for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            results[name].append(sides[name]())
            print(f"run {i + 1} of {n_runs}, {name}: {json.dumps(results[name][-1])}", file=sys.stderr, flush=True)
    return results


def middle(values: Sequence[float]) -> dict[str, Any]:
    """Returns the median and the range, rounded."""
    ends = [round(min(values), 4), round(max(values), 4)]
    return {"median": round(statistics.median(values), 4), "range": ends}
