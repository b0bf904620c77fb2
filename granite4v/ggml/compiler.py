"""Compiler settings with which ggml's AMX kernels work. Standard library alone: the set-up scripts run this file before
anything is installed.

GCC declares in `_tile_loadconfig` that 8 bytes are read, where the instruction reads 64, so it removes the stores to
the others, and ggml's kernels run on tiles without a size. That is mended in releases from late 2024 on, by a header
that distributions take over at any time (gcc/config/i386/amxtileintrin.h); without the optimization every GCC is
right, and loses nothing that can be measured. Clang was never wrong, but its OpenMP is another than that of oneDNN:
with both in one process image encoding takes 1.6 times as long. So GCC is taken where there is one.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

GCC_FLAGS = "-fno-dse -fno-tree-dse"
MIN_CLANG = 15
_TIMEOUT_S = 20.0
_PROGRAM = """
#include <omp.h>
#include <vector>
int main() { return std::vector<int>(omp_get_max_threads()).empty(); }
"""


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to set for the build: flags for GCC, or a clang where the default compiler is missing. A compiler that
    `environment` names is kept, and flags in it stay."""
    flags = environment.get("CXXFLAGS", "")
    if is_gcc(environment.get("CXX") or "c++"):
        return {} if GCC_FLAGS in flags else {"CXXFLAGS": f"{flags} {GCC_FLAGS}".strip()}
    if {"CC", "CXX"} & environment.keys() or _output(["c++", "--version"]) is not None:
        return {}
    clang = newest_clang(environment.get("PATH", os.defpath))
    return {"CC": clang.replace("++", ""), "CXX": clang} if clang else {}


def newest_clang(path: str) -> str | None:
    """The name of the newest clang++, from 15 on, that has its C compiler, a C++ library and OpenMP."""
    found: dict[int, str] = {}
    for name in {file.name for folder in path.split(os.pathsep) for file in Path(folder).glob("clang++*")}:
        if re.fullmatch(r"clang\+\+(-\d+)?", name) and _output([name.replace("++", ""), "--version"]) is not None:
            version = re.match(r"\d+", _output([name, "-dumpversion"]) or "")
            if version and int(version[0]) >= MIN_CLANG:
                found[int(version[0])] = name
    for _, name in sorted(found.items(), reverse=True):
        if _output([name, "-fopenmp", "-x", "c++", "-o", os.devnull, "-"], _PROGRAM) is not None:
            return name
    return None


def is_gcc(compiler: str) -> bool:
    """Whether a command, with arguments perhaps, is GCC; not if it cannot be run."""
    told = _output([*shlex.split(compiler), "--version"])
    return told is not None and "Free Software Foundation" in told


def _output(command: list[str], given: str = "") -> str | None:
    """What a command prints; None if it fails."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    for name, value in settings(os.environ).items():
        print(f"export {name}={shlex.quote(value)}")
