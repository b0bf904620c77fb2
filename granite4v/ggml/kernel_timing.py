"""Times kernels on matrix products of realistic size, in a process that a faulty kernel may end. Run by `autotune`.

A product of many rows is limited by arithmetic, one of a few rows by reading the weights from memory. So few rows are
multiplied with more weights than a CPU's cache holds, as it is in a model whose tokens are decoded.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from typing import NamedTuple

import numpy as np

from granite4v.ggml.backend import Arena, Backend, set_data
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.kernels import N_OUT, available_kernels, n_in
from granite4v.ggml.quantize import quantize_rows

MANY = 512  # rows of a small prefill, or of a tile
ROUNDS = 2  # the kernels take turns, so that what else the machine does for a moment falls on all of them
FEW_ROWS_BYTES = 64 << 20  # of weights for a few rows: more than most caches
MIN_REPEATS, MAX_REPEATS, ENOUGH_S = 2, 20, 0.05


class Trial(NamedTuple):
    """One thing to measure: a weight type, a kernel by name, and how many rows are multiplied at once."""

    type_name: str
    kernel: str
    n_rows: int


def measure(trial: Trial, n_threads: int) -> float:
    """Seconds of one product `[N_OUT, n_in]` x `[n_in, n_rows]` in this process: the best of a few."""
    backend = Backend("cpu", n_threads)
    kernel = available_kernels(backend, trial.type_name)[trial.kernel]
    length, data = n_in(trial.type_name), _weights(trial.type_name, n_threads)
    n_matrices = 1 if trial.n_rows >= MANY else max(1, FEW_ROWS_BYTES // data.nbytes)
    arena = Arena(n_matrices)
    weights = [arena.tensor(trial.type_name, length, N_OUT) for _ in range(n_matrices)]
    arena.allocate(kernel.buffer_type or backend.buffer_type, weights=True)
    for weight in weights:
        set_data(weight, data)
    graph = Graph(backend, 4 * n_matrices + 4)
    x = graph.input("x", "F32", length, trial.n_rows)
    products = [kernel.product(graph, Tensor(weight), x) for weight in weights]
    for product in products[:-1]:
        graph.expand(product)
    graph.output("y", products[-1])
    try:
        return _best(graph, _values()[: trial.n_rows, :length].copy()) / n_matrices
    finally:
        graph.close()
        arena.close()
        backend.close()


def _best(graph: Graph, x: np.ndarray) -> float:
    graph.run(x=x)
    seconds: list[float] = []
    while len(seconds) < MIN_REPEATS or (sum(seconds) < ENOUGH_S and len(seconds) < MAX_REPEATS):
        start = time.perf_counter()
        graph.run(x=x)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@functools.cache
def _values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N_OUT, 1280), dtype=np.float32)


@functools.cache
def _weights(type_name: str, n_threads: int) -> np.ndarray:
    return quantize_rows(np.ascontiguousarray(_values()[:, : n_in(type_name)]), type_name, n_threads)


def main(n_threads: str, trials: str) -> None:
    """What the child process does: `trials` is a JSON list of trials.

    Prints a line when one begins, `[i]`, and one when it ends, `[i, seconds]`; so if the process ends in between, its
    parent knows which one did it. `[i, null]`: it could not be tried, for a reason of this process (no memory).
    """
    todo = [Trial(*each) for each in json.loads(trials)]
    for _ in range(ROUNDS):
        for i, trial in enumerate(todo):
            print(json.dumps([i]), flush=True)
            try:
                seconds = measure(trial, int(n_threads))
            except Exception as error:  # the others may still be measured
                print(f"{trial}: {error}", file=sys.stderr)
                print(json.dumps([i, None]), flush=True)
            else:
                print(json.dumps([i, seconds]), flush=True)
