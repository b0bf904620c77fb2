"""The set-up of .venv: on a CPU with AMX, llama-cpp-python is compiled once with working kernels, and installed in
place of another build; elsewhere only pip decides. Pip and the compiler are short scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CONSTRAINTS = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
RELEASE = next(line for line in CONSTRAINTS if line.startswith("llama-cpp-python=="))
FLAGS = "-fno-dse -fno-tree-dse"
PYTHON = f"""#!/bin/sh
if [ "$1" = -I ]; then exec {sys.executable} "$@"; fi
echo "$* [${{CXXFLAGS:-}}]" >>calls
case "$*" in
*' wheel '*)
    while [ "$1" != --wheel-dir ]; do shift; done
    mkdir -p "$2" && touch "$2/llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl" ;;
*force-reinstall*)
    while [ $# -gt 1 ]; do shift; done
    info=.venv/lib/python3.12/site-packages/llama_cpp_python-0.3.36.dist-info
    mkdir -p $info && echo "{{\\"url\\": \\"file://$1\\"}}" >$info/direct_url.json ;;
esac
"""
COMPILER = """#!/bin/sh
case "$*" in
--version) printf 'c++ (Debian) 12.2.0\\nCopyright (C) 2022 Free Software Foundation, Inc.\\n' ;;
*) echo 12.2.0 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the set-up needs, with an interpreter and a compiler that only record their arguments."""
    if sys.platform != "linux":
        pytest.skip("AMX is used on Linux alone")
    for name in ("scripts/environment.sh", "scripts/constraints.txt", "granite4v/ggml/compiler.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in ((".venv/bin/python", PYTHON), ("bin/c++", COMPILER)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def set_up(checkout: Path, has_amx: bool = True, **environment: str) -> list[str]:
    """Returns pip's calls in order: 'wheel', 'install' for the cached wheel, 'editable' for this package."""
    (checkout / "calls").unlink(missing_ok=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CXXFLAGS", "CMAKE_ARGS")}
    paths = {"PATH": f"{checkout}/bin:/usr/bin:/bin", "XDG_CACHE_HOME": f"{checkout}/cache"}
    script = f". scripts/environment.sh; has_amx() {{ {'true' if has_amx else 'false'}; }}; use_environment"
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout,
        env={**clean, **paths, **environment},
        check=True,
        capture_output=True,
    )
    calls = (checkout / "calls").read_text().splitlines()
    kinds = {" wheel ": "wheel", "--force-reinstall": "install", "--editable": "editable"}
    assert all(f"{RELEASE} [" in call for call in calls if " wheel " in call)
    return [kind for call in calls for mark, kind in kinds.items() if mark in call]


def flags_of_the_build(checkout: Path) -> str:
    call = next(call for call in (checkout / "calls").read_text().splitlines() if " wheel " in call)
    assert "--no-cache-dir" in call and "--no-binary llama-cpp-python" in call  # pip's cached wheel may be a broken one
    return call.split("[")[1].rstrip("]")


def test_without_amx_pip_alone_decides(checkout: Path) -> None:
    assert set_up(checkout, has_amx=False) == ["editable"]


def test_a_build_for_amx_is_compiled_once(checkout: Path) -> None:
    assert set_up(checkout) == ["wheel", "install", "editable"]
    assert flags_of_the_build(checkout) == FLAGS
    assert set_up(checkout) == ["editable"]
    shutil.rmtree(checkout / ".venv" / "lib")  # a new environment, or one with a build from elsewhere
    assert set_up(checkout) == ["install", "editable"]


def test_other_options_make_another_build(checkout: Path) -> None:
    set_up(checkout)
    assert set_up(checkout, CXXFLAGS="-g") == ["wheel", "install", "editable"]
    assert flags_of_the_build(checkout) == f"-g {FLAGS}"
    assert set_up(checkout, CXXFLAGS="-g", CMAKE_ARGS="-DGGML_CUDA=on") == ["wheel", "install", "editable"]
    assert set_up(checkout) == ["install", "editable"]  # the first one is still cached


def test_a_build_that_fails_is_not_kept(checkout: Path) -> None:
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(PYTHON.replace("*' wheel '*)", "*' wheel '*) exit 1 ;;\nnothing)"))
    with pytest.raises(subprocess.CalledProcessError):
        set_up(checkout)
    python.write_text(PYTHON)
    assert set_up(checkout) == ["wheel", "install", "editable"]


def test_without_a_compiler_pip_alone_decides(checkout: Path) -> None:
    (checkout / "bin" / "c++").unlink()
    for name in ("uname", "grep", "dirname", "sed"):  # everything that the scripts need from there, but no compiler
        (checkout / "bin" / name).symlink_to(shutil.which(name) or "")
    for name in ("bash", "sh", "cat", "mkdir", "touch"):
        (checkout / "bin" / name).symlink_to(shutil.which(name) or "")
    assert set_up(checkout, PATH=f"{checkout}/bin") == ["editable"]
