"""Compiler settings for the AMX kernels, with short scripts as compilers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from granite4v.ggml import compiler
from granite4v.ggml.compiler import GCC_FLAGS, settings

GCC_SAYS = "c++ (Debian 12.2.0-14) 12.2.0\\nCopyright (C) 2022 Free Software Foundation, Inc."


def compiler_named(folder: Path, name: str, says: str, version: str, compiles: bool = True) -> None:
    """Writes a script that prints a compiler's version, and 'compiles' by reading its input and succeeding or
    failing."""
    lines = f"""#!/bin/sh
case "$*" in
*--version) printf '{says}\\n' ;;
*-dumpversion) echo {version} ;;
*) cat >/dev/null; exit {0 if compiles else 1} ;;
esac
"""
    (folder / name).write_text(lines)
    (folder / name).chmod(0o755)


def clang(folder: Path, suffix: str, version: str, compiles: bool = True, c: bool = True) -> None:
    compiler_named(folder, f"clang++{suffix}", f"clang version {version}", version, compiles)
    if c:
        compiler_named(folder, f"clang{suffix}", f"clang version {version}", version)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH, in which the default compiler is GCC."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    compiler_named(tmp_path, "c++", GCC_SAYS, "12")
    return tmp_path


def test_gcc_gets_flags_and_keeps_those_of_the_user(folder: Path) -> None:
    path = {"PATH": str(folder)}
    assert settings(path) == {"CXXFLAGS": "-fno-dse -fno-tree-dse"}
    assert settings({**path, "CXXFLAGS": "-O2 -g"}) == {"CXXFLAGS": "-O2 -g -fno-dse -fno-tree-dse"}
    assert settings({**path, "CXXFLAGS": f"-g {GCC_FLAGS}"}) == {}


def test_without_a_default_compiler_the_newest_clang_that_works_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sh", "cat"):  # the scripts need them
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    path = {"PATH": str(tmp_path)}
    clang(tmp_path, "-14", "14.0.6")
    assert settings(path) == {}  # older than the versions that were tested
    clang(tmp_path, "-16", "16.0.6")
    clang(tmp_path, "-9", "9.0.1")
    clang(tmp_path, "", "18.1.3")
    assert settings(path) == {"CC": "clang", "CXX": "clang++"}
    clang(tmp_path, "-19", "19.1.7", compiles=False)  # without OpenMP, or without a C++ library
    clang(tmp_path, "-20", "20.1.0", c=False)
    clang(tmp_path, "-18-extra", "21.0.0")
    assert settings(path) == {"CC": "clang", "CXX": "clang++"}
    clang(tmp_path, "-20", "20.1.0")
    assert settings(path) == {"CC": "clang-20", "CXX": "clang++-20"}
    compiler_named(tmp_path, "c++", "clang version 18.1.3", "18.1.3")
    assert settings(path) == {}  # the default is a clang, which is fine
    compiler_named(tmp_path, "c++", GCC_SAYS, "12")
    assert settings(path) == {"CXXFLAGS": GCC_FLAGS}


def test_a_compiler_that_the_user_names_is_kept(folder: Path) -> None:
    clang(folder, "-19", "19.1.7")
    compiler_named(folder, "g++-13", "g++-13 (x) 13.3.0\\nCopyright (C) 2023 Free Software Foundation, Inc.", "13")
    path = {"PATH": str(folder)}
    assert settings({**path, "CXX": "g++-13 -m64"}) == {"CXXFLAGS": GCC_FLAGS}
    assert settings({**path, "CXX": "clang++-19", "CC": "clang-19"}) == {}
    assert settings({**path, "CC": "gcc"}) == {"CXXFLAGS": GCC_FLAGS}
    assert settings({**path, "CXX": "nothing-of-this-name"}) == {}


def test_the_file_runs_alone_and_prints_what_a_shell_can_read(folder: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CXXFLAGS")}
    clean["PATH"] = f"{folder}:/usr/bin:/bin"
    script = f'eval "$({sys.executable} -I {compiler.__file__})"; printf "%s|" "${{CC:-}}" "${{CXX:-}}" "$CXXFLAGS"'
    done = subprocess.run(["bash", "-c", script], env={**clean, "CXX": "c++"}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"|c++|{GCC_FLAGS}|", "")


CONFIGURE = """
#include <immintrin.h>
struct Config { unsigned char palette, start, reserved[14]; unsigned short columns[16]; unsigned char rows[16]; };
void configure() {
    alignas(64) Config tiles = {};
    tiles.palette = 1;
    tiles.rows[0] = 8; tiles.columns[0] = 64;
    tiles.rows[1] = 16; tiles.columns[1] = 32;
    _tile_loadconfig(&tiles);
}
"""
RECORD = """
#include <cstdio>
#include <cstdlib>
extern "C" void record(const unsigned char * config) {
    for (int i = 0; i < 64; i++) printf("%02x", config[i]);
    exit(0);
}
void configure();
int main() { configure(); }
"""
EXPECTED = struct.pack("<16B16H16B", 1, *[0] * 15, 64, 32, *[0] * 14, 8, 16, *[0] * 14)


def loaded_tiles(command: list[str], folder: Path) -> bytes:
    """Returns what `ldtilecfg` reads: in the compiler's assembly it is replaced by a call that prints its operand."""
    program = str(folder / "program")
    assembly = subprocess.run(
        [*command, "-O3", "-mamx-tile", "-mno-red-zone", "-x", "c++", "-S", "-o", "-", "-"],
        input=CONFIGURE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    called, n = re.subn(r"ldtilecfg\s+(\S+)", r"leaq \1, %rdi; andq $-64, %rsp; call record", assembly)
    assert n == 1
    (folder / "configure.s").write_text(called)
    (folder / "record.cpp").write_text(RECORD)
    sources = [str(folder / "configure.s"), str(folder / "record.cpp")]
    subprocess.run([*command, *sources, "-no-pie", "-o", program], check=True)
    return bytes.fromhex(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


def test_gcc_with_the_flags_loads_the_sizes_of_tiles(tmp_path: Path) -> None:
    if platform.machine() != "x86_64" or not compiler.is_gcc("g++"):
        pytest.skip("needs GCC on x86-64")
    if subprocess.run(["g++", "-mamx-tile", "-E", "-x", "c++", "-"], input=b"", capture_output=True).returncode:
        pytest.skip("this GCC knows no AMX")
    assert loaded_tiles(["g++", *GCC_FLAGS.split()], tmp_path) == EXPECTED
