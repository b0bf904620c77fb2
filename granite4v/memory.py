"""Measures and limits the memory a process can take from its machine and container, and allocates large pages."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import resource
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # the root control group that this process sees; in a container, the container's own
_M_TRIM_THRESHOLD, _M_ARENA_MAX = -1, -8  # malloc.h of glibc 2.36
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Bytes that can be allocated without swapping, including droppable file pages; None if unknown (on systems other
    than Linux)."""
    known = [n for n in (_of_machine(meminfo), _of_container(cgroup)) if n is not None]
    return min(known, default=None)


def limit_address_space(n_bytes: int) -> None:
    """Limits this process to `n_bytes` more of address space, and turns core files off. macOS has no such limit."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        taken_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = min(value for value in (taken_bytes + n_bytes, soft, hard) if value != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def give_back_freed() -> None:
    """Makes glibc return freed memory to the system, for long-running processes: otherwise each thread keeps some
    megabytes from its peak. Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)


def has_large_pages(setting: Path = LARGE_PAGES) -> bool:
    """Whether memory that requests large pages gets them (Linux's transparent huge pages)."""
    try:
        return bool(re.search(r"\[(always|madvise)\]", setting.read_text()))
    except OSError:
        return False


def large_buffer(n_bytes: int) -> mmap.mmap:
    """Allocates memory for states of a hundred megabytes, in large pages where the system has them. With small pages,
    first touching the memory costs four times as much as reading and checking such a state. Raises MemoryError."""
    try:
        buffer = mmap.mmap(-1, max(n_bytes, 1))
    except OSError:
        raise MemoryError from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without large pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _of_machine(meminfo: Path) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _of_container(cgroup: Path) -> int | None:
    """Free bytes of the container's control group (version 2): limit minus use, plus file pages that can be dropped."""
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        numbers = dict(re.findall(r"^(file|shmem) (\d+)$", (cgroup / "memory.stat").read_text(), re.MULTILINE))
        droppable = int(numbers.get("file", 0)) - int(numbers.get("shmem", 0))  # 'file' includes tmpfs, which stays
        return int(limit) - int(used) + max(0, droppable)
    except (OSError, ValueError):  # version 1, no limit ('max'), or no control group
        return None
