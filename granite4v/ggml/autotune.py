"""Chooses the fastest kernel for each weight type on this machine, for the vision file and for the text model.

No rule holds across CPUs: on one, half-precision weights are faster widened to float32 first; on another, in ggml's
repack buffer type, which is slower for some types. And some kernels crash the process: a virtual machine may announce
instructions (AMX) that fault when used, or the compiler may have miscompiled a kernel. So kernels are timed in a child
process (`kernel_timing`). If one crashes it, that kernel is recorded as crashed, and another child continues with the
rest. Times are cached for the user by CPU, build of ggml, version of oneDNN and number of threads.

The two sides choose from the same times by different rules. The image side multiplies hundreds of rows at once,
memory-maps its file, and copies weights that need another buffer type. It takes the fastest kernel, and of kernels that
are about equal the more exact one. The text model is opened by llama.cpp, which widens no weights. Prefill and decode
may use two forms of a weight, the mapped one and one copy (`runtime.llama.weight_copies`), so one kernel is chosen for
many rows and one for a few. If several buffer types are possible for the copy, a typical page decides (`PAGE`). A small
model may have widened copies for prompts.

A small file is not measured: it could gain less time than the measurement takes. It uses the plain kernel even if the
times are known, so that its results are the same on the first run and on all later ones.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from granite4v.child import run_main
from granite4v.ggml import kernel_timing, onednn
from granite4v.ggml.backend import Aborted, Backend
from granite4v.ggml.build import build_id
from granite4v.ggml.cpu_features import cpu_name
from granite4v.ggml.kernel_timing import MANY, Trial
from granite4v.ggml.kernels import (
    ATTENTION,
    COMPILED,
    FLOAT32,
    N_IN,
    N_OUT,
    ONEDNN,
    ONEDNN_BF16,
    PLAIN,
    Kernel,
    available_kernels,
    compiled_kernels,
    n_in,
    prompt_kernels,
)
from granite4v.paths import read_json_cache, write_json_cache

__all__ = ["Kernel", "page_seconds", "rates", "text_kernels", "times", "vision_kernels"]

CACHE = "kernels.json"
# Seconds for one call. A run makes at most two, one for the image side and one for the text model; `slow_weights` may
# take one more second for each. A type not measured by then uses the plain kernel, and is measured the next time.
BUDGET_S = 4.0
SMALL = 50_000_000  # number of weights; all products with fewer take less than 0.2 s per tile
MINOR = 0.02  # a type with less than this share of a file's weights uses the plain kernel
# Image side: kernels within this ratio count as equally fast; float32 ones are preferred (more exact), then plain.
EQUAL = 1.04
# Text model: a copy is worth its memory only if its kernel takes less than this share of the plain kernel's time.
WORTH = 0.93
# Products that a typical page takes, by number of rows: 1,200 prompt tokens in batches of `MANY` rows, and 300
# generated tokens, half of them in steps of one row, half in steps of four.
PAGE = {MANY: 1200 / MANY, 1: 150.0, 4: 150 / 4}
# Most bytes of widened copies for prompts: a larger model must not take three times the size of its file.
MOST_WIDENED = 2 << 30
INT8_TYPES = ("Q8_0", "Q6_K")  # about 8 bits per weight, multiplied with activations quantized to 8 bits
EXACT_TYPES = frozenset({"F32", "F16"})  # not rounded to bfloat16 unless the caller allows it
# Signals that end a process with a faulty kernel. Others come from outside, for instance from the OOM killer of Linux.
_FAULTS = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
_WINDOWS_FAULT = 0xC0000000  # NTSTATUS of severity 'error'

Announce = Callable[[], None]
Times = dict[str, dict[int, float]]  # seconds of one product, by kernel and number of rows; infinity if it crashed


def vision_kernels(
    backend: Backend, n_weights: Mapping[str, int], announce: Announce | None = None, *, rounding: bool = False
) -> dict[str, Kernel]:
    """Chooses the kernel for each weight type of a vision file, and for `ATTENTION`; no entry: ggml's plain kernel.

    `n_weights`: number of weights of each type in the file's matrices. `rounding`: whether float32 and half-precision
    weights may be multiplied in bfloat16; other types always may, since that is at least as exact as ggml's product. A
    GPU has only the plain kernels. The first call on a machine measures for a few seconds; `announce` is called if that
    takes longer than one second. Raises Aborted when the backend's abort callback asks for it.
    """
    types = _worth_measuring(n_weights, 0 if rounding else SMALL) if backend.is_cpu else []
    exact = not rounding and any(kind in EXACT_TYPES for kind in types)
    kernels = {kind: available_kernels(backend, kind) for kind in [*types, *([ATTENTION] if types else [])]}
    for kind, by_name in kernels.items():
        if not rounding and (kind in EXACT_TYPES or (kind == ATTENTION and exact)):
            by_name.pop(ONEDNN_BF16, None)
    wanted = [Trial(kind, name, MANY) for kind, names in kernels.items() if len(names) > 1 for name in names]
    measured = times(backend, wanted, BUDGET_S, announce)
    found = {
        kind: fastest_kernel({name: by[MANY] for name, by in by_name.items()}) for kind, by_name in measured.items()
    }
    return {kind: kernels[kind][name] for kind, name in found.items() if name != PLAIN}


def vision_seconds(
    backend: Backend, type_names: Sequence[str], announce: Announce | None = None
) -> dict[str, tuple[float, str]]:
    """Returns (seconds, kernel's name) by weight type: for a product of many rows with the kernel that the image side
    would choose; infinite seconds if the type was not measured. Arguments and errors as in `vision_kernels`."""
    kernels = {kind: dict(available_kernels(backend, kind)) for kind in type_names}
    for kind in EXACT_TYPES & kernels.keys():
        kernels[kind].pop(ONEDNN_BF16, None)
    measured = times(
        backend, [Trial(kind, name, MANY) for kind in kernels for name in kernels[kind]], 2 * BUDGET_S, announce
    )
    found = {}
    for kind in type_names:
        seconds = {name: rows[MANY] for name, rows in measured[kind].items()}
        name = fastest_kernel(seconds)
        found[kind] = seconds.get(name, math.inf), name
    return found


def int8_kernel(
    backend: Backend, announce: Announce | None = None, type_names: Sequence[str] = INT8_TYPES
) -> tuple[str, Kernel]:
    """Returns the weight type with the fastest products in 8-bit integers on this machine, and the kernel for it.

    Arguments and errors as in `vision_kernels`.
    """
    kernels = {
        (kind, kernel.name): kernel
        for kind in type_names
        for kernel in available_kernels(backend, kind).values()
        if kernel.widened is None and kernel.arithmetic is None
    }
    measured = times(backend, [Trial(*key, MANY) for key in kernels], BUDGET_S, announce)
    seconds = {key: measured[key[0]].get(key[1], {}).get(MANY, math.inf) for key in kernels}
    best = min(seconds, key=seconds.__getitem__)
    return best[0], kernels[best]


def text_kernels(
    backend: Backend, n_weights: Mapping[str, int], announce: Announce | None = None, *, compiled: bool = False
) -> dict[str, tuple[Kernel, Kernel]]:
    """Chooses (kernel for many rows, kernel for a few) for each weight type of a text file that gains from a copy.

    The copy is in another buffer type, for many rows, for a few or for both, or widened, for many. Types without an
    entry are multiplied in the mapped file. `compiled`: whether compiled kernels multiply weights of the mapped file;
    their times then count as the plain kernel's. Other arguments and errors as in `vision_kernels`.
    """
    types = _worth_measuring(n_weights, SMALL) if backend.is_cpu else []
    widened = {kind: prompt_kernels(kind) if may_widen(n_weights) else {} for kind in types}
    kernels = {kind: {**available_kernels(backend, kind), **widened[kind]} for kind in types}
    extra = {
        kind: [name for name, kernel in kernels[kind].items() if kernel.buffer_type or name in widened[kind]]
        for kind in types
    }
    types = [kind for kind in types if extra[kind]]
    known = {(kind, n): compiled_kernels(kind, n) if compiled else {} for kind in types for n in PAGE}
    wanted = [
        Trial(kind, name, n)
        for n in PAGE
        for kind in types
        for name in (*(known[kind, n] or [PLAIN]), *extra[kind])
        if n == MANY or name not in widened[kind]
    ]
    measured = times(backend, wanted, BUDGET_S, announce)
    for by_kernel in measured.values():
        by_kernel.setdefault(PLAIN, {}).update(by_kernel.pop(COMPILED, {}))
    found = {kind: fastest_pair(measured[kind], extra[kind]) for kind in types}
    return {
        kind: (kernels[kind][many], kernels[kind][few])
        for kind, (many, few) in found.items()
        if (many, few) != (PLAIN, PLAIN)
    }


def may_widen(n_weights: Mapping[str, int]) -> bool:
    """Whether a text file is small enough for copies of its weights in bfloat16, which prompts use."""
    return 2 * sum(n_weights.values()) <= MOST_WIDENED


def rates(
    backend: Backend, type_names: Iterable[str], budget_s: float = 60.0, announce: Announce | None = None
) -> dict[str, dict[str, float | None]]:
    """Measures the GFLOP/s of a product of many rows, by weight type and kernel, ignoring cached times. None means that
    the kernel crashed; one not measured within the budget is missing. Errors as in `vision_kernels`."""
    types = list(dict.fromkeys(type_names))
    wanted = [
        Trial(kind, name, MANY)
        for kind in types
        for name in (*available_kernels(backend, kind), *prompt_kernels(kind), *compiled_kernels(kind, MANY))
    ]
    measured = times(backend, wanted, budget_s, announce, anew=True)
    return {
        kind: {name: None if math.isinf(rows[MANY]) else gflop(kind) / rows[MANY] for name, rows in by_kernel.items()}
        for kind, by_kernel in measured.items()
    }


def gflop(type_name: str) -> float:
    """Returns the number of operations of the measured product of many rows, or of attention, in 10^9."""
    if type_name == ATTENTION:
        return 4 * N_IN * MANY * MANY / 1e9
    return 2 * n_in(type_name) * N_OUT * MANY / 1e9


def page_seconds(measured: Times, many: str, few: str) -> float:
    """Seconds that one weight matrix takes for a typical page (`PAGE`) with the kernel `many` for many rows and `few`
    for a few; infinity if either crashed or was not measured."""
    return _page_part(measured, many, many=True) + _page_part(measured, few, many=False)


def _page_part(measured: Times, name: str, *, many: bool) -> float:
    by_rows = measured.get(name, {})
    return sum(times * by_rows.get(n, math.inf) for n, times in PAGE.items() if (n == MANY) == many)


def fastest_kernel(measured: Mapping[str, float]) -> str:
    """Chooses a kernel by its measured seconds; among those within `EQUAL` of the best, the more exact one."""
    if PLAIN not in measured:  # no time was left to measure the plain kernel: nothing to compare with
        return PLAIN
    best = min(measured.values())
    for name in (FLOAT32, ONEDNN, PLAIN, *measured):
        if name in measured and measured[name] <= best * EQUAL and measured[name] < math.inf:
            return name
    return PLAIN


def fastest_pair(measured: Times, others: Collection[str]) -> tuple[str, str]:
    """Chooses (kernel for many rows, kernel for a few): both plain, unless one of `others` is clearly faster.

    There is only one copy, so the two are never different buffer types. Using a copy for only one of them keeps two
    forms of the weights in memory, so that must be faster than using the copy for both by the same margin (`WORTH`).

    Many rows and a few are judged separately, so that load on the machine while one was measured cannot hide a gain of
    the other.
    """
    if not measured.get(PLAIN, {}).keys() >= PAGE.keys():  # no time was left to measure the plain kernel
        return PLAIN, PLAIN

    def better(name: str, *, many: bool) -> str:
        plain = _page_part(measured, PLAIN, many=many)
        return name if _page_part(measured, name, many=many) < WORTH * plain else PLAIN

    def pair(name: str) -> tuple[str, str]:
        found = better(name, many=True), better(name, many=False)
        is_worth = page_seconds(measured, *found) < WORTH * page_seconds(measured, name, name)
        return found if len({*found}) == 1 or is_worth else (name, name)

    pairs = [(PLAIN, PLAIN), *map(pair, others)]
    return min(pairs, key=lambda pair: page_seconds(measured, *pair))


def _worth_measuring(n_weights: Mapping[str, int], small: int) -> list[str]:
    """Lists the weight types of a file that are worth measuring, the most frequent first; none for a small file."""
    total = sum(n_weights.values())
    if total < small:
        return []
    major = [kind for kind, n in n_weights.items() if n >= MINOR * total]
    return sorted(major, key=lambda kind: (-n_weights[kind], kind))


# --- measuring, and the cache of measurements ---


def times(
    backend: Backend,
    wanted: Sequence[Trial],
    budget_s: float,
    announce: Announce | None = None,
    *,
    anew: bool = False,
) -> dict[str, Times]:
    """Returns the times of these trials by type, from the cache or measured now (all measured if `anew`).

    Every type in `wanted` has an entry; a trial for which there was no time left is missing in it. Raises Aborted.
    """
    key = cache_key(backend.n_threads)
    known = {} if anew else _read_cache(key)
    missing = [trial for trial in wanted if _name(trial) not in known]
    if missing:
        found = _measure(missing, backend, time.monotonic() + budget_s, announce)
        known.update({_name(trial): seconds for trial, seconds in found.items()})
        content = read_json_cache(CACHE)  # read again: another process may have added to it meanwhile
        content[key] = {**_read_cache(key), **{_name(trial): seconds for trial, seconds in found.items()}}
        write_json_cache(CACHE, content)
    result: dict[str, Times] = {trial.type_name: {} for trial in wanted}
    for trial in wanted:
        if _name(trial) in known:
            result[trial.type_name].setdefault(trial.kernel, {})[trial.n_rows] = known[_name(trial)]
    return result


def _measure(
    missing: Sequence[Trial], backend: Backend, deadline: float, announce: Announce | None
) -> dict[Trial, float]:
    """Measures as many trials as there is time for, in seconds; infinity for those whose kernel crashes the child."""
    found: dict[Trial, float] = {}
    todo = list(missing)
    while todo and (left_s := deadline - time.monotonic()) > 0:
        arguments = [str(backend.n_threads), json.dumps(todo)]
        try:
            ended = run_main(kernel_timing.__name__, arguments, left_s, announce, stop=backend.is_aborted)
        except OSError:  # no memory for another process
            break
        if backend.is_aborted():
            raise Aborted
        announce = None  # once is enough
        begun = _read_lines(ended.stdout, todo, found)
        if begun is None or not _is_fault(ended.status):
            break
        crashed = (begun.type_name, begun.kernel)
        found.update({trial: math.inf for trial in missing if trial[:2] == crashed})
        todo = [trial for trial in todo if trial not in found]
    return found


def _read_lines(printed: str, todo: Sequence[Trial], found: dict[Trial, float]) -> Trial | None:
    """Adds the times that a child printed to `found`, the best of each trial. Returns the trial that it was running
    when it ended, None if it was between two."""
    begun = None
    for line in printed.splitlines():
        try:
            number, *seconds = json.loads(line)
            trial = todo[number]
        except (ValueError, TypeError, IndexError):
            continue
        begun = None if seconds else trial
        if seconds and _is_time(seconds[0]):
            found[trial] = min(seconds[0], found.get(trial, math.inf))
    return begun


def _is_fault(status: int | None) -> bool:
    """Whether this exit status means that the process crashed by itself, rather than being killed."""
    if status is None:
        return False
    return status >= _WINDOWS_FAULT or -status in {getattr(signal, name, None) for name in _FAULTS}


def cache_key(n_threads: int) -> str:
    """Names everything that measurements depend on: CPU, build of ggml, version of oneDNN, number of threads."""
    return f"{cpu_name()}|build {build_id()}|onednn {onednn.version()}|{n_threads} threads"


def _name(trial: Trial) -> str:
    return f"{trial.type_name} {trial.kernel} {trial.n_rows}"


def _read_cache(key: str) -> dict[str, float]:
    """Returns the cached times under a key; values that are not times are left out, and so measured again."""
    content = read_json_cache(CACHE).get(key)
    if not isinstance(content, dict):
        return {}
    return {name: float(value) for name, value in content.items() if _is_time(value)}


def _is_time(value: Any) -> bool:
    """Whether a value is positive seconds; infinity is valid and stands for a kernel that crashed."""
    return isinstance(value, float | int) and not isinstance(value, bool) and value > 0
