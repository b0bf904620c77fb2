"""How much memory a process can still take, of the machine and of the container it runs in, and in what pages."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import resource
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # the control group at the root of what this process sees, as containers have it
_M_TRIM_THRESHOLD, _M_ARENA_MAX = -1, -8  # malloc.h of glibc 2.36
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Bytes that can be taken without swapping, pages of files that can be dropped included; None if the system does
    not tell (on others than Linux)."""
    known = [n for n in (_of_machine(meminfo), _of_container(cgroup)) if n is not None]
    return min(known, default=None)


def limit_address_space(n_bytes: int) -> None:
    """From now on this process gets at most so many more bytes of address space, and writes no core file when it ends.
    macOS has no such limit."""
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
    """Has glibc return what is freed to the system, for a process that runs for long: otherwise each thread keeps some
    megabytes of its largest moment. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)


def has_large_pages(setting: Path = LARGE_PAGES) -> bool:
    """Whether memory that asks for large pages gets them (Linux's transparent huge pages)."""
    try:
        return bool(re.search(r"\[(always|madvise)\]", setting.read_text()))
    except OSError:
        return False


def large_buffer(n_bytes: int) -> mmap.mmap:
    """Memory for states of a hundred megabytes, in large pages where the system has them: touched for the first time
    in small ones, it costs four times as much as reading such a state and checking it. Raises MemoryError."""
    try:
        buffer = mmap.mmap(-1, max(n_bytes, 1))
    except OSError:
        raise MemoryError from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that was built without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _of_machine(meminfo: Path) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _of_container(cgroup: Path) -> int | None:
    """Of a control group, version 2."""
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        files = re.search(r"^file (\d+)$", (cgroup / "memory.stat").read_text(), re.MULTILINE)
        return int(limit) - int(used) + (int(files[1]) if files else 0)
    except (OSError, ValueError):  # another version, no limit ('max'), or none of it
        return None
