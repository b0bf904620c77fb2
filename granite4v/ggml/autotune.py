"""Which kernel multiplies each weight type fastest on this machine, for the image side and for the text model.

No rule holds across CPUs: on one, half-precision weights are faster widened to float32 first; on another, in ggml's
repack buffer type, which for some types costs speed instead. And a virtual machine may announce instructions (AMX)
that fault when used, or a compiler may have broken a kernel; either ends the process. So kernels are timed in a
child process (`kernel_timing`); where one ends it, that kernel counts as crashed, and another child goes on with the
others. The times are kept in the user's cache for each CPU, build of ggml and number of threads.

The two sides choose from the same times by different rules. The image side multiplies hundreds of rows at once, maps
its file and copies what another buffer type takes; it takes the fastest kernel, the more exact of equals. The text
model is opened by llama.cpp, which widens no weights. Prompts and decoding may use two forms of a weight, the
mapped one and one copy (`runtime.llama.weight_copies`), so a kernel is chosen for many rows and one for a few; between
several buffer types for the copy, a typical page decides (`PAGE`). A small model may have widened copies for prompts.

A small file is not measured: what it could gain is less than the measurement takes. It is multiplied as it is even
where the times are known, so that its results are the same on the first run and on all others.
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
# Seconds for one call; a run makes two at most, one for the image side and one for the text model, and one more second
# each may go to `slow_weights`. What was not measured by then is multiplied plainly, and measured the next time.
BUDGET_S = 4.0
SMALL = 50_000_000  # weights: all products with them take less than 0.2 s for a tile
MINOR = 0.02  # a type that holds less than this share of a file's weights is multiplied as it is
# Image side: kernels within this ratio count as equal; the more exact one (float32), then the plain one, is taken.
EQUAL = 1.04
# Text model: another buffer type must take at most this share of the plain time to be worth leaving the mapping.
WORTH = 0.93
# Products of each number of rows that a typical page takes: 1,200 prompt tokens in batches; 300 generated ones, half
# of them alone, half beside three others.
PAGE = {MANY: 1200 / MANY, 1: 150.0, 4: 150 / 4}
# Bytes of the copies that are widened for prompts: a larger model is not to take thrice its file.
MOST_WIDENED = 2 << 30
INT8_TYPES = ("Q8_0", "Q6_K")  # of about eight bits, and multiplied with activations rounded to as many
EXACT_TYPES = frozenset({"F32", "F16"})  # not rounded to bfloat16 unless that is asked for
# How a process ends over a faulty kernel; other signals come from outside, as from the kernel's out-of-memory killer.
_FAULTS = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
_WINDOWS_FAULT = 0xC0000000  # NTSTATUS of severity 'error'

Announce = Callable[[], None]
Times = dict[str, dict[int, float]]  # seconds of one product, by kernel and number of rows; infinity: it crashed


def vision_kernels(
    backend: Backend, n_weights: Mapping[str, int], announce: Announce | None = None, *, rounding: bool = False
) -> dict[str, Kernel]:
    """The kernel for each weight type of a vision file, and for `ATTENTION`; one without an entry is ggml's plain one.

    `n_weights`: how many weights of each type its matrices hold. `rounding`: whether float32 and half-precision weights
    may be multiplied in bfloat16; others may always be, which is at least as exact as what ggml does. A GPU has one
    kernel for each type. Measures on the first call on a machine, a few seconds; `announce` is called if it takes
    longer than one. Raises Aborted when the backend's abort callback asks for it.
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
    """Seconds of a product of many rows by the kernel that the image side takes for each weight type, and its name;
    infinity for a type that was not measured. Arguments and errors as those of `vision_kernels`."""
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
    """The type whose products with 8-bit integers are the fastest here, and the kernel for them.

    Arguments and errors as those of `vision_kernels`.
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
    """The kernels for many rows and for a few, for each weight type of a text file that gains by another buffer type
    for one of them or both, or by being widened for many; the others are multiplied in the mapped file.

    `compiled`: whether weights in the mapped file are multiplied by compiled kernels. Other arguments and errors as
    those of `vision_kernels`.
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
    """Whether a text file is so small that its weights may be copied in bfloat16 for prompts."""
    return 2 * sum(n_weights.values()) <= MOST_WIDENED


def rates(
    backend: Backend, type_names: Iterable[str], budget_s: float = 60.0, announce: Announce | None = None
) -> dict[str, dict[str, float | None]]:
    """GFLOP/s of a product of many rows, by weight type and kernel, measured now. None: the kernel crashed. One that
    was not measured within the budget is missing. Errors as those of `vision_kernels`."""
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
    """Operations of the measured product of many rows, or of attention, in 10^9."""
    if type_name == ATTENTION:
        return 4 * N_IN * MANY * MANY / 1e9
    return 2 * n_in(type_name) * N_OUT * MANY / 1e9


def page_seconds(measured: Times, many: str, few: str) -> float:
    """Seconds that one weight matrix takes for a typical page with one kernel for many rows and one for a few; infinity
    if one of them crashed, or was not measured."""
    return _page_part(measured, many, many=True) + _page_part(measured, few, many=False)


def _page_part(measured: Times, name: str, *, many: bool) -> float:
    by_rows = measured.get(name, {})
    return sum(times * by_rows.get(n, math.inf) for n, times in PAGE.items() if (n == MANY) == many)


def fastest_kernel(measured: Mapping[str, float]) -> str:
    """The kernel to take from measured seconds; those within `EQUAL` of the best go to the more exact."""
    if PLAIN not in measured:  # there was no time for the comparison
        return PLAIN
    best = min(measured.values())
    for name in (FLOAT32, ONEDNN, PLAIN, *measured):
        if name in measured and measured[name] <= best * EQUAL and measured[name] < math.inf:
            return name
    return PLAIN


def fastest_pair(measured: Times, others: Collection[str]) -> tuple[str, str]:
    """The kernels to take for many rows and for a few: both plain, unless another is clearly faster for one or both.
    There is one copy, so they are never two buffer types. A copy for one of them alone leaves two forms of the weights
    in memory: it must be as clearly faster than one for both.

    Many rows and few are judged apart: what else the machine did while one of them was measured must not hide a gain of
    the other.
    """
    if not measured.get(PLAIN, {}).keys() >= PAGE.keys():  # there was no time for the comparison
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
    """The types of a file whose kernel matters, the most frequent first."""
    total = sum(n_weights.values())
    if total < small:
        return []
    major = [kind for kind, n in n_weights.items() if n >= MINOR * total]
    return sorted(major, key=lambda kind: (-n_weights[kind], kind))


# --- measuring, and what was measured ---


def times(
    backend: Backend,
    wanted: Sequence[Trial],
    budget_s: float,
    announce: Announce | None = None,
    *,
    anew: bool = False,
) -> dict[str, Times]:
    """What the cache knows of these trials, and measurements of the others, or of all if `anew`, by type. Every type
    wanted has an entry; a trial for which the time did not suffice has none in it. Raises Aborted."""
    key = cache_key(backend.n_threads)
    known = {} if anew else _read_cache(key)
    missing = [trial for trial in wanted if _name(trial) not in known]
    if missing:
        found = _measure(missing, backend, time.monotonic() + budget_s, announce)
        known.update({_name(trial): seconds for trial, seconds in found.items()})
        content = read_json_cache(CACHE)  # now: another process may have added to it meanwhile
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
    """Seconds of as many trials as there is time for; infinity for those whose kernel ends its process."""
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
    """Takes the times out of what a child printed. Returns the trial that it was at work on when it ended."""
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
    """Whether a process ended like that over what it did itself."""
    if status is None:
        return False
    return status >= _WINDOWS_FAULT or -status in {getattr(signal, name, None) for name in _FAULTS}


def cache_key(n_threads: int) -> str:
    """What measurements depend on."""
    return f"{cpu_name()}|build {build_id()}|onednn {onednn.version()}|{n_threads} threads"


def _name(trial: Trial) -> str:
    return f"{trial.type_name} {trial.kernel} {trial.n_rows}"


def _read_cache(key: str) -> dict[str, float]:
    """What was measured; values that are not times are left out, and so measured again."""
    content = read_json_cache(CACHE).get(key)
    if not isinstance(content, dict):
        return {}
    return {name: float(value) for name, value in content.items() if _is_time(value)}


def _is_time(value: Any) -> bool:
    """Positive seconds; infinity is that of a kernel that crashed."""
    return isinstance(value, float | int) and not isinstance(value, bool) and value > 0
