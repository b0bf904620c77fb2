"""Times kernels on matrix products of realistic size, in a child process that a faulty kernel may crash. `autotune`
runs it.

A product of many rows is limited by arithmetic, one of a few rows by reading the weights from memory. So a few rows are
multiplied with more weights than most CPU caches hold, as when a model decodes tokens.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from typing import NamedTuple

import numpy as np

from granite4v.ggml.backend import Arena, Backend, set_data, use_large_pages
from granite4v.ggml.compiled.nodes import NodeKernels, replace
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.kernels import (
    ATTENTION,
    COMPILED,
    N_IN,
    N_OUT,
    Kernel,
    available_kernels,
    compiled_kernels,
    n_in,
    prompt_kernels,
)
from granite4v.ggml.quantize import quantize_rows

MANY = 512  # rows; as in a small prefill, or a tile
ROUNDS = 2  # the kernels take turns, so that a moment of other load does not always hit the same one
FEW_ROWS_BYTES = 64 << 20  # bytes of weights for a product of a few rows: more than most caches hold
TILES = 4  # products with one matrix, which is widened once for all of them
MAX_NODES = 1000
# Enough runs that one is undisturbed: if another program takes a core for a few milliseconds, all kernels look equal.
MIN_REPEATS, MAX_REPEATS, ENOUGH_S = 2, 60, 0.15


class Trial(NamedTuple):
    """One measurement to make: a weight type, a kernel by name, and the number of rows multiplied at once."""

    type_name: str
    kernel: str
    n_rows: int


def measure(trial: Trial, n_threads: int) -> float:
    """Measures one product `[N_OUT, n_in]` x `[n_in, n_rows]`, or one layer's attention, in this process. Returns the
    best time of several runs, in seconds.
    """
    backend = Backend("cpu", n_threads)
    graph = Graph(backend, MAX_NODES)
    try:
        kind = trial.type_name
        kernels = available_kernels(backend, kind) | prompt_kernels(kind) | compiled_kernels(kind, trial.n_rows)
        kernel = kernels[trial.kernel]
        measured = _attention if trial.type_name == ATTENTION else _product
        return measured(graph, kernel, trial)
    finally:
        graph.close()
        backend.close()


def _product(graph: Graph, kernel: Kernel, trial: Trial) -> float:
    backend = graph.backend
    length, data = n_in(trial.type_name), _weights(trial.type_name, backend.n_threads)
    many = trial.n_rows >= MANY
    n_matrices = 1 if many else max(1, FEW_ROWS_BYTES // data.nbytes)
    arena = Arena(n_matrices)
    try:
        weights = [arena.tensor(trial.type_name, length, N_OUT) for _ in range(n_matrices)]
        arena.allocate(kernel.buffer_type or backend.buffer_type, weights=True)
        if not many:  # as for the copies that decode steps use (see runtime/llama/weight_copies)
            use_large_pages(arena.buffer)
        for weight in weights:
            set_data(weight, data)
        x = graph.input("x", "F32", length, trial.n_rows)
        matrices = [kernel.matrix(graph, Tensor(weight)) for weight in weights] * (TILES if many else 1)
        products = [graph.expand(kernel.product(graph, matrix, x)) for matrix in matrices]
        if trial.kernel == COMPILED:
            for product in products:
                replace(product.ptr, NodeKernels(products=(trial.type_name,)))
        graph.output("y", graph.scale(products[-1], 1.0))
        return _best(graph, x=_values()[: trial.n_rows, :length].copy()) / len(products)
    finally:
        arena.close()


def _attention(graph: Graph, kernel: Kernel, trial: Trial) -> float:
    """Times attention with 16 heads of 72, as in a SigLIP tower."""
    n_heads, head = 16, N_IN // 16
    q, k, v = (graph.input(name, "F32", N_IN, trial.n_rows) for name in ("q", "k", "v"))
    if kernel.arithmetic is None:
        q, k, v = (graph.permute(graph.reshape(x, head, n_heads, trial.n_rows), 0, 2, 1, 3) for x in (q, k, v))
        mixed = graph.flash_attention(q, k, v, head**-0.5)
    else:
        mixed = graph.product_attention(q, k, v, n_heads, kernel.arithmetic)
    graph.output("y", graph.cast(mixed, "F32"))
    values = _values()[: trial.n_rows, :N_IN].copy()
    return _best(graph, q=values, k=values, v=values)


def _best(graph: Graph, **inputs: np.ndarray) -> float:
    graph.run(**inputs)
    seconds: list[float] = []
    while len(seconds) < MIN_REPEATS or (sum(seconds) < ENOUGH_S and len(seconds) < MAX_REPEATS):
        start = time.perf_counter()
        graph.run(**inputs)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@functools.cache
def _values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N_OUT, 1280), dtype=np.float32)


@functools.cache
def _weights(type_name: str, n_threads: int) -> np.ndarray:
    return quantize_rows(np.ascontiguousarray(_values()[:, : n_in(type_name)]), type_name, n_threads)


def main(n_threads: str, trials: str) -> None:
    """Runs in the child process: measures `trials`, a JSON list.

    Prints the line `[i]` when trial i begins and `[i, seconds]` when it ends. So if the process ends in between, the
    parent knows which trial crashed it. `[i, null]`: the trial failed for another reason, such as no memory.
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
