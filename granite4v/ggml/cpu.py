"""Decides how many threads to compute with, by the cores that this process may use and that other programs leave free.

A container's CPU quota counts as a number of cores. On systems without /proc only the machine's cores are known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from granite4v.ggml.control_groups import MOUNT, OWN, group_folders

SAMPLE_S = 0.1  # /proc/stat counts in hundredths of a second
PART_OF_CORE = 0.6  # of a core must be free for another thread; a page reader or a browser leaves that much
_NICE, _IDLE, _IOWAIT = 2, 4, 5  # columns of a 'cpuN' line in /proc/stat


def default_threads() -> int:
    """Returns one thread for each core this process may use; hyper-threads of one core count once.

    A CPU quota is rounded to the nearest number. With a quota of 1.5 cores, two threads encode and prefill images 1.5
    to 1.8 times as fast as one, and decode as fast; with 1.0, two decode at 0.6 of the speed of one.
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
    """Returns the CPU time that control groups allow this process, as a number of cores; None without a limit.

    Reads `cpu.max` of version 2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` of version 1 (Linux's
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
    """Returns the seconds since boot in which the CPUs this process may use were free for it; None if unknown.

    Free means idle, waiting for I/O or, unless this process is niced itself, running niced processes, which give way.
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
    """Tracks how many threads, up to `n_most`, can have a free core: the cores this process uses plus idle ones.

    A thread that shares a core with another program holds up all others at each barrier of a graph. `now` samples the
    machine at most every `SAMPLE_S`. The first sample counts at once. After that the number changes only if two samples
    in a row are above it or both are below it, so that short bursts of other programs change nothing: at 4 threads,
    samples of 2 and 4 leave 4; samples of 2 and 3 give 3.
    """

    def __init__(
        self,
        n_most: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        used: Callable[[], float] = time.process_time,
        idle: Callable[[], float | None] = idle_seconds,
    ) -> None:
        """`clock`: seconds passed; `used`: seconds of CPU time of this process; `idle`: seconds of CPU time that were
        free, None if unknown."""
        self._n_most, self._clock, self._used, self._idle = n_most, clock, used, idle
        self._n = n_most
        self._last = self._sample()
        self._is_first, self._seen = True, n_most

    def _sample(self) -> tuple[float, float, float | None]:
        return self._clock(), self._used(), self._idle()

    def now(self) -> int:
        """Returns the number of threads to compute with next."""
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
