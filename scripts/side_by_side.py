"""Compares the speed and memory of granite4v and stock llama.cpp (libmtmd) on the same files, in turn.

    python -m scripts.side_by_side MODEL_DIR tests/data/invoice.png --runs 3

Each run is a separate process with all threads of the machine, and the order alternates from run to run; medians are
compared, since machines are noisy. granite4v chooses its own settings; llama.cpp runs with its defaults, but without
its special weight buffers if those crash the process (the result says so). The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.measuring import Killed, in_turn, run_json

OURS = (sys.executable, "-m", "granite4v")
PEER = (sys.executable, "-m", "tests.peers.mtmd")
RENDER = """
import sys, granite4v
with granite4v.load(sys.argv[1], mmproj=sys.argv[2]) as model:
    sys.stdout.write(model.prepare(sys.argv[3], [sys.argv[4]]).text)
"""
# name, label, and whether more is better
FIGURES = (
    ("encode_s", "image encoding, seconds", False),
    ("prefill_s", "image prefill, seconds", False),
    ("decode_tok_s", "decode, tokens a second", True),
    ("peak_rss_gb", "peak memory, GB", False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model directory, or a text GGUF with --mmproj")
    parser.add_argument("image", type=Path)
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--prompt", default="What does this page say?")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--predict", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-ctx", type=int, default=4096, help="positions of the peer's context (4096)")
    parser.add_argument("--limits", action="store_true", help="also measure how fast ggml multiplies here")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "metal", "auto"))
    options = parser.parse_args()
    text, mmproj = find_files(options.model, options.mmproj)
    raw = render_prompt(text, mmproj, options.prompt, options.image)
    ours, peer = Ours(options, text, mmproj), Peer(options, text, mmproj, raw)
    results = in_turn({"ours": ours.run, "peer": peer.run}, options.runs)
    summary = compare(results["ours"], results["peer"])
    print_table(summary)
    tokens = summary["image_tokens"] = {side: runs[0]["image_tokens"] for side, runs in results.items()}
    if tokens["ours"] != tokens["peer"]:
        print(f"image tokens differ, and prefill with them: ours {tokens['ours']}, the peer's {tokens['peer']}")
    if options.limits:
        summary["limits"] = measure_limits(text, mmproj, options)
        for part in ("encode", "prefill"):
            limit, taken = summary["limits"][f"{part}_limit_s"], summary[f"{part}_s"]["ours"]
            print(f"{part}: the products alone would take {limit:.3f} s here; we take {taken / limit:.2f} times that")
    summary["runs"] = options.runs
    summary["threads"] = options.threads
    summary["settings"] = results["ours"][-1].get("settings")
    summary["peer_weight_buffers"] = "plain" if peer.plain_weights else "as llama.cpp chooses"
    print(json.dumps(summary))


class Ours:
    def __init__(self, options: argparse.Namespace, text: Path, mmproj: Path) -> None:
        self._command = [
            *OURS,
            *("bench", "--json", "--model", str(text), "--mmproj", str(mmproj), "--image", str(options.image)),
            *("--prompt", options.prompt, "--max-tokens", str(options.predict), "--threads", str(options.threads)),
            *("--device", options.device),
        ]

    def run(self) -> dict[str, Any]:
        return run_json(self._command)


class Peer:
    def __init__(self, options: argparse.Namespace, text: Path, mmproj: Path, raw: str) -> None:
        self.plain_weights = False
        self._command = [
            *PEER,
            *(str(text), str(mmproj), str(options.image), "--raw", raw),
            *("--predict", str(options.predict), "--threads", str(options.threads), "--ctx", str(options.peer_ctx)),
            *(["--cpu"] if options.device == "cpu" else []),
        ]

    def run(self) -> dict[str, Any]:
        try:
            return run_json([*self._command, "--plain-weights"] if self.plain_weights else self._command)
        except Killed as error:
            if self.plain_weights:
                raise
            print(f"peer: {error}, with its default weight buffers; plain ones now", file=sys.stderr)
            self.plain_weights = True
            return self.run()


def find_files(model: Path, mmproj: Path | None) -> tuple[Path, Path]:
    """Returns the text and the vision file of a model directory, found by the names that our converter gives them."""
    if model.is_file():
        if mmproj is None:
            raise SystemExit(f"'{model}' is one file; give its vision file with --mmproj.")
        return model, mmproj
    texts, visions = sorted(model.glob("text-*.gguf")), sorted(model.glob("mmproj-*.gguf"))
    if len(texts) != 1 or not (mmproj or len(visions) == 1):
        raise SystemExit(f"'{model}' holds {len(texts)} text and {len(visions)} vision files; expected one of each.")
    return texts[0], mmproj or visions[0]


def render_prompt(text: Path, mmproj: Path, prompt: str, image: Path) -> str:
    """Renders the chat prompt for the peer. libmtmd adds a line break after an image, as the template does."""
    command = [sys.executable, "-c", RENDER, str(text), str(mmproj), prompt, str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the prompt cannot be rendered:\n{done.stderr}")
    return done.stdout.replace("<image>\n", "{media}")


def measure_limits(text: Path, mmproj: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the limits that limits.py measures on this machine."""
    command = [sys.executable, "-m", "scripts.limits", str(text), str(options.image), "--mmproj", str(mmproj)]
    command += ["--threads", str(options.threads)]
    return run_json(command)


def compare(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns {figure: medians of both sides, their ranges, and ours divided by the peer's}."""
    summary: dict[str, Any] = {}
    for name, _, _ in FIGURES:
        sides = {"ours": [run[name] for run in ours], "peer": [run[name] for run in peer]}
        middle = {side: statistics.median(values) for side, values in sides.items()}
        summary[name] = {
            **{side: round(value, 4) for side, value in middle.items()},
            **{f"{side}_range": [round(min(values), 4), round(max(values), 4)] for side, values in sides.items()},
            "ratio": round(middle["ours"] / middle["peer"], 4),
        }
    return summary


def print_table(summary: dict[str, Any]) -> None:
    print(f"{'':<26} {'ours':>10} {'peer':>10} {'ours/peer':>10}")
    for name, label, more_is_better in FIGURES:
        row = summary[name]
        better = (row["ratio"] > 1) == more_is_better
        note = "better" if better else "worse" if row["ratio"] != 1 else ""
        print(f"{label:<26} {row['ours']:>10.3f} {row['peer']:>10.3f} {row['ratio']:>10.3f} {note}")


if __name__ == "__main__":
    main()
