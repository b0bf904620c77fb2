"""Tests of the page store: bounded, private, shared between processes; its errors are warnings, never failures."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granite4v import PageStore, PageStoreWarning
from granite4v.runtime.engine import page_store, state_file
from granite4v.runtime.engine.state_file import Description
from tests.helpers.source_tree import ROOT

N = 10_000  # bytes of a state


def key(number: int) -> str:
    return f"{number:064x}"


def about(number: int) -> Description:
    return Description(key(number), "m/text.gguf", 100, 1, 0.0)


def state(number: int, n: int = N) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, n, dtype=np.uint8)


def save(store: PageStore, *numbers: int) -> None:
    for number in numbers:
        assert store.save(about(number), state(number))
        os.utime(store.path_of(key(number)), (number, number))


def kept(store: PageStore) -> list[int]:
    return sorted(int(entry.key, 16) for entry in store.entries())


@pytest.fixture
def store(tmp_path: Path) -> PageStore:
    return PageStore(tmp_path / "pages")


def test_what_was_saved_is_loaded(store: PageStore) -> None:
    assert store.load(key(1)) is None and not store.holds(key(1)) and store.entries() == []
    assert not store.folder.exists()  # reading creates nothing
    save(store, 1, 2)
    assert store.holds(key(1))
    for number in (1, 2):
        np.testing.assert_array_equal(store.load(key(number)), state(number))
    assert PageStore(store.folder).holds(key(2))


def test_the_users_own_store_is_the_default(tmp_path: Path) -> None:
    assert PageStore().folder == tmp_path / "own-page-store"  # set in conftest.py


@pytest.mark.skipif(os.name == "nt", reason="no modes there")
def test_nobody_else_can_read_pages(store: PageStore) -> None:
    before = os.umask(0)
    try:
        save(store, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()} == {0o600}
    store.folder.chmod(0o755)
    assert store.load(key(1)) is not None and stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_loading_is_a_use(store: PageStore) -> None:
    save(store, 1, 2)
    before = time.time() - 1
    store.load(key(1))
    first, second = store.entries()
    assert (first.key, second.key) == (key(1), key(2)) and first.last_used > before and second.last_used == 2


def test_those_used_longest_ago_make_room(tmp_path: Path) -> None:
    store = PageStore(tmp_path / "pages", max_bytes=4 * (N + 1000))
    save(store, 1, 2, 3, 4)
    store.load(key(1))
    save(store, 5)
    assert kept(store) == [1, 3, 4, 5]
    assert sum(entry.n_bytes for entry in store.entries()) <= 4 * (N + 1000)
    assert store.save(about(6), state(6, 3 * N))
    assert 6 in kept(store) and len(kept(store)) == 2


def test_replacing_a_page_evicts_nothing(tmp_path: Path) -> None:
    store = PageStore(tmp_path / "pages", max_bytes=2 * (N + 1000))
    save(store, 1, 2, 2, 1)
    assert kept(store) == [1, 2]


def test_a_clock_that_was_set_back_keeps_no_page_for_ever(tmp_path: Path) -> None:
    store = PageStore(tmp_path / "pages", max_bytes=3 * (N + 1000))
    now = time.time()
    for number, used in ((1, now + 1e8), (2, now - 50), (3, now + 2e8)):
        assert store.save(about(number), state(number))
        os.utime(store.path_of(key(number)), (used, used))
    for number in (4, 5, 6):
        assert store.save(about(number), state(number))
        time.sleep(0.01)
    assert kept(store) == [4, 5, 6]


def test_a_full_disk_makes_room_for_what_is_new(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the bound is larger than the disk."""
    save(store, 1, 2, 3)
    large = PageStore(store.folder, max_bytes=1 << 40)
    usage = page_store.shutil.disk_usage(store.folder)
    size = 2 * N + 1000 + page_store.SPARE_BYTES

    def disk_usage(path: Any) -> Any:
        return usage._replace(free=size - sum(entry.n_bytes for entry in store.entries()))

    monkeypatch.setattr(page_store.shutil, "disk_usage", disk_usage)
    save(large, 4)
    assert kept(store) == [3, 4]


def test_a_page_larger_than_the_store_is_left_out(tmp_path: Path) -> None:
    store = PageStore(tmp_path / "pages", max_bytes=2 * N)
    save(store, 1)
    with pytest.warns(PageStoreWarning, match=r"a page takes 30,\d+ bytes, and the store may have 20,000"):
        assert not store.save(about(2), state(2, 3 * N))
    assert kept(store) == [1]


def test_the_default_bound_is_a_share_of_the_disk(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10 * (N + 1000)
    usage = page_store.shutil.disk_usage(store.folder.parent)

    def disk_usage(path: Any) -> Any:
        return usage._replace(free=free - sum(entry.n_bytes for entry in store.entries()))

    monkeypatch.setattr(page_store.shutil, "disk_usage", disk_usage)
    save(store, *range(1, 9))
    assert kept(store) == [7, 8]  # a fifth of what would be free without the store


def test_links_and_folders_in_place_of_pages(store: PageStore, tmp_path: Path) -> None:
    """They are not pages: a new page replaces a link but not its target, and a folder affects no other page."""
    save(store, 1)
    for number in (2, 3):
        store.path_of(key(number)).symlink_to(store.path_of(key(1)) if number == 2 else tmp_path / "nothing")
    store.path_of(key(4)).mkdir()
    assert not any(store.holds(key(number)) for number in (2, 3, 4)) and kept(store) == [1]
    assert [entry.key for entry, _ in store.verify()] == [key(1)]
    save(store, 2, 3)
    np.testing.assert_array_equal(store.load(key(1)), state(1))
    small = PageStore(store.folder, max_bytes=N + 1000)
    save(small, 5)
    assert kept(store) == [5] and store.path_of(key(4)).is_dir()
    with pytest.warns(PageStoreWarning, match="pages cannot be stored"):
        assert not store.save(about(4), state(4))
    assert kept(store) == [5] and not list(store.folder.glob(".granite4v-partial-*"))


def test_other_files_are_left_alone(store: PageStore) -> None:
    save(store, 1)
    for name in ("notes.txt", "x.state", f"{key(2)}.state.bak"):
        (store.folder / name).write_text("mine")
    store.clear()
    assert list(store.verify()) == [] and kept(store) == []
    assert {path.name for path in store.folder.iterdir()} - {page_store.LOCK} == {
        "notes.txt",
        "x.state",
        f"{key(2)}.state.bak",
    }


# --- damage ---


def damage(store: PageStore, number: int) -> None:
    path = store.path_of(key(number))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_page_is_a_miss_with_one_warning_and_is_removed(store: PageStore) -> None:
    save(store, 1, 2)
    damage(store, 1)
    with pytest.warns(PageStoreWarning, match=r"computed again: its checksum is wrong \('.*0001.state'\)") as said:
        assert store.load(key(1)) is None
        assert store.load(key(1)) is None
    assert len(said) == 1 and kept(store) == [2]
    save(store, 1)
    np.testing.assert_array_equal(store.load(key(1)), state(1))


def test_a_page_under_another_name_is_a_miss(store: PageStore) -> None:
    save(store, 1, 2)
    store.path_of(key(1)).replace(store.path_of(key(2)))
    with pytest.warns(PageStoreWarning, match="it holds another state"):
        assert store.load(key(2)) is None


def test_verify_names_and_removes_what_is_damaged(store: PageStore) -> None:
    save(store, 1, 2, 3)
    damage(store, 2)
    found = {int(entry.key, 16): problem for entry, problem in store.verify()}
    assert found == {1: None, 2: "its checksum is wrong", 3: None}
    assert kept(store) == [1, 3]


def test_what_cannot_be_read_is_a_miss_and_stays(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)

    def failing(path: Path, key: str) -> np.ndarray:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(state_file, "read", failing)
    with pytest.warns(PageStoreWarning, match="Input/output error") as said:
        assert store.load(key(1)) is None and store.load(key(1)) is None
    assert len(said) == 1 and kept(store) == [1]


def test_clear_by_age(store: PageStore) -> None:
    save(store, 1, 2)
    os.utime(store.path_of(key(2)))
    n, n_bytes = store.clear(older_than_s=3600)
    assert n == 1 and n_bytes > N and kept(store) == [2]
    assert store.clear()[0] == 1 and kept(store) == []
    assert store.clear() == (0, 0)


# --- writing fails ---


def test_a_full_disk_costs_a_warning(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    write = state_file.write

    def full(file: Any, *rest: Any) -> None:
        file.write(b"something")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_file, "write", full)
    with pytest.warns(PageStoreWarning, match="cannot be stored in .* No space left on device") as said:
        assert not store.save(about(2), state(2)) and not store.save(about(3), state(3))
    assert len(said) == 1
    assert {path.name for path in store.folder.iterdir()} == {page_store.LOCK, store.path_of(key(1)).name}
    monkeypatch.setattr(state_file, "write", write)
    save(store, 2)  # the disk has room again


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = PageStore(tmp_path / "file" / "pages")
    with pytest.warns(PageStoreWarning, match="cannot be stored"):
        assert not store.save(about(1), state(1))
    assert store.load(key(1)) is None and store.entries() == [] and store.clear() == (0, 0)


def test_a_folder_that_is_a_link_to_itself_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "pages").symlink_to("pages")
    store = PageStore(tmp_path / "pages")
    assert not store.holds(key(1))
    with pytest.warns(PageStoreWarning, match="pages cannot be read from"):
        assert store.load(key(1)) is None
    with pytest.warns(PageStoreWarning, match="pages cannot be stored in"):
        assert not store.save(about(1), state(1))


def test_giving_up_leaves_nothing_and_says_nothing(store: PageStore) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not store.save(about(1), state(1), lambda: True)
    assert kept(store) == []


# --- several processes ---

WRITER = """
import sys, numpy as np
from granite4v.runtime.engine import page_store, state_file
from granite4v.runtime.engine.state_file import Description
store = page_store.PageStore(sys.argv[1], max_bytes=int(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    for number in map(int, sys.argv[4:]):
        data = np.random.default_rng(number).integers(0, 256, 10_000, dtype=np.uint8)
        assert store.save(Description(f"{number:064x}", "m/text.gguf", 100, 1, 0.0), data)
"""
SLOW = """
import sys, time, numpy as np
from granite4v.runtime.engine import page_store, state_file
from granite4v.runtime.engine.state_file import Description
state_file.PIECE = 1000
def waiting():
    print("writing", flush=True)
    time.sleep(0.05)
page_store.PageStore(sys.argv[1]).save(Description("9" * 64, "m", 1, 1, 0.0), np.zeros(1 << 20, np.uint8), waiting)
"""


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_writers_and_readers_in_several_processes(store: PageStore) -> None:
    """The store is so small that they keep evicting each other's pages; each load gives the right page or none."""
    most = 3 * (N + 1000)
    processes = [start(WRITER, store.folder, most, 40, *numbers) for numbers in ((1, 2, 3), (3, 4, 5), (1, 5, 6))]
    chosen, n_read = random.Random(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(process.poll() is None for process in processes):
            number = chosen.randint(1, 6)
            found = store.load(key(number))
            if found is not None:
                np.testing.assert_array_equal(found, state(number))
                n_read += 1
    assert [process.wait() for process in processes] == [0, 0, 0] and n_read > 0
    assert sum(entry.n_bytes for entry in store.entries()) <= most
    assert all(problem is None for _, problem in store.verify())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_writer_that_is_killed_leaves_nothing_behind(store: PageStore) -> None:
    save(store, 1)
    with start(SLOW, store.folder) as process:
        assert process.stdout is not None
        for _ in range(8):
            assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    left = [path for path in store.folder.iterdir() if path.name.startswith(".granite4v-partial-")]
    assert len(left) == 1 and kept(store) == [1] and store.load("9" * 64) is None
    save(store, 2)  # the lock was released when the process ended
    assert not left[0].exists() and kept(store) == [1, 2]


def test_a_writer_waits_for_another_and_not_for_ever(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    monkeypatch.setattr(page_store, "LOCK_TIMEOUT_S", 0.3)
    process = start(SLOW, store.folder)
    try:
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
        with pytest.warns(PageStoreWarning, match="another process does not finish writing"):
            assert not store.save(about(2), state(2))
    finally:
        process.kill()
        process.wait()
