"""Measures the gain of decoding several sequences at once on the CPU, with unified and with separate KV buffers.

    python -m scripts.batch_speed nano
    python -m scripts.batch_speed build/full-model --steps 4 --rounds 3

All contexts stay open and take turns, so that other load on the machine affects all of them: 'single' has one sequence,
'unified' and 'separate' have `--sequences`. Every sequence has `--used` tokens in cells of its own, which are prefilled
once and restored from the saved state; 'shared' is 'unified' with one prefix whose cells all sequences share. Figures
are medians over the rounds; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import GgufFile
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.llama.placement import Placement, choose_placement
from granite4v.runtime.llama.weight_copies import open_model
from scripts.batch_exactness import N_UBATCH, Context, Setting, text_path

ROWS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a text GGUF, a model directory, or 'nano'")
    parser.add_argument("--used", type=int, default=1500, help="tokens that every sequence holds (1500)")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="decode calls of one round (16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prefill", type=int, default=N_UBATCH, help=f"tokens of a timed prefill ({N_UBATCH})")
    options = parser.parse_args()
    path = text_path(options.model)
    with open_model(path, _placement(path, options.threads)) as model:
        contexts = _contexts(model, options)
        seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for i in range(options.rounds):
            for name, bench in contexts.items():
                for n in ROWS:
                    if n <= bench.n_filled:
                        seconds[name][str(n)].append(bench.steps(n, options.steps))
                seconds[name]["prefill"].append(bench.prefill(options.prefill))
            print(f"round {i + 1} of {options.rounds}: {_medians(seconds)}", file=sys.stderr, flush=True)
        middle = _medians(seconds)
    one = middle["single"]["1"]
    print(
        json.dumps(
            {
                "model": options.model,
                "used": options.used,
                "threads": options.threads,
                "tokens_per_s": {
                    name: {n: round(int(n) / s, 2) for n, s in figures.items() if n != "prefill"}
                    for name, figures in middle.items()
                },
                "ratio_to_single": {
                    name: {n: round(int(n) * one / s, 3) for n, s in figures.items() if n != "prefill"}
                    for name, figures in middle.items()
                },
                "prefill_tokens_per_s": {
                    name: round(options.prefill / figures["prefill"], 1) for name, figures in middle.items()
                },
                "memory": {name: bench.memory_lines for name, bench in contexts.items()},
            }
        )
    )


class Bench:
    """One context with `n_filled` sequences of equal length, timed repeatedly."""

    def __init__(
        self, model: LlamaModel, options: argparse.Namespace, n_seq_max: int, *, unified: bool, n_filled: int
    ) -> None:
        self.n_filled, self._used = n_filled, options.used
        room = -(-(options.used + N_UBATCH + 64) // 256) * 256
        setting = Setting("", "", options.threads, True, unified, options.used)
        with _Listener() as listener:
            self.context = Context(model, setting, n_seq_max=n_seq_max, n_ctx=room * n_seq_max, n_outputs_max=8)
        self.memory_lines = [line for line in listener.lines if "buffer size" in line]
        self._rng = np.random.default_rng(1)
        self._n_vocab = min(model.n_vocab, 380)

    def fill(self, state: np.ndarray | None, *, shared: bool) -> np.ndarray:
        """Fills the first sequence from a saved state, or by a prefill, and copies it to the others. Returns the state.

        With `shared` all sequences share the cells of the first; otherwise each has its own.
        """
        if state is None:
            self.context.extend(self._tokens(self._used), 0, 0)
            state = self.context.full_state(0)
        else:
            self.context.restore(0, state)
        for sequence in range(1, self.n_filled):
            if shared:
                self.context.copy(0, sequence, self._used)
            else:
                self.context.restore(sequence, state)
        return state

    def steps(self, n_rows: int, n_steps: int) -> float:
        """Returns the mean seconds of `n_steps` decode calls with one row of each of `n_rows` sequences."""
        start = time.perf_counter()
        for i in range(n_steps):
            rows = [(token, self._used + i, sequence) for sequence, token in enumerate(self._tokens(n_rows))]
            self.context.decode(rows, [True] * n_rows)
        elapsed = (time.perf_counter() - start) / n_steps
        for sequence in range(n_rows):
            self.context.cut(sequence, self._used)
        return elapsed

    def prefill(self, n_tokens: int) -> float:
        """Returns the seconds of prefilling a chunk of tokens that continues the first sequence."""
        start = time.perf_counter()
        self.context.extend(self._tokens(n_tokens), self._used, 0)
        elapsed = time.perf_counter() - start
        self.context.cut(0, self._used)
        return elapsed

    def _tokens(self, n: int) -> list[int]:
        return [int(token) for token in self._rng.integers(0, self._n_vocab, n)]


class _Listener(logging.Handler):
    """Collects llama.cpp's log messages while a context is created."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _Listener:
        logger = logging.getLogger("granite4v.llama")
        self._level = logger.level
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("granite4v.llama")
        logger.removeHandler(self)
        logger.setLevel(self._level)


def _contexts(model: LlamaModel, options: argparse.Namespace) -> dict[str, Bench]:
    n = options.sequences
    contexts = {
        "single": Bench(model, options, 1, unified=False, n_filled=1),
        "unified": Bench(model, options, n, unified=True, n_filled=n),
        "separate": Bench(model, options, n, unified=False, n_filled=n),
        "shared": Bench(model, options, n, unified=True, n_filled=n),
        "unified, one filled": Bench(model, options, n, unified=True, n_filled=1),
    }
    state = None
    for name, bench in contexts.items():
        print(f"filling '{name}' ...", file=sys.stderr, flush=True)
        if name == "separate":  # its state format differs: it begins with the number of streams
            bench.fill(None, shared=False)
        else:
            state = bench.fill(state, shared=name == "shared")
    return contexts


def _medians(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {n: round(statistics.median(values), 5) for n, values in figures.items()}
        for name, figures in seconds.items()
    }


def _placement(path: Path, n_threads: int) -> Placement:
    backend = Backend("cpu", n_threads)
    try:
        with GgufFile.open(path) as file:
            return choose_placement(file.tensors, backend)
    finally:
        backend.close()


if __name__ == "__main__":
    main()
