"""What must hold for a folder of results, whatever was read: complete lines, valid JSON, no half-written file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
LEFT_OVERS = ("partial", ".tmp", "~")


def problems(out: Path) -> list[str]:
    found = []
    results = out / RESULTS
    if results.exists():
        data = results.read_bytes()
        if data and not data.endswith(b"\n"):
            found.append(f"{RESULTS} does not end with a line break")
        for i, line in enumerate(data.splitlines(), 1):
            try:
                strict_json(line)
            except ValueError as error:
                found.append(f"line {i} of {RESULTS} is not valid JSON: {error!s:.100}")
    for path in sorted(out.rglob("*")):
        if any(mark in path.name for mark in LEFT_OVERS):
            found.append(f"left behind: {path.name:.60}")
        if path.suffix == ".json" and not path.name.startswith("."):  # hidden files are the run's own notes
            try:
                strict_json(path.read_bytes())
            except ValueError as error:
                found.append(f"{path.name:.60} is not valid JSON: {error!s:.100}")
    return found


def records(out: Path) -> list[dict[str, Any]]:
    """Returns the records of a run; the first line may be about the run itself."""
    lines = (out / RESULTS).read_bytes().splitlines() if (out / RESULTS).exists() else []
    return [found for found in map(strict_json, lines) if isinstance(found, dict) and "task" in found]


def strict_json(data: bytes | str) -> Any:
    """Parses a JSON text. Raises ValueError for NaN and Infinity, which Python would accept."""

    def refuse(name: str) -> Any:
        raise ValueError(f"it holds {name}")

    return json.loads(data, parse_constant=refuse)
