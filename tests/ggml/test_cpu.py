"""The number of threads to compute with: cores, quotas of control groups, and what other programs leave free."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from granite4v.ggml import cpu
from granite4v.ggml.cpu import SAMPLE_S, FreeThreads, cpu_quota, idle_seconds

V2, V1 = "0::/a/b\n", "4:memory:/other\n2:cpu,cpuacct:/a/b\n0::/\n"


def quota(root: Path, groups: str, files: dict[str, str]) -> float | None:
    (root / "cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cpu_quota(root / "cgroup", root / "mount")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"a/b/cpu.max": "max 100000\n"}, None),
        (V2, {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2.0),
        (V2, {"cpu.max": "100000 100000\n"}, 1.0),  # a container's own group, seen as the root
        (V2, {"a/c/cpu.max": "100000 100000\n", "a/b/cpu.cfs_quota_us": "1\n"}, None),  # another group; no such file
        (V2, {"a/b/cpu.max": "nonsense\n"}, None),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "150000\n", "cpu/a/b/cpu.cfs_period_us": "50000\n"}, 3.0),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cpu/a/cpu.cfs_quota_us": "100000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 1.0),
        (V1, {"memory/other/cpu.cfs_quota_us": "1\n", "memory/other/cpu.cfs_period_us": "1\n"}, None),
        ("", {}, None),
        ("nonsense\n", {}, None),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, groups: str, files: dict[str, str], expected: float | None) -> None:
    assert quota(tmp_path, groups, files) == expected


def test_no_control_groups_are_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "missing", tmp_path) is None


def test_threads_within_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_quota", lambda: None)
    n_cores = cpu.default_threads()
    for limit, expected in (
        (0.3, 1),
        (1.0, 1),
        (1.4, 1),
        (1.5, 2),
        (n_cores + 0.5, n_cores),
        (n_cores - 0.6, n_cores - 1),
    ):
        monkeypatch.setattr(cpu, "cpu_quota", lambda limit=limit: limit)
        assert cpu.default_threads() == max(1, min(expected, n_cores))


def test_a_process_kept_on_one_cpu_uses_one_thread() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system keeps no process on one CPU")
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from granite4v.ggml.cpu import default_threads; print(default_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


class Machine:
    """Simulates time: the cores that this process uses, and the idle cores, are set for each second."""

    def __init__(self, n_most: int, samples: tuple[float, float] = (0.0, 0.0)) -> None:
        self.seconds, self.used, self.idle = 100.0, *samples
        self.threads = FreeThreads(n_most, clock=lambda: self.seconds, used=lambda: self.used, idle=lambda: self.idle)

    def passes(self, used: float, idle: float, seconds: float = 1.01 * SAMPLE_S) -> int:
        self.seconds += seconds
        self.used += used * seconds
        self.idle += idle * seconds
        return self.threads.now()


@pytest.mark.parametrize(
    ("n_most", "used", "idle", "expected"),
    [
        (2, 2.0, 0.0, 2),  # alone
        (2, 1.0, 1.0, 2),  # alone, with one thread
        (2, 1.9, 0.0, 2),  # a little of other work
        (2, 1.33, 0.0, 1),  # two threads of ours and one of others
        (2, 1.0, 0.0, 1),  # two of ours and two others; or one and one
        (2, 0.5, 0.0, 1),
        (16, 15.5, 0.0, 15),
        (16, 2.0, 30.0, 16),
    ],
)
def test_threads_that_find_a_free_core(n_most: int, used: float, idle: float, expected: int) -> None:
    assert Machine(n_most).passes(used, idle) == expected


def test_a_change_counts_when_it_is_seen_twice() -> None:
    machine = Machine(2)
    assert machine.passes(2.0, 0.0) == 2
    assert machine.passes(1.0, 0.0) == 2  # a burst
    assert machine.passes(2.0, 0.0) == 2
    assert machine.passes(1.0, 0.0) == 2
    assert machine.passes(1.0, 0.0) == 1  # it stays
    assert machine.passes(1.0, 1.0) == 1
    assert machine.passes(1.0, 0.0) == 1
    assert [machine.passes(1.0, 1.0) for _ in range(2)] == [1, 2]


def test_the_machine_is_looked_at_now_and_then() -> None:
    machine = Machine(2)
    assert machine.passes(0.5, 0.0, seconds=0.9 * SAMPLE_S) == 2
    assert machine.passes(0.5, 0.0, seconds=0.2 * SAMPLE_S) == 1


def test_what_is_not_known_changes_nothing() -> None:
    seconds = iter((0.0, 1.0, 1.0, 2.0, 2.0))
    threads = FreeThreads(3, clock=lambda: next(seconds), used=lambda: 0.0, idle=lambda: None)
    assert [threads.now(), threads.now()] == [3, 3]


def test_idle_time_grows_no_faster_than_the_cpus_allow() -> None:
    before, start = idle_seconds(), time.perf_counter()
    if before is None:
        pytest.skip("this system has no /proc/stat")
    time.sleep(0.3)
    after = idle_seconds()
    assert after is not None
    n_cpus = len(os.sched_getaffinity(0))
    assert 0 <= after - before <= n_cpus * (time.perf_counter() - start + 0.05)
