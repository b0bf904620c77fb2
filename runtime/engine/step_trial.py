"""Measures how long a decode step takes by its number of sequences, in a child process, once per machine and model.

How much is gained by more sequences depends on the CPU, the weight types and the size of the model: on two cores of an
AVX-512 CPU a 4B model in Q4_K_M decodes 2.3 times the tokens per second with 16 sequences and gains little beyond; on
other machines 4 are as good as 16, or 32 are better. The child places the weights as a batch does, with a few hundred
tokens in each sequence. Longer contexts favour fewer sequences slightly, because of the time for attention.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from granite4v.child import run_main
from granite4v.ggml import autotune
from granite4v.ggml.backend import Backend
from granite4v.ggml.compiled.nodes import NO_KERNELS, NodeKernels
from granite4v.ggml.gguf_file import GgufFile, n_weights
from granite4v.paths import read_json_cache, write_json_cache
from granite4v.runtime.llama.context import BatchRows, LlamaContext, node_callback
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.placement import N_UBATCH, choose_placement
from granite4v.runtime.llama.weight_copies import open_model

CACHE = "steps.json"
VERSION = 1  # increment when something else is measured
NUMBERS = (1, 2, 4, 8, 12, 16, 32)
PREFIX_TOKENS, PREFIX_S = 512, 4.0  # contents of each sequence: this many tokens, or fewer if slow
N_CELLS = PREFIX_TOKENS + 256  # per sequence
ROUNDS, ROUNDS_S = 3, 6.0  # rounds over all numbers of sequences; no more after this many seconds
TIMEOUT_S = 120.0  # for the child, which also reads the weights


def step_seconds(
    files: ModelFiles,
    n_threads: int,
    most: int,
    announce: Callable[[], None] | None = None,
    kernels: NodeKernels = NO_KERNELS,
) -> dict[int, float]:
    """Seconds of a decode step with one row per sequence, by number of sequences, ascending, up to the first number
    that is not less than `most`. Empty for a small model, for which measuring takes longer than it could gain, and if
    the measurement failed.

    Measured by the first call on a machine; `announce` is called before that. Takes `N_CELLS` cells per sequence.
    `kernels`: those of the engine.
    """
    if sum(n_weights(files.text.tensors.values()).values()) < autotune.SMALL:
        return {}
    numbers = [n for n, before in zip(NUMBERS, (0, *NUMBERS), strict=False) if before < most]
    key = _cache_key(files, n_threads, kernels)
    known = _read_cache(key)
    if known is not None and max(numbers) <= known[0]:
        return known[1]
    if announce is not None:
        announce()
    adapter = str(files.adapter.path) if files.adapter else ""
    try:
        arguments = [str(files.text.path), adapter, str(n_threads), json.dumps(numbers), kernels.to_json()]
        ended = run_main(__name__, arguments, TIMEOUT_S, None)
    except OSError:  # not enough memory for another process
        return {}
    found = _read_lines(ended.stdout)
    write_json_cache(CACHE, {**read_json_cache(CACHE), key: {"most": max(numbers), "seconds": found}})
    return found


def _cache_key(files: ModelFiles, n_threads: int, kernels: NodeKernels) -> str:
    """What measurements depend on: the machine, the build, and the sizes of the model."""
    weights = n_weights(files.text.tensors.values())
    kinds = ", ".join(f"{weights[kind]} {kind}" for kind in sorted(weights))
    compiled = f"|{kernels.description}" if kernels else ""
    return f"{VERSION}|{autotune.cache_key(n_threads)}|{kinds}{', adapter' if files.adapter else ''}{compiled}"


def _read_cache(key: str) -> tuple[int, dict[int, float]] | None:
    """Returns the largest number of sequences that was tried, and the seconds; None if the entry is
    missing or damaged."""
    try:
        entry = read_json_cache(CACHE)[key]
        seconds = {int(n): _positive(taken) for n, taken in entry["seconds"].items()}
        return int(entry["most"]), dict(sorted(seconds.items()))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _positive(taken: Any) -> float:
    if not float(taken) > 0:
        raise ValueError
    return float(taken)


def _read_lines(printed: str) -> dict[int, float]:
    """The shortest time for each number of sequences; longer ones were disturbed by other load on the machine."""
    found: dict[int, float] = {}
    for line in printed.splitlines():
        try:
            n, taken = json.loads(line)
            found[int(n)] = min(_positive(taken), found.get(int(n), float("inf")))
        except (ValueError, TypeError):
            continue
    return dict(sorted(found.items()))


# --- in the child ---


def main(text: str, adapter: str, n_threads: str, numbers: str, compiled: str) -> None:
    """Runs in the child process: prints lines `[number of sequences, seconds]`."""
    path, threads, counts = Path(text), int(n_threads), list(map(int, json.loads(numbers)))
    kernels = NodeKernels.from_json(compiled)
    backend = Backend("cpu", threads)
    with GgufFile.open(path) as file:
        placement = choose_placement(file.tensors, backend, for_many=True, compiled=bool(kernels.products))
    backend.close()
    with open_model(path, placement, n_threads=threads) as model:
        if adapter:
            model.load_adapter(Path(adapter))
        n_ubatch = min(N_UBATCH, N_CELLS)
        callback, n_seq_max = node_callback(kernels), max(counts)
        with LlamaContext(model, N_CELLS, n_ubatch, threads, n_seq_max=n_seq_max, node_callback=callback) as context:
            context.set_adapter(bool(adapter))
            _measure(context, counts)


def _measure(context: LlamaContext, counts: Sequence[int]) -> None:
    n_prefix = _fill(context)
    for number in range(1, max(counts)):
        context.copy(0, number, n_prefix)
    _step(context, max(counts), n_prefix)  # makes llama.cpp carry out the copies
    end = time.perf_counter() + ROUNDS_S
    for _ in range(ROUNDS):
        for n in counts:
            print(json.dumps([n, _step(context, n, n_prefix)]), flush=True)
            if time.perf_counter() > end:
                return


def _fill(context: LlamaContext) -> int:
    """Decodes tokens into the first sequence. Returns how many."""
    start, n, n_chunk = time.perf_counter(), 0, PREFIX_TOKENS // 4
    while n < PREFIX_TOKENS and time.perf_counter() - start < PREFIX_S:
        tokens = np.arange(n, n + n_chunk, dtype=np.int32) % context.model.n_vocab
        context.decode(BatchRows.of(tokens, n, 0, output=False))
        n += n_chunk
    return n


def _step(context: LlamaContext, n_sequences: int, n_prefix: int) -> float:
    """Seconds of a step with one row for each of the first sequences, which are restored afterwards."""
    token = np.zeros(1, dtype=np.int32)
    rows = BatchRows.joined([BatchRows.of(token, n_prefix, number, output=True) for number in range(n_sequences)])
    start = time.perf_counter()
    context.decode(rows)
    seconds = time.perf_counter() - start
    for number in range(n_sequences):
        context.truncate(number, n_prefix)
    return seconds
