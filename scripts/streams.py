"""Measures several concurrent answers through the Python API against the same answers one after another.

    python -m scripts.streams .                                          # this checkout, the embedded model
    python -m scripts.streams BASE --model build/full-model --image tests/data/invoice.png --max-tokens 24

TREE is a checkout; its code runs in its own process. All requests run one after another, and all at once with a thread
for each; the order alternates. 'warm' requests find their page in the cache, 'cold' ones find nothing. Each text is
compared with the one that the request gives alone. The tokens passed to llama.cpp are counted: all at once should not
need many more than one after another. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import granite4v

ROOT = Path(__file__).parents[1]
PROMPTS = (
    "<tables_html>",
    "<tables_otsl>",
    "<tables_json>",
    "<chart2csv>",
    "What is this?",
    "Read it.",
    "Who?",
    "When?",
)


@dataclass
class Round:
    """One pass over all requests: wall-clock and CPU seconds, llama.cpp's calls and tokens, and the answers."""

    seconds: float
    cpu_s: float
    n_calls: int
    n_tokens: int
    answers: list[list[int]]
    texts: list[str]


class Counter:
    """Counts the calls and tokens of `llama_decode`, so that it works with any tree, whatever counters that has."""

    def __init__(self) -> None:
        from llama_cpp import llama_cpp

        self.n_calls = self.n_tokens = 0
        decode = llama_cpp.llama_decode

        def counted(context: Any, batch: Any) -> Any:
            self.n_calls += 1
            self.n_tokens += batch.n_tokens
            return decode(context, batch)

        llama_cpp.llama_decode = counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="checkout whose code runs")
    parser.add_argument("--model", default="nano", help="a model directory, or the embedded model (nano)")
    parser.add_argument("--image", type=Path, default=ROOT / "tests" / "data" / "invoice.png")
    parser.add_argument("--streams", type=int, default=4, help=f"answers at once, at most {len(PROMPTS)} (4)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of every answer (128)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=("warm", "cold"), help="by default both")
    parser.add_argument("--load-options", default="{}", metavar="JSON", help="further arguments of granite4v.load")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options)))
        return
    tree = options.tree.absolute()
    command = [sys.executable, __file__, str(tree), "--inside", *_again(options)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the code in '{tree}' ended with status {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    if not Path(result["package"]).is_relative_to(tree):
        raise SystemExit(f"'{result['package']}' ran, expected the code in '{tree}'")
    print(json.dumps(result))


def _again(options: argparse.Namespace) -> list[str]:
    """Returns the options for the process that runs the tree's code, with absolute paths."""
    model = options.model if options.model == "nano" else str(Path(options.model).absolute())
    words = ["--model", model, "--image", str(options.image.absolute())]
    for name in ("streams", "max_tokens", "rounds", "threads", "load_options"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return [*words, "--only", options.only] if options.only else words


# --- in the tree's process ---


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the rounds of each kind, one after another and together in turn, and returns their figures."""
    counter = Counter()
    extra = json.loads(options.load_options)
    with granite4v.load(options.model, n_threads=options.threads, device="cpu", **extra) as model:
        bench = Bench(model, counter, PROMPTS[: options.streams], options.image, options.max_tokens)
        bench.warm_up()
        kinds = {}
        for kind in ("warm", "cold"):
            if options.only not in (None, kind):
                continue
            pairs = []
            for i in range(options.rounds):
                order = (bench.one_after_another, bench.together)
                first, second = (bench.round(kind, way) for way in (order if i % 2 == 0 else order[::-1]))
                pairs.append((first, second) if i % 2 == 0 else (second, first))
                print(f"{kind} {i + 1} of {options.rounds}: {_line(*pairs[-1])}", file=sys.stderr, flush=True)
            kinds[kind] = summarize(pairs)
        return {"package": granite4v.__file__, "model": options.model, **kinds, "settings": model.settings}


class Bench:
    """The requests of one image, and the two ways to run them."""

    def __init__(
        self, model: granite4v.Model, counter: Counter, prompts: Sequence[str], image: Path, max_tokens: int
    ) -> None:
        self._model, self._counter, self._prompts = model, counter, prompts
        self._image, self._max_tokens = image, max_tokens

    def warm_up(self) -> None:
        """Reads files and creates contexts; none of this is timed."""
        self.together()

    def round(self, kind: str, way: Callable[[], list[Any]]) -> Round:
        if kind == "cold":
            self._model.clear_cache()
        else:  # nearly free if the page is still cached
            self._model.generate(self._prompts[0], [self._image], max_tokens=1)
        calls, tokens = self._counter.n_calls, self._counter.n_tokens
        begin, cpu_begin = time.perf_counter(), time.process_time()
        answers = way()
        return Round(
            time.perf_counter() - begin,
            time.process_time() - cpu_begin,
            self._counter.n_calls - calls,
            self._counter.n_tokens - tokens,
            [list(answer.tokens) for answer in answers],
            [answer.text for answer in answers],
        )

    def one_after_another(self) -> list[Any]:
        return [self._answer(prompt) for prompt in self._prompts]

    def together(self) -> list[Any]:
        answers: list[Any] = [None] * len(self._prompts)
        failures: list[BaseException] = []

        def run(i: int) -> None:
            try:
                answers[i] = self._answer(self._prompts[i])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(self._prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return answers

    def _answer(self, prompt: str) -> Any:
        stream = self._model.stream(prompt, [self._image], max_tokens=self._max_tokens, ignore_eos=True)
        for _ in stream:
            pass
        return stream.answer


def summarize(pairs: Sequence[tuple[Round, Round]]) -> dict[str, Any]:
    """Returns medians of seconds and of their ratios (together / one after another), and counts the identical answers.

    With one thread, a busy machine hardly affects the ratio of CPU times; with several, CPU time includes their waiting
    for each other.

    `first_differences`: for each answer that differs, the number of tokens before the first difference.
    """
    ratios = [together.seconds / alone.seconds for alone, together in pairs]
    cpu_ratios = [together.cpu_s / alone.cpu_s for alone, together in pairs]
    differences = [
        common_length(one, other)
        for alone, together in pairs
        for one, other in zip(alone.answers, together.answers, strict=True)
        if one != other
    ]
    n_answers = sum(len(alone.answers) for alone, _ in pairs)
    return {
        "alone_s": round(statistics.median(alone.seconds for alone, _ in pairs), 4),
        "together_s": round(statistics.median(together.seconds for _, together in pairs), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "cpu_ratio": round(statistics.median(cpu_ratios), 4),
        "cpu_ratio_range": [round(min(cpu_ratios), 4), round(max(cpu_ratios), 4)],
        "tokens_alone": pairs[-1][0].n_tokens,
        "tokens_together": pairs[-1][1].n_tokens,
        "calls_alone": pairs[-1][0].n_calls,
        "calls_together": pairs[-1][1].n_calls,
        "answers": n_answers,
        "same": n_answers - len(differences),
        "first_differences": differences,
    }


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _line(alone: Round, together: Round) -> str:
    same = sum(one == other for one, other in zip(alone.answers, together.answers, strict=True))
    return (
        f"{alone.seconds:.2f} s alone, {together.seconds:.2f} s together ({together.seconds / alone.seconds:.2f}; "
        f"of CPU time {together.cpu_s / alone.cpu_s:.2f}); "
        f"{alone.n_tokens} and {together.n_tokens} tokens; {same} of {len(alone.answers)} the same"
    )


if __name__ == "__main__":
    main()
