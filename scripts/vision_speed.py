"""Measures image encoding alone: granite4v on one or several vision files, stock libmtmd, and PyTorch.

    python -m scripts.vision_speed --mmproj MODEL/mmproj-Q8_0.gguf MODEL/mmproj-F16.gguf \\
        --text MODEL/text-Q4_K_M.gguf --checkpoint CHECKPOINT --torch bf16 --runs 3

Every run is a separate process, one at a time, and the order alternates from round to round; figures are medians. The
time covers the tower, the projectors and their packing; for granite4v also cutting the tiles and reading the weights.
Opening and decoding the page is not timed. libmtmd needs the text file to open the vision file, and PyTorch needs the
checkpoint that the files were converted from; a side whose files are not given is left out.

Errors are those of the streams against PyTorch in float32: `rms` is |ours - reference| / |reference| of the worst
stream, `largest` the largest difference of one value divided by the largest value of its stream. --reference saves
PyTorch's float32 streams for later runs. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scripts.draw_page import draw_page
from scripts.measuring import in_turn, middle, run_json

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": "bfloat16", "f32": "float32"}
# Settings that choose BLAS kernels or thread counts other than this CPU's defaults. No measurement wants them.
NEUTRAL = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

# Runs in a tree's directory, so that it imports the tree's 'granite4v'. Arguments: vision file, image, threads, further
# arguments of the encoder as JSON, file for the streams.
DRIVER = """
import json, sys, time
import numpy as np
import granite4v
from granite4v.cli.bench import peak_rss_gb
from granite4v.clip_projector import VisionEncoder, load_image
mmproj, image, threads, options, out = sys.argv[1:]
picture = load_image(image)
with VisionEncoder(mmproj, device="cpu", n_threads=int(threads), **json.loads(options)) as encoder:
    picture.pillow.load()
    start = time.perf_counter()
    features = encoder.encode([picture])[0]
    seconds = time.perf_counter() - start
    kernels = {str(kind): str(kernel) for kind, kernel in getattr(encoder, "kernels", {}).items()}
np.save(out, features.streams)
result = {"image_tokens": features.n_tokens, "encode_s": round(seconds, 4), "peak_rss_gb": round(peak_rss_gb(), 4)}
print(json.dumps({**result, "kernels": kernels, "package": granite4v.__file__}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmproj", type=Path, nargs="+", required=True, help="vision files that granite4v runs")
    parser.add_argument("--source", type=Path, nargs="+", default=[ROOT], help="checkouts whose code runs (this one)")
    parser.add_argument("--encoder-options", default="{}", metavar="JSON", help="further arguments of VisionEncoder")
    parser.add_argument("--text", type=Path, help="text file: measure libmtmd")
    parser.add_argument(
        "--peer-mmproj", type=Path, nargs="+", help="vision files that libmtmd runs (those of --mmproj)"
    )
    parser.add_argument("--checkpoint", type=Path, help="measure PyTorch, and errors against it")
    parser.add_argument("--torch", choices=(*DTYPES, "off"), default="bf16", help="what PyTorch computes in (bf16)")
    parser.add_argument("--reference", type=Path, help="file for PyTorch's float32 streams; made where it is missing")
    parser.add_argument("--image", type=Path, default=ROOT / "tests" / "data" / "invoice.png")
    parser.add_argument("--size", metavar="WxH", help="instead of --image: a page drawn and scaled to this size")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.source = [source.absolute() for source in options.source]
    with tempfile.TemporaryDirectory() as directory:
        if options.size:
            options.image = Path(directory) / "page.png"
            draw_page().resize(page_size(options.size)).save(options.image)
        print(json.dumps(measure(options, Path(directory))))


def page_size(text: str) -> tuple[int, int]:
    """Parses '1700x2200' into (width, height). Raises SystemExit for anything else."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise SystemExit(f"--size {text!r}: expected WIDTHxHEIGHT in pixels, as 1700x2200.")
    return int(width), int(height)


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Returns times and errors of every side, and ratios of each of our times to every other side's."""
    reference = find_reference(options, work)
    sides = find_sides(options, work)
    results = in_turn({name: run for name, (run, _) in sides.items()}, options.runs)
    rows: dict[str, dict[str, Any]] = {}
    for name, (_, streams) in sides.items():
        rows[name] = {"encode_s": middle([run["encode_s"] for run in results[name]])}
        rows[name] |= {key: results[name][-1][key] for key in ("image_tokens", "peak_rss_gb")}
        if "kernels" in results[name][-1]:
            rows[name]["kernels"] = results[name][-1]["kernels"]
        if reference is not None:
            rows[name]["error"] = errors(np.load(streams), np.load(reference))
    ratios = {name: ratios_of(name, rows) for name in rows if name.startswith("ours")}
    print_table(rows, ratios)
    return {"image": options.size or options.image.name, "threads": options.threads, "sides": rows, "ratios": ratios}


def find_reference(options: argparse.Namespace, work: Path) -> Path | None:
    """Returns the file with the float32 streams, computed now if it is missing; None without a checkpoint."""
    if options.reference and options.reference.exists():
        return Path(options.reference)
    if options.checkpoint is None:
        return None
    path = Path(options.reference or work / "reference.npy")
    run_torch(options, "float32", path)
    return path


Side = tuple[Callable[[], dict[str, Any]], Path]  # runs it once; the file that then has its streams


def find_sides(options: argparse.Namespace, work: Path) -> dict[str, Side]:
    """Returns the sides to measure, by name."""
    sides: dict[str, Side] = {}
    for source in options.source:
        for mmproj in options.mmproj:
            name = f"ours {mmproj.stem}" + (f" {source.name}" if len(options.source) > 1 else "")
            out = work / f"{len(sides)}.npy"
            sides[name] = functools.partial(run_ours, options, source, mmproj.absolute(), out), out
    if options.text:
        for mmproj in options.peer_mmproj or options.mmproj:
            out = work / f"{len(sides)}.npy"
            sides[f"libmtmd {mmproj.stem}"] = functools.partial(run_libmtmd, options, mmproj, out), out
    if options.checkpoint and options.torch != "off":
        out = work / f"{len(sides)}.npy"
        sides[f"torch {options.torch}"] = functools.partial(run_torch, options, DTYPES[options.torch], out), out
    return sides


def run_ours(options: argparse.Namespace, source: Path, mmproj: Path, out: Path) -> dict[str, Any]:
    """Encodes one image with the code of a checkout. Raises SystemExit when other code ran."""
    command = [sys.executable, "-c", DRIVER, str(mmproj), str(options.image.absolute()), str(options.threads)]
    command += [options.encoder_options, str(out)]
    environment = neutral() | {"PYTHONPATH": str(source)}
    if len(options.source) > 1:  # each tree measures its kernels in its own way
        environment["GRANITE4V_CACHE"] = str(out.parent / f"cache-{options.source.index(source)}")
    result = run_json(command, cwd=source, environment=environment)
    if not Path(result["package"]).is_relative_to(source):
        raise SystemExit(f"'{result['package']}' ran, expected the code in '{source}'")
    return result


def run_libmtmd(options: argparse.Namespace, mmproj: Path, out: Path) -> dict[str, Any]:
    """Encodes one image with stock libmtmd. The text file is only opened, which is quick with plain weights."""
    folder = out.with_suffix("")
    command = [sys.executable, "-m", "tests.peers.mtmd", str(options.text), str(mmproj), str(options.image)]
    command += ["--raw", "{media}", "--encode-only", "--cpu", "--plain-weights", "--threads", str(options.threads)]
    result = run_json([*command, "--ctx", "512", "--ubatch", "64", "--save", str(folder)], environment=neutral())
    (folder / "embeddings-0.npy").replace(out)
    return result


def run_torch(options: argparse.Namespace, dtype: str, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.peers.torch_vision", str(options.checkpoint), str(options.image)]
    command += ["--dtype", dtype, "--threads", str(options.threads), "--save", str(out)]
    return run_json(command, environment=neutral())


def neutral() -> dict[str, str]:
    """Returns the environment without the settings of BLAS libraries, so that each chooses for this CPU."""
    return {name: value for name, value in os.environ.items() if name not in NEUTRAL}


def errors(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Returns `rms` and `largest` of the worst stream against a reference (n_streams, n_tokens, n_embd).

    libmtmd's (n_tokens, n_streams * n_embd) are reshaped to that first.
    """
    n_streams, n_tokens, n_embd = reference.shape
    if found.ndim == 2:
        found = found.reshape(n_tokens, n_streams, n_embd).swapaxes(0, 1)
    assert found.shape == reference.shape, (found.shape, reference.shape)
    difference, expected = (
        values.astype(np.float64).reshape(n_streams, -1) for values in (found - reference, reference)
    )
    rms = np.linalg.norm(difference, axis=1) / np.linalg.norm(expected, axis=1)
    largest = np.abs(difference).max(axis=1) / np.abs(expected).max(axis=1)
    return {"rms": float(f"{rms.max():.3g}"), "largest": float(f"{largest.max():.3g}")}


def ratios_of(name: str, rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns one side's median time divided by each other side's."""
    own = rows[name]["encode_s"]["median"]
    return {other: round(own / row["encode_s"]["median"], 4) for other, row in rows.items() if other != name}


def print_table(rows: dict[str, dict[str, Any]], ratios: dict[str, dict[str, float]]) -> None:
    width = max(map(len, rows)) + 2
    print(f"{'':<{width}}{'seconds':>9} {'from':>8} {'to':>8} {'RMS':>10} {'largest':>10}")
    for name, row in rows.items():
        low, high = row["encode_s"]["range"]
        error = [f"{row['error'][key]:>10.2e}" for key in ("rms", "largest")] if "error" in row else []
        print(f"{name:<{width}}{row['encode_s']['median']:>9.3f} {low:>8.3f} {high:>8.3f} {' '.join(error)}")
    for name, others in ratios.items():
        print(f"{name} takes " + ", ".join(f"{ratio:.3f} of {other}" for other, ratio in others.items()))


if __name__ == "__main__":
    main()
