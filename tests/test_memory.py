"""Available memory of the machine, or of a container with less."""

from __future__ import annotations

from pathlib import Path

import pytest

from granite4v.memory import available_bytes, has_large_pages, large_buffer

MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


def container(folder: Path, maximum: str, current: int, stat: str) -> Path:
    folder.mkdir()
    for name, text in (("memory.max", maximum), ("memory.current", str(current)), ("memory.stat", stat)):
        (folder / name).write_text(f"{text}\n")
    return folder


def test_the_smaller_of_machine_and_container(tmp_path: Path) -> None:
    meminfo, missing = tmp_path / "meminfo", tmp_path / "missing"
    meminfo.write_text(MEMINFO)
    assert available_bytes(meminfo, missing) == 8_000_000 * 1024
    limited = container(tmp_path / "limited", "4000000000", 3_000_000_000, "anon 1\nfile 500000000\nfile_mapped 7")
    assert available_bytes(meminfo, limited) == 1_500_000_000  # pages of files can be dropped
    assert available_bytes(missing, limited) == 1_500_000_000
    shared = container(tmp_path / "shared", "4000000000", 3_000_000_000, "anon 1\nfile 500000000\nshmem 200000000")
    assert available_bytes(meminfo, shared) == 1_300_000_000  # tmpfs stays
    unlimited = container(tmp_path / "unlimited", "max", 3_000_000_000, "file 5")
    assert available_bytes(meminfo, unlimited) == 8_000_000 * 1024
    assert available_bytes(missing, missing) is None
    meminfo.write_text("nothing of the kind\n")
    assert available_bytes(meminfo, missing) is None


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("always [madvise] never", True),
        ("[always] madvise never", True),
        ("always madvise [never]", False),
        ("", False),
    ],
)
def test_large_pages(tmp_path: Path, setting: str, expected: bool) -> None:
    (tmp_path / "enabled").write_text(f"{setting}\n")
    assert has_large_pages(tmp_path / "enabled") is expected
    assert not has_large_pages(tmp_path / "missing")


def test_a_large_buffer_is_writable_and_what_no_memory_has_room_for_is_refused() -> None:
    buffer = large_buffer(3 << 20)
    buffer[-4:] = b"last"
    assert len(buffer) == 3 << 20 and buffer[:4] == bytes(4)
    assert len(large_buffer(0)) == 1
    with pytest.raises(MemoryError):
        large_buffer(1 << 62)
