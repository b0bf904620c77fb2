"""`granite4v bench`: measures how fast a model encodes an image and generates text on this machine."""

from __future__ import annotations

import dataclasses
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granite4v.cli import options
from granite4v.cli.loading import ModelOptions, grouped
from granite4v.cli.progress import Progress
from granite4v.cli.streams import to_json
from granite4v.cli.verbosity import show_timings

if TYPE_CHECKING:
    from granite4v.runtime import Model, Timings

PROMPT = "What does this page say?"


@grouped
def bench(
    *,
    loading: ModelOptions,
    image: options.ImageOption,
    prompt: options.BenchPromptOption = PROMPT,
    max_tokens: options.DecodedTokensOption = 32,
    repeat: options.RepeatOption = 1,
    parallel: options.TogetherOption = 1,
    as_json: options.JsonOnlyOption = False,
) -> None:
    """Measure the speed of image encoding, prefill and decoding.

    The last line on stdout is one JSON object: seconds, tokens per second, peak memory in GB (10^9 bytes), the
    settings chosen for this machine, and the build of llama-cpp-python. With several runs, it contains medians and
    ranges.

    With --parallel N, the model is loaded as for a batch of documents. After each run, N answers to the same question
    are generated at once, and "parallel" contains their total tokens per second, the ratio to the tokens per second of
    one answer, and the number of their decode steps.
    """
    from granite4v.ggml.build import installed_build
    from granite4v.runtime.engine.parallel import Workload

    runs: list[Timings] = []
    together: list[Together] = []
    wanted: dict[str, Any] = {"max_tokens": max_tokens + 1, "ignore_eos": True}
    together_options: dict[str, Any] = {}
    if parallel > 1:
        together_options = {"n_parallel": parallel, "workload": Workload(parallel, max_tokens + 1)}
    path = loading.find(quiet=as_json)
    with Progress() as progress, loading.load(path, progress, **together_options) as loaded:
        stage = None if as_json else progress.stage
        for _ in range(repeat):
            loaded.clear_cache()
            answer = loaded.generate(prompt, [image], **wanted, progress=stage)
            runs.append(answer.timings)
            if not as_json:
                progress.note(_line(answer.timings))
            show_timings("timings", dataclasses.asdict(answer.timings))
            if parallel > 1:
                together.append(_answer_together(loaded, prompt, image, parallel, wanted))
                if not as_json:
                    progress.note(together[-1].line(answer.timings.decode_tok_s))
        settings = loaded.settings
    print(to_json({**report(runs, settings, together), "build": dataclasses.asdict(installed_build())}))


@dataclasses.dataclass(frozen=True)
class Together:
    """Answers that were generated at once; the number of decode steps for all of them, and the time of the steps."""

    answers: tuple[Timings, ...]
    n_steps: int
    decode_s: float

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second of all answers together."""
        return sum(answer.n_decoded for answer in self.answers) / self.decode_s

    def line(self, alone_tok_s: float) -> str:
        return (
            f"{len(self.answers)} answers at once: decode {self.decode_tok_s:.2f} tokens/s in {self.n_steps} steps, "
            f"{self.decode_tok_s / alone_tok_s:.2f} times one answer"
        )


def _answer_together(model: Model, prompt: str, image: Path, n: int, wanted: dict[str, Any]) -> Together:
    before = model.counters
    prepared = model.prepare(prompt, [image])
    # `call` submits all between two engine steps; submitted one by one from this thread, the first could get far ahead
    # of the last
    streams = model.engine.call(lambda _: [model.stream(prepared, **wanted) for _ in range(n)])
    for stream in streams:
        stream.let_run()
    answers = tuple(stream.result().timings for stream in streams)
    after = model.counters
    return Together(answers, after.n_steps - before.n_steps, after.decode_s - before.decode_s)


def report(runs: list[Timings], settings: dict[str, Any], together: Sequence[Together] = ()) -> dict[str, Any]:
    """The result as plain data: medians, and for several runs also the range of each figure.

    `together`: for each run, the answers that were generated at once after it; empty without --parallel.
    """
    first = runs[0]
    result = {
        "load_s": round(first.load_s, 3),
        **_spread("encode_s", [run.encode_s for run in runs]),
        **_spread("prefill_s", [run.prefill_image_s for run in runs]),
        **_spread("prefill_text_s", [run.prefill_text_s for run in runs]),
        **_spread("decode_tok_s", [run.decode_tok_s for run in runs]),
    }
    if together:
        ratios = [each.decode_tok_s / run.decode_tok_s for each, run in zip(together, runs, strict=True)]
        result["parallel"] = {
            "n": len(together[0].answers),
            **_spread("decode_tok_s", [each.decode_tok_s for each in together]),
            **_spread("ratio", ratios),
            "n_steps": together[0].n_steps,
            "predicted": [answer.n_decoded for answer in together[0].answers],
        }
    peak = peak_rss_gb()
    return {
        **result,
        "prompt_tokens": first.n_prompt,
        "image_tokens": first.n_image,
        "predicted": first.n_decoded,
        "peak_rss_gb": None if peak is None else round(peak, 3),
        "settings": settings,
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The median and, for several values, the minimum and the maximum."""
    found: dict[str, Any] = {name: round(statistics.median(values), 3)}
    if len(values) > 1:
        found[f"{name}_range"] = [round(min(values), 3), round(max(values), 3)]
    return found


def peak_rss_gb() -> float | None:
    """Peak resident memory of this process in GB (10^9 bytes); None if the system does not report it."""
    try:
        # not getrusage: on Linux, its peak is that of the parent process if that was larger
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
