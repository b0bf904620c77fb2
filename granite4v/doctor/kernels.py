"""Measures the speed of every kernel for every weight type, and finds the kernels that end their process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping

from granite4v.doctor.native import install_command
from granite4v.doctor.section import Problem, Section
from granite4v.errors import Granite4vError
from granite4v.ggml import autotune
from granite4v.ggml.backend import Backend, buffer_type_name
from granite4v.ggml.build import Build
from granite4v.ggml.cpu_features import cpu_features
from granite4v.ggml.kernel_timing import MANY
from granite4v.ggml.kernels import (
    ATTENTION,
    BFLOAT16,
    COMPILED,
    FLOAT32,
    PLAIN,
    available_kernels,
    compiled_kernels,
    prompt_kernels,
)

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL", ATTENTION)
BUSY = 0.5  # load average from which other programs lower the measured rates
AMX = "AMX"  # ggml's buffer type
Rates = Mapping[str, Mapping[str, float | None]]  # GFLOP/s by type and kernel; None: the kernel ends its process


def measure(build: Build) -> Section:
    """Measures all kernels again, without using the cache."""
    load = _load()
    try:
        backend = Backend("cpu")
        try:
            offered = {buffer_type_name(buffer_type) for buffer_type in backend.extra_buffer_types()}
            wanted = {
                kind: [*available_kernels(backend, kind), *prompt_kernels(kind), *compiled_kernels(kind, MANY)]
                for kind in TYPES
            }
            n_threads, rates = backend.n_threads, autotune.rates(backend, TYPES)
        finally:
            backend.close()
    except (Granite4vError, OSError) as error:
        text = f"The kernels cannot be measured: {error}"
        return Section("kernels", [text], {"error": str(error)}, [Problem(text)])
    section = describe(rates, n_threads, build, offered)
    busy = ["other programs were running; on an idle machine it is more"] if load >= BUSY else []
    return dataclasses.replace(
        section,
        lines=[*section.lines, *busy],
        data={**section.data, "load_before": load},
        problems=[*section.problems, *_unmeasured(rates, wanted)],
    )


def describe(rates: Rates, n_threads: int, build: Build, buffer_types: Collection[str]) -> Section:
    """Formats the rates as a table that marks the fastest kernel of each type, and lists the problems. `buffer_types`:
    the names of ggml's extra buffer types."""
    found = {name for by_kernel in rates.values() for name in by_kernel}
    first = (PLAIN, FLOAT32, BFLOAT16, COMPILED)
    names = [*(name for name in first if name in found), *sorted(found.difference(first))]
    rows: list[str | list[str]] = [["", *names]]
    for kind, by_kernel in rates.items():
        best = max((rate for rate in by_kernel.values() if rate), default=0.0)
        rows.append([kind, *(_cell(by_kernel, name, best) for name in names)])
    lines = [f"GFLOP/s with {n_threads} thread{'s' if n_threads > 1 else ''}; * the fastest", *rows]
    data = {"n_threads": n_threads, "gflop_s": rates}
    return Section("kernels", lines, data, _problems(rates, build, AMX in buffer_types))


def _load() -> float:
    """The load average of the last minute: processes running or waiting to run. 0 if the system does not report it."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def _cell(by_kernel: Mapping[str, float | None], name: str, best: float) -> str:
    if name not in by_kernel:
        return "-"
    rate = by_kernel[name]
    return "crashes" if rate is None else f"{rate:.0f}{'*' if rate == best and len(by_kernel) > 1 else ' '}"


def _problems(rates: Rates, build: Build, has_amx_buffers: bool) -> list[Problem]:
    crashed: dict[str, list[str]] = {}
    for kind, by_kernel in rates.items():
        for name, rate in by_kernel.items():
            if rate is None:
                crashed.setdefault(name, []).append(kind)
    found = [_crash(name, kinds, build) for name, kinds in crashed.items()]
    if "amx_int8" in cpu_features() and "amx_int8" in build.features and not has_amx_buffers:
        found.append(
            Problem(
                "The CPU and the build have AMX, but the system does not let this process use it (arch_prctl "
                "ARCH_REQ_XCOMP_PERM): that takes Linux 5.16 or newer, and a container or virtual machine that "
                "permits it."
            )
        )
    return found


def _unmeasured(rates: Rates, wanted: Mapping[str, Collection[str]]) -> list[Problem]:
    """Reports the kernels that there was no time to measure: the machine is busy or slow, or a kernel hangs."""
    missing = [f"{kind} {name}" for kind, names in wanted.items() for name in names if name not in rates.get(kind, {})]
    if not missing:
        return []
    text = (
        f"There was no time to measure {len(missing)} kernels, from '{missing[0]}' on. Run this again when the machine "
        "is idle; if it ends there again, that kernel hangs."
    )
    return [Problem(text, is_serious=False)]


def _crash(kernel: str, kinds: list[str], build: Build) -> Problem:
    which = f"The {kernel} kernels end the process ({', '.join(kinds)})"
    if kernel == AMX and build.compiler.startswith("GCC"):
        return Problem(
            f"{which}: {build.compiler} removed the stores that fill the tile configuration, as many releases of GCC "
            "do unless they are told not to. Until llama-cpp-python is compiled again, slower kernels are used. (If "
            "they crash after that as well, this machine announces AMX and does not let it be used.)",
            install_command(),
        )
    if kernel == AMX:
        return Problem(
            f"{which}: this machine, probably a virtual one, announces AMX and does not let it be used. Slower kernels "
            "are used."
        )
    if kernel == PLAIN:
        return Problem(f"{which}: files of these types cannot be used with this build.", install_command())
    return Problem(f"{which}. Other kernels are used.", install_command(), is_serious=False)
