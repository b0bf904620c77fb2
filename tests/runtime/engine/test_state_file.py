"""Tests of state files: a state is read back as it was written, or refused."""

from __future__ import annotations

import os
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granite4v.runtime.engine.state_file import (
    FORMAT,
    MAGIC,
    DamagedState,
    Description,
    Stopped,
    describe,
    read,
    size,
    write,
)

KEY, OTHER = "a" * 64, "b" * 64
ABOUT = Description(KEY, "model/text-F16.gguf", 1200, 1, 1.5e9)
STATE = np.random.default_rng(0).integers(0, 256, 20_000_001, dtype=np.uint8)  # several pieces, the last one short


def written(path: Path, state: np.ndarray = STATE) -> Path:
    with FileIO(path, "wb") as file:
        write(file, ABOUT, state, lambda: False)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "state")


def test_it_is_read_as_it_was_written(path: Path) -> None:
    np.testing.assert_array_equal(read(path, KEY), STATE)
    assert describe(path) == ABOUT
    assert path.stat().st_size == size(ABOUT, STATE)
    head = path.read_bytes()[:24]
    assert head[:8] == MAGIC and struct.unpack("<IIQ", head[8:])[::2] == (FORMAT, len(STATE))


class Reluctant(FileIO):
    """Writes at most seven bytes at a time, as a nearly full disk may."""

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[:7])


def test_a_disk_that_takes_little_at_a_time(tmp_path: Path) -> None:
    with Reluctant(tmp_path / "state", "wb") as file:
        write(file, ABOUT, STATE[:1000], lambda: False)
    np.testing.assert_array_equal(read(tmp_path / "state", KEY), STATE[:1000])


def test_an_empty_state_too(tmp_path: Path) -> None:
    assert len(read(written(tmp_path / "empty", STATE[:0]), KEY)) == 0


def test_another_key_is_another_state(path: Path) -> None:
    with pytest.raises(DamagedState, match="another state"):
        read(path, OTHER)


@pytest.mark.parametrize("n_left", [0, 7, 23, 24, 100, 1_000_000, -1])
def test_a_file_that_was_cut_is_damaged(path: Path, n_left: int) -> None:
    os.truncate(path, n_left if n_left >= 0 else path.stat().st_size + n_left)
    with pytest.raises(DamagedState):
        read(path, KEY)


def test_a_longer_file_is_damaged(path: Path) -> None:
    """llama.cpp would ignore bytes after a state."""
    with open(path, "ab") as file:
        file.write(b"\0")
    with pytest.raises(DamagedState, match=r"bytes, expected"):
        read(path, KEY)


@pytest.mark.parametrize("place", [0, 8, 12, 16, 23, 30, 150, 10_000_000, -33, -32, -1])
def test_any_flipped_bit_is_noticed(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)
    with pytest.raises(DamagedState):
        read(path, KEY)


def test_another_format_is_named(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] = FORMAT + 1
    path.write_bytes(data)
    with pytest.raises(DamagedState, match=f"format {FORMAT + 1}, expected {FORMAT}"):
        describe(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes there")
def test_only_regular_files_are_opened(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError):
        read(tmp_path / "link", KEY)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedState, match="regular file"):  # opening it to read would block forever
        read(tmp_path / "pipe", KEY)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none", KEY)


def test_writing_can_be_given_up(tmp_path: Path) -> None:
    asked = 0

    def is_stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    with FileIO(tmp_path / "state", "wb") as file, pytest.raises(Stopped):
        write(file, ABOUT, STATE, is_stopped)
    assert 0 < (tmp_path / "state").stat().st_size < len(STATE)
