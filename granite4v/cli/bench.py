"""`granite4v bench`: how fast a model reads a picture and answers here, as one JSON line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from granite4v.cli.options import ContextOption, DeviceOption, MmprojOption, ModelOption, ThreadsOption, model_path
from granite4v.cli.streams import to_json

if TYPE_CHECKING:
    from granite4v.runtime import Timings

PROMPT = "What does this page say?"


def bench(
    *,
    model: ModelOption = None,
    image: Annotated[Path, typer.Option("--image", metavar="FILE", help="The image to read.")],
    mmproj: MmprojOption = None,
    prompt: Annotated[str, typer.Option(help="The question.")] = PROMPT,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode; the model cannot end sooner.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Runs, each from the beginning; medians are reported.")] = 1,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    ctx: ContextOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but the JSON line.")] = False,
) -> None:
    """Measure image encoding, image prefill and decoding apart.

    The last line on stdout is one JSON object: seconds, tokens a second, peak memory in GB (10^9 bytes), and the
    settings the program chose for this machine.
    """
    from granite4v.cli.status import Status
    from granite4v.runtime import Model

    status = Status()
    progress = None if as_json else status
    runs: list[Timings] = []
    found = model_path(model, quiet=as_json)
    with Model.load(found, n_ctx=ctx, n_threads=threads, device=device, mmproj=mmproj) as loaded:
        for _ in range(repeat):
            loaded.clear_cache()
            answer = loaded.generate(prompt, [image], max_tokens=max_tokens + 1, ignore_eos=True, progress=progress)
            runs.append(answer.timings)
            status.clear()
            if not as_json:
                print(_line(answer.timings), file=sys.stderr)
        settings = loaded.settings
    print(to_json(report(runs, settings)))


def report(runs: list[Timings], settings: dict[str, Any]) -> dict[str, Any]:
    """The benchmark's result as plain data: medians, and the spread where there are several runs."""
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
        "predicted": first.n_steps,
        "peak_rss_gb": None if peak is None else round(peak, 3),
        "settings": settings,
    }


def peak_rss_gb() -> float | None:
    """The most memory this process has had resident, in GB (10^9 bytes); None where the system does not say."""
    try:
        # Linux's getrusage would tell that of the process which started this one, where that is more
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
