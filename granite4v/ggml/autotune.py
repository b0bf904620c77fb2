"""Which kernel multiplies each weight type fastest on this machine, for the image side and for the text model.

No rule holds across CPUs: on one, half-precision weights are faster widened to float32 first; on another, in ggml's
repack buffer type, which for some types costs speed instead. And a virtual machine may announce instructions (AMX)
that fault when used, or a compiler may have broken a kernel; either ends the process. So each kernel is timed in a
child process (`kernel_timing`), where one that ends its process counts as unusable. The times are kept in the user's
cache for each CPU, ggml version, number of threads and type.

The two sides choose from the same times by different rules. The image side maps its file and copies what another
buffer type takes, so it takes the fastest kernel, the more exact of equals. The text model is opened by llama.cpp,
which knows no widened weights, and leaving the file's mapping costs as much memory again as the weights.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from granite4v.child import run_main
from granite4v.ggml import kernel_timing
from granite4v.ggml.backend import Backend, buffer_type_name
from granite4v.ggml.kernel_timing import FLOAT32, N_OUT, PLAIN, n_in
from granite4v.ggml.library import lib
from granite4v.paths import read_json_cache, write_json_cache

ROUNDS = 2  # the kernels take turns, so that what else the machine does for a moment falls on all of them
TIMEOUT_S = 60.0
CACHE = "kernels.json"
# Image side: kernels within this ratio count as equal; the more exact one (float32), then the plain one, is taken.
EQUAL = 1.04
# Text model: another buffer type must take at most this share of the plain time to be worth the memory.
WORTH = 0.93
EXACT_TYPES = frozenset({"F32"})  # multiplied as they are: no kernel is more exact, and none was faster


@dataclass(frozen=True)
class Kernel:
    """How weights of one type are multiplied: as they are, widened to float32, or from another buffer type."""

    name: str
    as_float32: bool = False
    buffer_type: Any = None


def vision_kernels(backend: Backend, type_names: Iterable[str]) -> dict[str, Kernel]:
    """The kernel for each weight type of a vision file; a type without an entry is multiplied as it is.

    Measures on the first call on a machine (a few seconds). A GPU has one kernel for each type.
    """
    if not backend.is_cpu:
        return {}
    extra = extra_buffer_types(backend)
    chosen = {}
    for type_name in sorted(set(type_names) - EXACT_TYPES):
        name = fastest_kernel(seconds(backend, type_name))
        if name == FLOAT32:
            chosen[type_name] = Kernel(name, as_float32=True)
        elif name in extra:
            chosen[type_name] = Kernel(name, buffer_type=extra[name])
    return chosen


def text_kernels(backend: Backend, type_names: Iterable[str]) -> dict[str, Kernel]:
    """The kernel for each weight type of a text file that gains by another buffer type; the others stay mapped.

    Measures on the first call on a machine (a few seconds).
    """
    extra = extra_buffer_types(backend) if backend.is_cpu else {}
    if not extra:
        return {}
    found = {kind: worthwhile(seconds(backend, kind), extra) for kind in sorted(set(type_names) - EXACT_TYPES)}
    return {kind: Kernel(name, buffer_type=extra[name]) for kind, name in found.items() if name != PLAIN}


def fastest_kernel(measured: Mapping[str, float]) -> str:
    """The kernel to take from measured seconds; those within `EQUAL` of the best go to the more exact."""
    best = min(measured.values(), default=math.inf)
    for name in (FLOAT32, PLAIN, *measured):
        if name in measured and measured[name] <= best * EQUAL and measured[name] < math.inf:
            return name
    return PLAIN


def worthwhile(measured: Mapping[str, float], buffer_types: Collection[str]) -> str:
    """The buffer type to take from measured seconds, or 'plain' unless another is clearly faster."""
    plain = measured.get(PLAIN, math.inf)
    best = min(buffer_types, key=lambda name: measured.get(name, math.inf), default=PLAIN)
    return best if measured.get(best, math.inf) < plain * WORTH else PLAIN


def extra_buffer_types(backend: Backend) -> dict[str, Any]:
    """The buffer types that rearrange weights, by name."""
    return {buffer_type_name(buffer_type): buffer_type for buffer_type in backend.extra_buffer_types()}


def seconds(backend: Backend, type_name: str) -> dict[str, float]:
    """Seconds of one product for each kernel this backend has for a type; infinity for one that crashes."""
    names = [PLAIN, FLOAT32]
    names += [
        name
        for name, buffer_type in extra_buffer_types(backend).items()
        if backend.multiplies(buffer_type, type_name, n_in(type_name), N_OUT)
    ]
    key = cache_key(type_name, backend.n_threads)
    known = {name: value for name, value in _read_cache().get(key, {}).items() if name in names}
    missing = [name for name in names if name not in known]
    for name in missing * ROUNDS:
        if known.get(name, 0.0) < math.inf:  # one that crashed is not tried again
            known[name] = min(measure_in_child(type_name, name, backend.n_threads), known.get(name, math.inf))
    if missing:
        cache = _read_cache()  # again: another process may have added to it meanwhile
        cache.setdefault(key, {}).update(known)
        write_json_cache(CACHE, cache)
    return {name: known[name] for name in names}


def measure_in_child(type_name: str, kernel: str, n_threads: int) -> float:
    """Seconds of one product; infinity when the child gives no time."""
    try:
        child = run_main(kernel_timing.__name__, [type_name, kernel, str(n_threads)], TIMEOUT_S)
    except OSError:  # no memory for another process
        return math.inf
    if child.status != 0:
        return math.inf
    try:
        measured = float(child.stdout.split()[-1])
    except (IndexError, ValueError):
        return math.inf
    return measured if measured > 0 else math.inf


def cache_key(type_name: str, n_threads: int) -> str:
    """What a measurement depends on."""
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
    """What was measured; values that are not times are left out, and so measured again."""
    return {
        key: {name: float(value) for name, value in entry.items() if _is_time(value)}
        for key, entry in read_json_cache(CACHE).items()
        if isinstance(entry, dict)
    }


def _is_time(value: Any) -> bool:
    """Positive seconds; infinity is that of a kernel that crashed."""
    return isinstance(value, float | int) and not isinstance(value, bool) and value > 0
