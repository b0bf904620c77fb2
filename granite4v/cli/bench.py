"""`granite4v bench`: how fast a model encodes an image and generates text on this machine."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granite4v.cli import options
from granite4v.cli.progress import Progress
from granite4v.cli.streams import to_json

if TYPE_CHECKING:
    from granite4v.runtime import Timings

PROMPT = "What does this page say?"


def bench(
    *,
    model: options.ModelOption = None,
    image: options.ImageOption,
    mmproj: options.MmprojOption = None,
    prompt: options.BenchPromptOption = PROMPT,
    max_tokens: options.DecodedTokensOption = 32,
    repeat: options.RepeatOption = 1,
    ctx_size: options.ContextOption = None,
    threads: options.ThreadsOption = None,
    device: options.DeviceOption = "auto",
    vision_compute: options.VisionComputeOption = "file",
    as_json: options.JsonOnlyOption = False,
) -> None:
    """Measure the speed of image encoding, prefill and decoding.

    The last line on stdout is one JSON object: seconds, tokens per second, peak memory in GB (10^9 bytes), the
    settings chosen for this machine, and the build of llama-cpp-python. With several runs, it contains medians and
    ranges.
    """
    from granite4v.ggml.build import installed_build
    from granite4v.runtime import Model

    runs: list[Timings] = []
    path = options.model_path(model, quiet=as_json)
    with (
        Progress() as progress,
        Model.load(
            path, n_ctx=ctx_size, n_threads=threads, device=device, mmproj=mmproj, vision_compute=vision_compute
        ) as loaded,
    ):
        if loaded.vision_note is not None:
            progress.say(f"note: {loaded.vision_note}")
        stage = None if as_json else progress.stage
        for _ in range(repeat):
            loaded.clear_cache()
            answer = loaded.generate(prompt, [image], max_tokens=max_tokens + 1, ignore_eos=True, progress=stage)
            runs.append(answer.timings)
            if not as_json:
                progress.say(_line(answer.timings))
        settings = loaded.settings
    print(to_json({**report(runs, settings), "build": dataclasses.asdict(installed_build())}))


def report(runs: list[Timings], settings: dict[str, Any]) -> dict[str, Any]:
    """The result as plain data: medians, and the range of each figure where there are several runs."""
    first = runs[0]
    result: dict[str, Any] = {"load_s": round(first.load_s, 3)}
    for name, values in (
        ("encode_s", [run.encode_s for run in runs]),
        ("prefill_s", [run.prefill_image_s for run in runs]),
        ("prefill_text_s", [run.prefill_text_s for run in runs]),
        ("decode_tok_s", [run.decode_tok_s for run in runs]),
    ):
        values.sort()
        result[name] = round(values[len(values) // 2], 3)
        if len(values) > 1:
            result[f"{name}_range"] = [round(values[0], 3), round(values[-1], 3)]
    peak = peak_rss_gb()
    return {
        **result,
        "prompt_tokens": first.n_prompt,
        "image_tokens": first.n_image,
        "predicted": first.n_decoded,
        "peak_rss_gb": None if peak is None else round(peak, 3),
        "settings": settings,
    }


def peak_rss_gb() -> float | None:
    """Peak resident memory of this process in GB (10^9 bytes); None where the system does not tell."""
    try:
        # not getrusage, whose peak on Linux is that of the parent process if that was larger
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024 / 1e9
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _line(timings: Timings) -> str:
    return (
        f"{timings.n_image} image tokens: encode {timings.encode_s:.2f} s, prefill {timings.prefill_image_s:.2f} s; "
        f"text {timings.prefill_text_s:.2f} s; decode {timings.decode_tok_s:.2f} tokens/s"
    )
