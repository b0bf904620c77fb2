"""Measures the milliseconds of a decode step with and without the compiled kernels, by number of sequences.

    python -m scripts.decode_steps build/full-model
    python -m scripts.decode_steps build/full-model --tokens 256 --sequences 1 16

Each sequence has `--tokens` tokens and is given one more. 'compiled' is what the engine does with the extra 'llvm';
'ggml' and 'ggml flash' are what it does without it, for conversations and for batches. Each has the weights in the form
that suits it, and they take turns. Figures are medians. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from granite4v.ggml.backend import Backend
from granite4v.ggml.compiled.nodes import NO_KERNELS, NodeKernels
from granite4v.runtime.engine.parallel import node_kernels
from granite4v.runtime.llama.context import BatchRows, LlamaContext, node_callback
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.placement import N_UBATCH, choose_placement
from granite4v.runtime.llama.weight_copies import open_model

N_SPARE = 64  # cells
Way = tuple[NodeKernels, bool]  # kernels, and whether with flash attention


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("--tokens", type=int, default=1300, help="in each sequence (1300)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with ModelFiles.open(options.model) as files:
        kernels = node_kernels(files, "cpu", "f16")
        if not kernels:
            raise SystemExit("no kernels are compiled here: they need the extra 'llvm' and a CPU with AVX-512.")
        ways = {"ggml": (NO_KERNELS, False), "ggml flash": (NO_KERNELS, True), "compiled": (kernels, True)}
        found = {n: measured(files, ways, n, options) for n in options.sequences}
    for n, taken in found.items():
        print(f"{n:3} sequences: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in taken.items()))
    ratios = {
        n: round(min(ms for name, ms in taken.items() if name != "compiled") / taken["compiled"], 3)
        for n, taken in found.items()
    }
    print(json.dumps({"tokens": options.tokens, "threads": options.threads, "ms": found, "fastest / compiled": ratios}))
    return 0


def measured(files: ModelFiles, ways: dict[str, Way], n: int, options: argparse.Namespace) -> dict[str, float]:
    """Returns the milliseconds of a step of `n` sequences in each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with contextlib.ExitStack() as stack:
        contexts = {name: stack.enter_context(opened(files, way, n, options)) for name, way in ways.items()}
        for number in range(options.rounds + 1):  # the first warms up
            for name, context in contexts.items():
                taken = step(context, n, options.tokens)
                if number:
                    seconds[name].append(taken)
    return {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}


@contextlib.contextmanager
def opened(files: ModelFiles, way: Way, n: int, options: argparse.Namespace) -> Iterator[LlamaContext]:
    kernels, flash = way
    backend = Backend("cpu", options.threads)
    try:
        placement = choose_placement(
            files.text.tensors, backend, for_many=n > 1 and flash, compiled=bool(kernels.products)
        )
    finally:
        backend.close()
    more: dict[str, Any] = {"n_seq_max": n, "flash": flash, "node_callback": node_callback(kernels)}
    with (
        open_model(files.text.path, placement, n_threads=options.threads) as model,
        LlamaContext(model, options.tokens + N_SPARE, N_UBATCH, options.threads, **more) as context,
    ):
        for start in range(0, options.tokens, N_UBATCH):
            tokens = np.arange(start, min(start + N_UBATCH, options.tokens), dtype=np.int32) % model.n_vocab
            context.decode(BatchRows.of(tokens, start, 0, output=False))
        for number in range(1, n):
            context.copy(0, number, options.tokens)
        yield context


def step(context: LlamaContext, n: int, n_tokens: int) -> float:
    token = np.zeros(1, dtype=np.int32)
    rows = BatchRows.joined([BatchRows.of(token, n_tokens, number, output=True) for number in range(n)])
    start = time.perf_counter()
    context.decode(rows)
    taken = time.perf_counter() - start
    for number in range(n):
        context.truncate(number, n_tokens)
    return taken


if __name__ == "__main__":
    raise SystemExit(main())
