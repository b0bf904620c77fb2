"""The cores that this process may use, and those that other programs leave it: how many threads to compute with.

A container's CPU quota counts like a number of cores. On systems without /proc the machine's cores are what is known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from granite4v.ggml.control_groups import MOUNT, OWN, group_folders

SAMPLE_S = 0.1  # /proc/stat counts in hundredths of a second
PART_OF_CORE = 0.6  # of a core must be free for a thread of its own; a page reader or a browser takes less
_NICE, _IDLE, _IOWAIT = 2, 4, 5  # columns of a 'cpuN' line in /proc/stat


def default_threads() -> int:
    """One thread for each core this process may use; hyper-threads share a core and are not counted twice.

    A CPU quota is rounded to the nearest number: with 1.5 cores' worth of time two threads encode and prefill images
    1.5 to 1.8 times as fast as one and decode as fast; with 1.0 they decode at 0.6 of its speed.
    """
    n_cores, quota = _allowed_cores(), cpu_quota()
    return max(1, n_cores if quota is None else min(n_cores, int(quota + 0.5)))


def _allowed_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
            cores.add(siblings.strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def cpu_quota(own: Path = OWN, mount: Path = MOUNT) -> float | None:
    """The cores' worth of time that control groups allow this process; None without a limit.

    `cpu.max` of version 2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` of version 1 (Linux's
    Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst).
    """
    found = [_limit(version, folder) for version, folder in group_folders("cpu", own, mount)]
    return min((limit for limit in found if limit is not None), default=None)


def _limit(version: int, group: Path) -> float | None:
    names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = " ".join((group / name).read_text() for name in names).split()
        limit = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # version 2 says 'max' for no limit
        return None
    return limit if limit > 0 else None  # version 1 says -1


def idle_seconds() -> float | None:
    """Seconds since the system started that the CPUs this process may use have been free for it; None where unknown.

    They were idle, or computed for niced processes, which give way to one that is not.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        allowed = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
        rows = [row for line in lines if (row := line.split())[0] in allowed]
        columns = (_IDLE, _IOWAIT, _NICE) if os.getpriority(os.PRIO_PROCESS, 0) <= 0 else (_IDLE, _IOWAIT)
        return sum(int(row[column]) for row in rows for column in columns) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None


class FreeThreads:
    """How many threads, of `n_most`, find a free core now: the cores this process has, and idle ones.

    Threads that share a core with another program hold up all others at each barrier of a graph. The machine is looked
    at as often as `now` is asked, at most every `SAMPLE_S`; a change must be seen twice to count, so that short bursts
    of other programs change nothing.
    """

    def __init__(
        self,
        n_most: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        used: Callable[[], float] = time.process_time,
        idle: Callable[[], float | None] = idle_seconds,
    ) -> None:
        """`clock`, `used` and `idle`: seconds passed, seconds of CPU time that this process had, and that none had."""
        self._n_most, self._clock, self._used, self._idle = n_most, clock, used, idle
        self._n = n_most
        self._last = self._sample()
        self._is_first, self._seen = True, n_most

    def _sample(self) -> tuple[float, float, float | None]:
        return self._clock(), self._used(), self._idle()

    def now(self) -> int:
        """The number of threads to compute with next."""
        if self._n_most == 1 or self._clock() - self._last[0] < SAMPLE_S:
            return self._n
        before, self._last = self._last, self._sample()
        if before[2] is None or self._last[2] is None:
            return self._n
        n_free = (self._last[1] - before[1] + self._last[2] - before[2]) / (self._last[0] - before[0])
        wanted = min(max(1, int(n_free + 1 - PART_OF_CORE)), self._n_most)
        if self._is_first or max(wanted, self._seen) < self._n or min(wanted, self._seen) > self._n:
            self._n = wanted
        self._is_first, self._seen = False, wanted
        return self._n
