"""Kernels compiled by an earlier process: they are reused, but not trusted where others could have written them."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from granite4v.ggml.compiled import object_cache, writer
from granite4v.ggml.compiled.writer import Writer, compiled, llvm

needs_llvm = pytest.mark.skipif(llvm() is None, reason="needs llvmlite")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / object_cache.FOLDER


class Counted:
    """Writes a function that adds a number to its argument, and counts how often it was written."""

    def __init__(self, number: int) -> None:
        self.number, self.n_written = number, 0

    def __call__(self) -> str:
        self.n_written += 1
        w = Writer()
        function = w.begin("add", w.i64, w.i64)
        w.b.ret(w.b.add(function.args[0], w.integer(self.number)))
        return str(w.module)

    def called(self, what: str | None = "a test") -> int:
        engine = compiled(self, what)
        return int(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("add"))(1))


@needs_llvm
def test_code_is_compiled_once(folder: Path) -> None:
    write = Counted(41)
    assert [write.called(), write.called()] == [42, 42] and write.n_written == 1
    assert Counted(1).called("another") == 2 and Counted(2).called() == 42  # the same description means the same code
    assert len(list(folder.iterdir())) == 2 and folder.stat().st_mode & 0o077 == 0


@needs_llvm
def test_what_holds_in_one_process_is_not_kept(folder: Path) -> None:
    write = Counted(1)
    assert [write.called(None), write.called(None)] == [2, 2] and write.n_written == 2
    assert not folder.exists()


@needs_llvm
def test_threads_compile_at_the_same_time(folder: Path) -> None:
    """The code from one thread works whether or not another has compiled the same meanwhile."""
    writes = [Counted(41) for _ in range(4)]
    with ThreadPoolExecutor(len(writes)) as pool:
        assert list(pool.map(lambda write: [write.called("threads") for _ in range(5)], writes)) == [[42] * 5] * 4
    assert sum(write.n_written for write in writes) == 1


@needs_llvm
@pytest.mark.parametrize("n_threads", [2, 4])
def test_threads_ask_for_the_same_kernels_first(n_threads: int, tmp_path: Path) -> None:
    """In a child process, which would be ended by a use of freed code."""
    code = f"""
import ctypes, threading
from concurrent.futures import ThreadPoolExecutor
from granite4v.ggml.compiled import between_layers, image_attention, nodes
barrier = threading.Barrier({n_threads})
def ask(_):
    barrier.wait()
    found = nodes.callback(nodes.NodeKernels(rotary=True)), between_layers.address()
    see = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(found[0])
    node = (ctypes.c_char * 4096)()
    return [see(ctypes.addressof(node), True, None) for _ in range(100)]
with ThreadPoolExecutor({n_threads}) as pool:
    assert list(pool.map(ask, range({n_threads}))) == [[False] * 100] * {n_threads}
"""
    environment = {**os.environ, "GRANITE4V_CACHE": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@needs_llvm
def test_a_folder_that_is_only_read_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    Counted(1).called()
    monkeypatch.setattr(object_cache.os, "utime", refuse)
    write = Counted(1)
    assert write.called() == 2 and write.n_written == 0


def other_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(llvm(), "get_host_cpu_name", lambda: "x86-64-v3")


def other_llvm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(writer, "version", lambda: "0.1")


def other_system(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(llvm(), "get_default_triple", lambda: "x86_64-pc-windows-msvc")


def other_sources(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(writer, "SOURCES", "other")


@needs_llvm
@pytest.mark.parametrize("change", [other_cpu, other_llvm, other_system, other_sources])
def test_code_for_something_else_is_not_used(
    folder: Path, change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Counted(1)
    write.called()
    with monkeypatch.context() as patch:
        change(patch)
        write.called()
    assert write.n_written == 2 and len(list(folder.iterdir())) == 2


@needs_llvm
@pytest.mark.parametrize("damage", [lambda code: code[:-1], lambda _: b"", lambda code: code[:90] + b"?" + code[91:]])
def test_damaged_code_is_compiled_again(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    write = Counted(1)
    write.called()
    (kept,) = folder.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert [write.called(), write.called()] == [2, 2] and write.n_written == 2


@needs_llvm
@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_code_that_others_may_write_is_not_used(folder: Path) -> None:
    write = Counted(1)
    write.called()
    folder.chmod(0o770)
    assert write.called() == 2 and write.n_written == 2
    folder.chmod(0o700)
    assert write.called() == 2 and write.n_written == 2
    moved = folder.rename(folder.parent / "moved")
    folder.symlink_to(moved)
    assert write.called() == 2 and write.n_written == 3


@needs_llvm
def test_without_a_folder_code_is_compiled_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "file"))
    write = Counted(1)
    assert [write.called(), write.called()] == [2, 2] and write.n_written == 2


def test_the_oldest_leave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_cache, "MOST_FILES", 3)
    for number in range(3):
        object_cache.keep(f"key{number}", bytes([number]))
        os.utime(folder / f"key{number}", (number, number))
    assert object_cache.find("key0") == b"\x00"  # which makes it the last used one
    object_cache.keep("key3", b"")
    assert sorted(path.name for path in folder.iterdir()) == ["key0", "key2", "key3"]
    assert object_cache.find("key1") is None and object_cache.find("key3") == b""
