"""Memory and its limits, the cache folder, optional packages."""

from __future__ import annotations

import importlib.metadata
import shlex
from pathlib import Path

import pytest

from granite4v.doctor import machine

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         2000000 kB\nMemAvailable:    8000000 kB\n"


def memory_of(root: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, files: dict[str, str]) -> dict[str, object]:
    for name, text in {"meminfo": MEMINFO, "cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(machine, "MEMINFO", root / "meminfo")
    monkeypatch.setattr(machine, "OWN_CGROUP", root / "cgroup")
    monkeypatch.setattr(machine, "CGROUPS", root / "groups")
    return machine.memory().data


def test_memory_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"groups/memory.max": "max\n", "groups/memory.current": "5\n"}
    found = memory_of(tmp_path, monkeypatch, "0::/\n", files)
    assert found == {"total": 16_000_000 * 1024, "available": 8_000_000 * 1024, "limit": None}


def test_the_limits_of_a_container_and_of_the_groups_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "groups/a/memory.max": "4000000000\n",
        "groups/a/memory.current": "3000000000\n",
        "groups/a/memory.stat": "anon 1\ninactive_file 500000000\nactive_file 7\n",
        "groups/a/b/memory.max": "6000000000\n",
        "groups/a/b/memory.current": "1000000000\n",
    }
    found = memory_of(tmp_path, monkeypatch, "0::/a/b\n", files)
    assert found["limit"] == 4_000_000_000 and found["available"] == 1_500_000_000


def test_limits_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "groups/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "groups/memory/memory.usage_in_bytes": "1\n",
        "groups/memory/job/memory.limit_in_bytes": "2000000000\n",
        "groups/memory/job/memory.usage_in_bytes": "500000000\n",
        "groups/cpu/job/memory.limit_in_bytes": "1\n",
    }
    found = memory_of(tmp_path, monkeypatch, "5:cpu,cpuacct:/job\n4:memory:/job\nnonsense\n", files)
    assert found["limit"] == 2_000_000_000 and found["available"] == 1_500_000_000


def test_little_memory_is_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_of(tmp_path, monkeypatch, "0::/\n", {"groups/memory.max": "1000000000", "groups/memory.current": "0"})
    (problem,) = machine.memory().problems
    assert problem.text.startswith("Only 1.0 GB") and not problem.is_serious


def test_memory_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMINFO", "OWN_CGROUP", "CGROUPS"):
        monkeypatch.setattr(machine, name, tmp_path / "nothing")
    monkeypatch.setattr(machine, "told_by_sysctl", dict)
    assert machine.memory().lines == ["not known"]
    monkeypatch.setattr(machine, "told_by_sysctl", lambda: {"hw.memsize": "17179869184"})
    assert machine.memory().lines == ["17.2 GB in all"]


def test_the_cache_folder_is_measured_and_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "file").write_bytes(b"x" * 2_500_000)
    section = machine.cache()
    assert section.lines == [f"{tmp_path}: writable, 2.5 MB"] and section.data["bytes"] == 2_500_000
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "models"]


def test_a_cache_folder_that_cannot_be_written_is_serious(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "cache", "/proc/cache", "nul\0"):
        monkeypatch.setattr(machine, "cache_folder", lambda folder=folder: Path(folder))
        (problem,) = machine.cache().problems
        assert problem.is_serious and "GRANITE4V_CACHE" in problem.text


REQUIRES = [
    "numpy>=1.26",
    'docling-core>=2.100; extra == "docling"',
    'onednn-cpu-gomp; (sys_platform == "linux" and platform_machine == "x86_64") and extra == "onednn"',
    'torch>=2.13; extra == "verify"',
    'peft>=0.18; extra == "verify"',
    'mypy; extra == "dev"',
    'font-of-windows; sys_platform == "win32" and extra == "fonts"',
]


def extras(monkeypatch: pytest.MonkeyPatch, *installed: str) -> machine.Section:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(machine, "cpu_features", lambda: ("avx2", "avx512"))
    return machine.extras()


def test_extras_are_read_from_the_package_s_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    section = extras(monkeypatch, "torch", "docling-core", "onednn-cpu-gomp")
    missing = {name: extra["missing"] for name, extra in section.data.items()}
    assert missing == {"docling": [], "onednn": [], "verify": ["peft"]}
    assert "verify ('granite4v verify', comparison with the checkpoint): not installed" in section.lines
    assert list(section.problems) == []


def test_onednn_is_advised_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = extras(monkeypatch, "docling-core").problems
    assert not problem.is_serious and shlex.split(problem.command)[-1] == "granite4v[onednn]"


def test_without_metadata_extras_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", nothing)
    assert machine.extras().data == {}
