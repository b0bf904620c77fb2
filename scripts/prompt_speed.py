"""Measures image encoding and prefill of one prompt, granite4v and PyTorch in turn.

    python -m scripts.prompt_speed MODEL_DIR CHECKPOINT --image tests/data/invoice.png --torch bf16 --runs 3
    python -m scripts.prompt_speed MODEL_DIR CHECKPOINT --frames 32 --torch off

With --frames the prompt shows a video of that many generated frames. Every run is a separate process with all threads
of the machine, and the order alternates from run to run; figures are medians. granite4v's encoding includes cutting the
tiles and reading the weights, PyTorch's does not. The difference of the logits after the prompt is relative (L2). The
last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from scripts.draw_page import draw_page
from scripts.measuring import in_turn, middle, run_json

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": "bfloat16", "f32": "float32"}
FRAME_PX = (640, 480)
FIGURES = ("encode_s", "prefill_s", "peak_rss_gb")
# Arguments: model, threads, context, prompt, file for the logits, whether the images are frames, and the images.
DRIVER = """
import json, sys
import numpy as np
import granite4v
from granite4v.cli.bench import peak_rss_gb
model, threads, context, prompt, out, is_video, *images = sys.argv[1:]
given = [granite4v.load_video(images)] if is_video == "True" else images
with granite4v.load(model, device="cpu", n_threads=int(threads), n_ctx=int(context), page_store=False) as loaded:
    prepared = loaded.prepare(prompt, given)
    taken = loaded.generate(prepared, max_tokens=1, ignore_eos=True).timings
    np.save(out, loaded.logits(prepared))
result = {"encode_s": taken.encode_s, "prefill_s": taken.prefill_s, "prompt_tokens": taken.n_prompt}
print(json.dumps({**result, "image_tokens": taken.n_image, "peak_rss_gb": round(peak_rss_gb(), 4)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("checkpoint", type=Path, help="what it was converted from")
    parser.add_argument("--image", type=Path, nargs="+", default=[ROOT / "tests" / "data" / "invoice.png"])
    parser.add_argument("--frames", type=int, help="instead: a video of as many frames")
    parser.add_argument("--prompt", default="What does this page say?")
    parser.add_argument("--torch", choices=(*DTYPES, "off"), default="bf16", help="what PyTorch computes in (bf16)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ctx", type=int, default=8192, help="positions of the context (8192)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(options, Path(directory))))


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Returns the figures of both sides, and ours divided by PyTorch's."""
    images = draw_frames(options.frames, work) if options.frames else options.image
    sides = {"ours": functools.partial(run_ours, options, images, work / "ours.npy")}
    if options.torch != "off":
        sides["torch"] = functools.partial(run_torch, options, images, work / "torch.npy")
    results = in_turn(sides, options.runs)
    summary: dict[str, Any] = {
        name: {figure: middle([run[figure] for run in runs]) for figure in FIGURES} for name, runs in results.items()
    }
    tokens = {(runs[-1]["prompt_tokens"], runs[-1]["image_tokens"]) for runs in results.values()}
    if len(tokens) > 1:
        raise SystemExit(f"the prompts differ, in (tokens, tokens of images): {sorted(tokens)}")
    ((summary["prompt_tokens"], summary["image_tokens"]),) = tokens
    if "torch" in sides:
        summary["ratios"] = {
            figure: round(summary["ours"][figure]["median"] / summary["torch"][figure]["median"], 4)
            for figure in FIGURES
        }
        found, expected = np.load(work / "ours.npy"), np.load(work / "torch.npy")
        n = min(len(found), len(expected))  # the output head may have rows without a token
        summary["logits_relative_l2"] = float(
            f"{np.linalg.norm(found[:n] - expected[:n]) / np.linalg.norm(expected[:n]):.3g}"
        )
    print_table(summary)
    return {"threads": options.threads, "runs": options.runs, "torch": options.torch, **summary}


def draw_frames(n: int, work: Path) -> list[Path]:
    """Draws frames that all differ, a page that moves past, and returns their files."""
    page = draw_page()
    paths = []
    for i in range(n):
        paths.append(work / f"frame-{i:04}.png")
        page.crop((i, 2 * i, i + FRAME_PX[0], 2 * i + FRAME_PX[1])).save(paths[-1])
    return paths


def run_ours(options: argparse.Namespace, images: list[Path], out: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", DRIVER, str(options.model), str(options.threads), str(options.ctx)]
    return run_json([*command, options.prompt, str(out), str(bool(options.frames)), *map(str, images)])


def run_torch(options: argparse.Namespace, images: list[Path], out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.peers.torch_prompt", str(options.checkpoint), *map(str, images)]
    command += ["--dtype", DTYPES[options.torch], "--threads", str(options.threads), "--prompt", options.prompt]
    return run_json([*command, "--save", str(out), *(["--video"] if options.frames else [])])


def print_table(summary: dict[str, Any]) -> None:
    ratios = summary.get("ratios", {})
    print(f"{'':<12} {'ours':>10} {'torch':>10} {'ours/torch':>10}")
    for figure in FIGURES:
        sides = [summary[side][figure]["median"] for side in ("ours", "torch") if side in summary]
        row = [*sides, *([ratios[figure]] if figure in ratios else [])]
        print(f"{figure:<12} " + " ".join(f"{value:>10.3f}" for value in row))


if __name__ == "__main__":
    main()
