"""Times one kernel on a matrix product of realistic size, in a process that a faulty kernel may crash. Run by
`autotune`."""

from __future__ import annotations

import math
import time

import numpy as np

from granite4v.ggml.backend import Arena, Backend, buffer_type_name, set_data
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.quantize import quantize_rows
from granite4v.ggml.types import block_size

PLAIN, FLOAT32 = "plain", "float32"  # kernels that need no buffer type; the others are called as theirs
N_OUT, N_TOKENS = 4352, 512  # a vision FFN's width, and a small prefill
N_IN, N_IN_OF_256 = 1152, 1280  # a vision tower's width, and the next multiple of 256
REPEATS = 4


def n_in(type_name: str) -> int:
    """The length of the rows that are multiplied: about a vision tower's width, a multiple of the type's block."""
    return N_IN if N_IN % block_size(type_name) == 0 else N_IN_OF_256


def measure(type_name: str, kernel: str, n_threads: int) -> float:
    """Seconds of one product in this process: the best of a few, after a warm-up."""
    backend, length = Backend("cpu", n_threads), n_in(type_name)
    buffer_types = {buffer_type_name(buffer_type): buffer_type for buffer_type in backend.extra_buffer_types()}
    values = np.random.default_rng(0).standard_normal((N_OUT, length), dtype=np.float32)
    arena = Arena(1)
    weight = arena.tensor(type_name, length, N_OUT)
    arena.allocate(buffer_types.get(kernel, backend.buffer_type), weights=True)
    set_data(weight, quantize_rows(values, type_name, n_threads))
    graph = Graph(backend, 8)
    x = graph.input("x", "F32", length, N_TOKENS)
    matrix = graph.cast(Tensor(weight), "F32") if kernel == FLOAT32 else Tensor(weight)
    graph.output("y", graph.matmul(matrix, x))
    inputs = values[:N_TOKENS].copy()
    best = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        graph.run(x=inputs)
        best = min(best, time.perf_counter() - start)
    return best


def main(type_name: str, kernel: str, n_threads: str) -> None:
    """What the child process does: prints the seconds."""
    print(measure(type_name, kernel, int(n_threads)))
