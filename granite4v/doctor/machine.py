"""Report sections about the machine: CPU, threads, memory, cache folder, config file, optional packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement

from granite4v.doctor.section import Problem, Section
from granite4v.ggml.control_groups import MOUNT, OWN, group_folders
from granite4v.ggml.cpu import cpu_quota, default_threads
from granite4v.ggml.cpu_features import cpu_features, cpu_name, in_words, told_by_sysctl
from granite4v.paths import cache_folder, config_file, new_file

MEMINFO, OWN_CGROUP, CGROUPS = Path("/proc/meminfo"), OWN, MOUNT
LITTLE_MEMORY = 4e9  # bytes; about what the smallest real models take with 4-bit weights
NO_LIMIT = 1 << 60  # control groups version 1 report no limit as a number near 2^63
EXTRAS = {  # the purpose of each
    "arrow": "results as a table of Arrow",
    "docling": "a plugin of docling, and 'granite4v extract --format docling'",
    "fonts": "typefaces for the documents that the demo draws",
    "fsspec": "documents by URL",
    "llvm": "faster prompts and decoding on CPUs with AVX-512",
    "onednn": "faster image encoding on CPUs with AVX-512 or AMX",
    "pandas": "results as a data frame",
    "parquet": "--format parquet",
    "ray": "'granite4v extract --ray'",
    "verify": "'granite4v verify', comparison with the checkpoint",
    "video": "videos from files",
    "xlsx": "--format xlsx",
}


def cpu() -> Section:
    features = cpu_features()
    lines = [cpu_name(), in_words(features) if features else f"{platform.machine()}; its features are not known"]
    return Section("cpu", lines, {"name": cpu_name(), "features": list(features)})


def threads() -> Section:
    chosen, logical = default_threads(), os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    lines = [f"{chosen} by default: one for each core that this process may use"]
    if allowed < logical:
        lines.append(f"it may use {allowed} of {logical} logical CPUs")
    quota = cpu_quota()
    if quota is not None:
        lines.append(f"a control group allows it the time of {quota:.3g} CPUs")
    facts = {"default": chosen, "logical_cpus": logical, "allowed_cpus": allowed, "cpu_quota": quota}
    return Section("threads", lines, facts)


# --- memory ---


def memory() -> Section:
    total, available, limit = total_memory(), available_memory(), memory_limit()
    known = [(total, "in all"), (available, "available"), (limit, "allowed to this container or service")]
    text = ", ".join(f"{_gb(n)} {what}" for n, what in known if n is not None) or "not known"
    problems = []
    usable = available if available is not None else total
    if usable is not None and usable < LITTLE_MEMORY:
        text_ = f"Only {_gb(usable)} of memory are available; a model of 4 billion weights in Q4_K_M takes about 4 GB."
        problems.append(Problem(text_, is_serious=False))
    return Section("memory", [text], {"total": total, "available": available, "limit": limit}, problems)


def total_memory() -> int | None:
    """Memory of the machine in bytes; None if the system does not report it."""
    value = _meminfo().get("MemTotal")
    if value is None and told_by_sysctl().get("hw.memsize", "").isdigit():
        value = int(told_by_sysctl()["hw.memsize"])
    return value


def available_memory() -> int | None:
    """Bytes that this process can still allocate, within its container's limit; None if the system does not report
    it."""
    free, room = _meminfo().get("MemAvailable"), _room_in_group()
    return min((n for n in (free, room) if n is not None), default=None)


def memory_limit() -> int | None:
    """The smallest memory limit, in bytes, of the control groups that contain this process; None without a limit."""
    limits = [limit for folder, _, limit_file, _ in _groups() if (limit := _number(folder / limit_file)) is not None]
    return min(limits, default=None)


def _room_in_group() -> int | None:
    rooms = []
    for folder, used_file, limit_file, cached in _groups():
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and used is not None:
            rooms.append(max(0, limit - used + _stat(folder, cached)))  # cached files are dropped when memory is needed
    return min(rooms, default=None)


def _groups() -> list[tuple[Path, str, str, str]]:
    """The control groups of this process and their ancestors, each as (folder, name of the usage file, name of the
    limit file, name of the cached-files entry in memory.stat)."""
    files = {
        1: ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
        2: ("memory.current", "memory.max", "inactive_file"),
    }
    return [(folder, *files[version]) for version, folder in group_folders("memory", OWN_CGROUP, CGROUPS)]


def _number(path: Path) -> int | None:
    """The number in a file; None without a file, for 'max', and for a number that means no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < NO_LIMIT else None


def _stat(folder: Path, name: str) -> int:
    try:
        found = re.search(rf"^{name} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _meminfo() -> dict[str, int]:
    try:
        text = MEMINFO.read_text()
    except OSError:
        return {}
    return {name: int(kb) * 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _gb(n: int) -> str:
    return f"{n / 1e9:.1f} GB"


# --- files and packages ---


def cache() -> Section:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".granite4v-doctor-{os.getpid()}"
        os.close(new_file(probe))
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        text = (
            f"The cache folder '{folder}' cannot be written ({reason}), so that kernels are measured and the embedded "
            "model is converted on every run; set GRANITE4V_CACHE to a folder that can."
        )
        return Section(
            "cache", [f"{folder}: not writable"], {"folder": str(folder), "writable": False}, [Problem(text)]
        )
    size = sum(_size(Path(where, name)) for where, _, names in os.walk(folder) for name in names)
    line = f"{folder}: writable, {size / 1e6:.1f} MB"
    return Section("cache", [line], {"folder": str(folder), "writable": True, "bytes": size})


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def config() -> Section:
    """The file with defaults for command-line options. An invalid file has already ended the command."""
    path = config_file()
    is_there = path is not None and path.exists()
    line = f"{path}: {'defaults of options' if is_there else 'not there'}"
    return Section("config", [line], {"file": None if path is None else str(path), "exists": is_there})


def extras() -> Section:
    """Optional packages, as listed in this package's metadata."""
    data, lines, problems = {}, [], []
    pip_install = f"{shlex.quote(sys.executable or 'python3')} -m pip install"
    for name, packages in sorted(_extras().items()):
        if name in EXTRAS:
            missing = [package for package in packages if not _is_installed(package)]
            data[name] = {"purpose": EXTRAS[name], "missing": missing}
            lines.append(f"{name} ({EXTRAS[name]}): {'not installed' if missing else 'installed'}")
    if "onednn" in data and data["onednn"]["missing"] and "avx512" in cpu_features():
        text = "oneDNN multiplies image features faster on this CPU."
        problems.append(Problem(text, f"{pip_install} 'granite4v[onednn]'", is_serious=False))
    elif any(extra["missing"] for extra in data.values()):
        lines.append(f"to install one: {pip_install} 'granite4v[NAME]'")
    return Section("extras", lines or ["not known: granite4v is run from its sources"], data, problems)


def _extras() -> dict[str, list[str]]:
    """The packages of each extra whose markers apply to this machine."""
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("granite4v") or []]
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {
        name: found
        for name in EXTRAS
        if (found := [each.name for each in wanted if each.marker and _is_for(each.marker, name)])
    }


def _is_for(marker: Marker, extra: str) -> bool:
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
