"""Examines llama-cpp-python: whether it loads, its compiler and target CPU features, and the GPUs it sees."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite4v.child import run_main
from granite4v.doctor.section import Problem, Section
from granite4v.ggml import build as installed
from granite4v.ggml import compiler, onednn
from granite4v.ggml.build import Build
from granite4v.ggml.cpu_features import cpu_features, in_words
from granite4v.ggml.library import TESTED_VERSION

TIMEOUT_S = 60.0  # GPU drivers start slowly
# Features without which a build runs at half speed or less on a CPU that has them. bfloat16 (avx512_bf16), byte
# permutations (avx512_vbmi) and scalable vectors (sve) are left out: few kernels use them.
COSTLY = ("avx2", "fma", "f16c", "avx512", "avx512_vnni", "amx_int8", "dotprod", "matmul_int8")
NVIDIA = Path("/proc/driver/nvidia/version")


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a child process found by loading llama-cpp-python; `error` says why loading failed."""

    build: Build | None = None
    devices: tuple[dict[str, Any], ...] = ()
    error: str = ""


def probe() -> Probe:
    """Loads llama-cpp-python in a child process, since a broken build may end its process."""
    try:
        ended = run_main(installed.__name__, [], TIMEOUT_S)
    except OSError as error:
        return Probe(error=f"no process can be started to load it: {error}")
    try:
        told = json.loads(ended.stdout.splitlines()[-1])
        if ended.status == 0 and "error" not in told:
            build = {**told["build"], "features": tuple(told["build"]["features"])}
            return Probe(Build(**build), tuple(told["devices"]))
        return Probe(error=told["error"])
    except (IndexError, ValueError, KeyError, TypeError):
        reason = f": {ended.reason}" if ended.reason else ""
        return Probe(error=f"loading it ended a process {ended.how}{reason}")


def build(found: Probe) -> Section:
    """Compares the features of the build with those of the CPU."""
    if found.build is None:
        command = install_command()
        is_missing = installed.installed_version() == installed.UNKNOWN
        text = "llama-cpp-python is not installed." if is_missing else f"llama-cpp-python is broken: {found.error}"
        return Section("build", [text], {"error": found.error}, [Problem(text, command)])
    made, offered = found.build, cpu_features()
    lacking = [name for name in offered if name not in made.features]
    excess = [name for name in made.features if name not in offered] if offered else []
    by = "an unknown compiler" if made.compiler == installed.UNKNOWN else made.compiler
    lines = [
        f"llama-cpp-python {made.version}, ggml {made.ggml}, compiled by {by}",
        f"for {in_words(made.features)}" if made.features else "for any CPU of its kind",
    ]
    problems = []
    costly = [name for name in lacking if name in COSTLY or (name == "avx_vnni" and "avx512_vnni" not in offered)]
    if excess:
        problems.append(
            Problem(
                f"The build uses instructions that this CPU lacks ({in_words(excess)}), and will end the process when "
                "it comes to them. It was made for another CPU; compile it here.",
                install_command(),
            )
        )
    elif costly:
        problems.append(
            Problem(
                f"The build does not use {in_words(costly)}, which this CPU has. It is a generic build, or one made on "
                "another CPU; compiled here, it uses all that this CPU has.",
                install_command(),
            )
        )
    elif lacking:
        lines.append(f"not used: {in_words(lacking)}")
    if made.openmp == "libomp" and onednn.is_installed():
        text = (
            "The build computes with LLVM's OpenMP and oneDNN with GCC's; their threads are in each other's way, and "
            "image encoding was measured to take 1.6 times as long. Compile it with GCC."
        )
        problems.append(Problem(text, install_command(), is_serious=False))
    if made.ggml != TESTED_VERSION:
        lines.append(f"granite4v is tested with ggml {TESTED_VERSION}")
    data = {**dataclasses.asdict(made), "not_used": lacking, "not_offered": excess}
    return Section("build", lines, data, problems)


def gpu(found: Probe) -> Section:
    """Lists the GPUs that ggml sees, and reports a GPU that the build does not support."""
    gpus = [device for device in found.devices if device["kind"] in ("gpu", "igpu")]
    lines = [f"{device['name']}: {device['description']}" for device in gpus] or ["none that ggml can use"]
    problems = []
    if found.build and not gpus and _has_nvidia():
        text = (
            "There is an NVIDIA GPU, but this llama-cpp-python is not built for it, so that the CPU computes alone. "
            "Compiling it for CUDA takes NVIDIA's CUDA toolkit."
        )
        problems.append(Problem(text, install_command("-DGGML_CUDA=on"), is_serious=False))
    if found.build and not gpus and _has_metal():
        text = "This llama-cpp-python is not built for Metal, so that the CPU computes alone."
        problems.append(Problem(text, install_command("-DGGML_METAL=on"), is_serious=False))
    return Section("gpu", lines, {"devices": gpus}, problems)


def install_command(cmake_option: str = "", environment: Mapping[str, str] | None = None) -> str:
    """Returns the shell command that compiles llama-cpp-python for this machine and replaces any installed build."""
    set_by_user = os.environ if environment is None else environment
    variables = {}
    if sys.platform == "linux" and platform.machine() == "x86_64" and "amx_int8" in cpu_features():
        variables.update(compiler.settings(set_by_user))
    if cmake_option:
        variables["CMAKE_ARGS"] = f"{set_by_user.get('CMAKE_ARGS', '')} {cmake_option}".strip()
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    python = shlex.quote(sys.executable or "python3")
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        words.append(f"uv pip install --python {python} --no-cache --reinstall")
    else:
        words.append(f"{python} -m pip install --no-cache-dir --force-reinstall")
    version = installed.installed_version()
    if version == installed.UNKNOWN:  # not installed: its dependencies are needed, too
        words.append(f"--no-binary llama-cpp-python {shlex.quote(_requirement())}")
    else:
        words.append(f"--no-deps --no-binary llama-cpp-python llama-cpp-python=={version}")
    return " ".join(words)


def _requirement() -> str:
    """This package's requirement, for instance 'llama-cpp-python>=0.3.36'."""
    try:
        wanted = importlib.metadata.requires("granite4v") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        wanted = []
    return next((line for line in wanted if re.match(r"llama[-_]cpp[-_]python\b", line)), "llama-cpp-python")


def _has_nvidia() -> bool:
    return NVIDIA.exists() or shutil.which("nvidia-smi") is not None


def _has_metal() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"
