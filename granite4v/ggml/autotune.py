"""Which way of multiplying a weight type is fastest on this machine: measured once, kept in the user's cache.

No rule holds across CPUs: on one, half-precision weights are faster widened to float32 first; on another,
rearranged by ggml's repack buffer type, which for some types costs speed instead. And a virtual machine may
announce instructions (AMX) that fault when used, which ends the process. So each way is tried in a child
process on a product of real size; a child that dies marks its way as unusable.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from granite4v.child import run_main
from granite4v.ggml.library import lib
from granite4v.paths import read_json_cache, write_json_cache

if TYPE_CHECKING:
    from granite4v.ggml.backend import Backend

N_IN, N_OUT, N_TOKENS = 1152, 4352, 512  # a vision FFN's and a small prefill's shape; K-quants need a multiple of 256
K_QUANT_N_IN = 1280
REPEATS = 4
ROUNDS = 2  # the ways take turns, so that what else the machine does for a moment falls on all of them
TIMEOUT_S = 60.0
PLAIN, FLOAT32 = "plain", "float32"
CACHE = "speed.json"
# Two ways within this ratio count as equal; the more exact one (float32), then the plain one, is taken.
EQUAL = 1.04


@dataclass(frozen=True)
class Way:
    """How weights of one type are multiplied: as they are, widened to float32, or from another buffer type."""

    name: str
    as_float32: bool = False
    buffer_type: Any = None


def ways(backend: Backend, type_names: set[str]) -> dict[str, Way]:
    """The fastest way for each of these weight types on a backend; a type without an entry stays plain.

    Measures on the first call on a machine (a few seconds), else reads the user's cache. A GPU has one way.
    """
    from granite4v.ggml.backend import buffer_type_name

    if not backend.is_cpu:
        return {}
    extra = {buffer_type_name(buffer_type): buffer_type for buffer_type in backend.extra_buffer_types()}
    chosen = {}
    for type_name in sorted(type_names - {"F32"}):
        name = fastest(type_name, seconds(backend, type_name))
        if name == FLOAT32:
            chosen[type_name] = Way(name, as_float32=True)
        elif name in extra:
            chosen[type_name] = Way(name, buffer_type=extra[name])
    return chosen


def fastest(type_name: str, measured: dict[str, float]) -> str:
    """The name of the way to take from measured seconds; ways within `EQUAL` of the best go to the more exact."""
    best = min(measured.values(), default=math.inf)
    for name in (FLOAT32, PLAIN, *measured):
        if name in measured and measured[name] <= best * EQUAL and measured[name] < math.inf:
            return name
    return PLAIN


def seconds(backend: Backend, type_name: str) -> dict[str, float]:
    """Seconds of one product for each way this backend offers for a type; infinity for a way that crashes."""
    from granite4v.ggml.backend import buffer_type_name

    n_in = _n_in(type_name)
    names = [PLAIN, FLOAT32]
    names += [
        buffer_type_name(buffer_type)
        for buffer_type in backend.extra_buffer_types()
        if backend.multiplies(buffer_type, type_name, n_in, N_OUT)
    ]
    cache = _read_cache()
    known: dict[str, float] = {k: v for k, v in cache.get(_key(type_name, backend.n_threads), {}).items() if k in names}
    missing = [name for name in names if name not in known]
    if missing:
        for name in missing * ROUNDS:
            if known.get(name, 0.0) < math.inf:
                measured = _measure_in_child(type_name, name, backend.n_threads)
                known[name] = min(measured, known.get(name, math.inf))
        cache = _read_cache()
        cache.setdefault(_key(type_name, backend.n_threads), {}).update(known)
        write_json_cache(CACHE, cache)
    return {name: known[name] for name in names}


def _n_in(type_name: str) -> int:
    return K_QUANT_N_IN if type_name.endswith("_K") else N_IN


def _measure_in_child(type_name: str, way: str, n_threads: int) -> float:
    try:
        child = run_main(__name__, [type_name, way, str(n_threads)], TIMEOUT_S)
    except OSError:  # no memory for another process
        return math.inf
    if child.status != 0:
        return math.inf
    try:
        measured = float(child.stdout.split()[-1])
    except (IndexError, ValueError):
        return math.inf
    return measured if measured > 0 else math.inf


def measure(type_name: str, way: str, n_threads: int) -> float:
    """Seconds of one product in this process (which a faulty way may end): the best of a few, after a warm-up."""
    import time

    import numpy as np

    from granite4v.ggml.backend import Arena, Backend, buffer_type_name, set_data
    from granite4v.ggml.graph import Graph, Tensor
    from granite4v.ggml.quantize import quantize_rows

    backend, n_in = Backend("cpu", n_threads), _n_in(type_name)
    buffer_types = {buffer_type_name(buffer_type): buffer_type for buffer_type in backend.extra_buffer_types()}
    values = np.random.default_rng(0).standard_normal((N_OUT, n_in), dtype=np.float32)
    arena = Arena(1)
    weight = arena.tensor(type_name, n_in, N_OUT)
    arena.allocate(buffer_types.get(way, backend.buffer_type), weights=True)
    set_data(weight, quantize_rows(values, type_name, n_threads))
    graph = Graph(backend, 8)
    x = graph.input("x", "F32", n_in, N_TOKENS)
    matrix = graph.cast(Tensor(weight), "F32") if way == FLOAT32 else Tensor(weight)
    graph.output("y", graph.matmul(matrix, x))
    inputs = values[:N_TOKENS].copy()
    best = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        graph.run(x=inputs)
        best = min(best, time.perf_counter() - start)
    return best


def _key(type_name: str, n_threads: int) -> str:
    return f"{_cpu_model()}|ggml {lib().ggml_version().decode()}|{n_threads} threads|{type_name}"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        names = {key.strip(): value.strip() for key, value in fields.items()}
        return f"{names.get('model name', '?')} {names.get('model', '')}.{names.get('stepping', '')}"
    except OSError:
        return platform.processor() or platform.machine()


def _read_cache() -> dict[str, dict[str, float]]:
    """What was measured; entries that are no times are left out, and so measured again."""
    return {
        key: {way: float(seconds) for way, seconds in entry.items() if _is_time(seconds)}
        for key, entry in read_json_cache(CACHE).items()
        if isinstance(entry, dict)
    }


def _is_time(value: Any) -> bool:
    """Positive seconds; infinity is that of a way that crashed."""
    return isinstance(value, float | int) and not isinstance(value, bool) and value > 0


def main(type_name: str, way: str, n_threads: str) -> None:
    """What the child process does."""
    print(measure(type_name, way, int(n_threads)))
