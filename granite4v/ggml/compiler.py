"""Finds compiler settings that build working AMX kernels in ggml. Uses only the standard library: the set-up scripts
run this file before anything is installed.

GCC's `_tile_loadconfig` declares that it reads 8 bytes, but the instruction reads 64. So GCC removes the stores to the
other 56 as dead, and ggml's kernels run on tiles without a size. Releases from late 2024 on have the fix, in a header
(gcc/config/i386/amxtileintrin.h) that distributions may backport at any time. With dead store elimination turned off
every GCC is correct, with no measurable loss of speed. Clang never had the bug, but its OpenMP is not the one that
oneDNN uses, and with both in one process image encoding takes 1.6 times as long. So GCC is used if there is one.
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
    """Returns variables to set for the build: flags for GCC, or a clang if the default compiler is missing. A compiler
    or flags that `environment` names are kept."""
    flags = environment.get("CXXFLAGS", "")
    if is_gcc(environment.get("CXX") or "c++"):
        return {} if GCC_FLAGS in flags else {"CXXFLAGS": f"{flags} {GCC_FLAGS}".strip()}
    if {"CC", "CXX"} & environment.keys() or _output(["c++", "--version"]) is not None:
        return {}
    clang = newest_clang(environment.get("PATH", os.defpath))
    return {"CC": clang.replace("++", ""), "CXX": clang} if clang else {}


def newest_clang(path: str) -> str | None:
    """Returns the name of the newest clang++ on `path`, version 15 or later, that has its C compiler, a C++ library and
    OpenMP; None if there is none."""
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
    """Whether a command, which may have arguments, runs GCC; False if it cannot be run."""
    told = _output([*shlex.split(compiler), "--version"])
    return told is not None and "Free Software Foundation" in told


def _output(command: list[str], given: str = "") -> str | None:
    """Returns a command's stdout; None if it fails."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    for name, value in settings(os.environ).items():
        print(f"export {name}={shlex.quote(value)}")
