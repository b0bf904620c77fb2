"""The doctor's report on a build: broken, generic, for another CPU, without the GPU; and the command that helps."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from granite4v.child import Ended
from granite4v.doctor import native
from granite4v.doctor.native import Probe, install_command
from granite4v.ggml import build as installed
from granite4v.ggml.build import Build, devices, installed_build
from granite4v.ggml.compiler import GCC_FLAGS

AVX2 = ("avx", "avx2", "fma", "f16c")
SERVER = (*AVX2, "avx512", "avx512_vnni", "avx512_bf16", "amx_int8")


def made(*features: str, compiler: str = "GCC 12.2.0") -> Probe:
    return Probe(Build("0.3.36", native.TESTED_VERSION, compiler, features, "0123456789ab"))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's CPU, with GCC as the compiler."""
    monkeypatch.setattr(native, "cpu_features", lambda: SERVER)
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native.sys, "platform", "linux")
    monkeypatch.setattr(native.compiler, "settings", lambda environment: {"CXXFLAGS": GCC_FLAGS})


def test_the_installed_build_is_found_in_a_child() -> None:
    found = native.probe()
    assert found.build == installed_build() and list(found.devices) == devices() and not found.error
    assert [device["kind"] for device in found.devices].count("cpu") == 1


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (Ended(-4, "", ""), "loading it ended a process by SIGILL"),
        (Ended(None, "", ""), "loading it ended a process after a timeout"),
        (Ended(1, "", "Traceback\nImportError: libomp.so.5: no such file"), "with status 1: ImportError: libomp.so.5"),
        (Ended(0, '{"error": "no such function"}\n', ""), "no such function"),
        (Ended(0, '{"build": {"features": []}, "devices": []}\n', ""), "with status 0"),
    ],
)
def test_a_build_that_does_not_load_is_serious(
    ended: Ended, expected: str, cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "run_main", lambda *_: ended)
    section = native.build(native.probe())
    (problem,) = section.problems
    assert problem.is_serious and "llama-cpp-python is broken" in problem.text and expected in problem.text
    assert problem.command == install_command() and section.data["error"] in problem.text
    assert native.gpu(native.probe()).problems == []


def test_a_process_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Ended:
        raise OSError("no memory")

    monkeypatch.setattr(native, "run_main", refuse)
    assert native.probe() == Probe(error="no process can be started to load it: no memory")


def test_a_missing_llama_cpp_python_is_installed_with_what_it_needs(
    cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "installed_version", lambda: installed.UNKNOWN)
    (problem,) = native.build(Probe(error="not installed")).problems
    assert problem.text == "llama-cpp-python is not installed." and problem.is_serious
    assert "llama-cpp-python>=" in problem.command and "--no-deps" not in problem.command


def test_a_build_that_uses_all_that_the_cpu_has_is_fine(cpu: None) -> None:
    section = native.build(made(*SERVER))
    assert list(section.problems) == [] and section.data["not_used"] == []
    assert section.lines[0] == f"llama-cpp-python 0.3.36, ggml {native.TESTED_VERSION}, compiled by GCC 12.2.0"


def test_two_openmp_libraries_in_one_process_are_advised_against(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for openmp, installed_too, n_problems in (("libomp", True, 1), ("libomp", False, 0), ("libgomp", True, 0)):
        monkeypatch.setattr(native.onednn, "is_installed", lambda installed_too=installed_too: installed_too)
        found = Probe(dataclasses.replace(made(*SERVER).build, openmp=openmp))
        problems = native.build(found).problems
        assert [problem.is_serious for problem in problems] == [False] * n_problems
        assert all("Compile it with GCC" in problem.text and problem.command for problem in problems)


def test_a_generic_build_is_serious(cpu: None) -> None:
    section = native.build(made(*AVX2))
    (problem,) = section.problems
    assert problem.is_serious and problem.command == install_command()
    assert "does not use AVX-512, AVX-512 VNNI, AMX, which this CPU has" in problem.text
    assert section.data["not_used"] == ["avx512", "avx512_vnni", "avx512_bf16", "amx_int8"]


def test_features_of_few_kernels_are_only_mentioned(cpu: None) -> None:
    section = native.build(made(*(name for name in SERVER if name != "avx512_bf16")))
    assert list(section.problems) == [] and section.lines[-1] == "not used: AVX-512 BF16"


def test_a_build_for_another_cpu_is_serious(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_features", lambda: AVX2)
    (problem,) = native.build(made(*AVX2, "avx512", "avx512_vnni")).problems
    assert problem.is_serious and "this CPU lacks (AVX-512, AVX-512 VNNI)" in problem.text


def test_a_cpu_that_is_not_known_has_no_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_features", lambda: ())
    assert list(native.build(made(*SERVER)).problems) == []


def test_gpus_without_support_are_advice(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NVIDIA", Path("/"))  # a path that exists
    section = native.gpu(made(*SERVER))
    (problem,) = section.problems
    assert not problem.is_serious and "NVIDIA GPU" in problem.text
    words = shlex.split(problem.command)
    assert "CMAKE_ARGS=-DGGML_CUDA=on" in words and f"CXXFLAGS={GCC_FLAGS}" in words
    seen = {"name": "CUDA0", "kind": "gpu", "registry": "CUDA", "description": "NVIDIA L4"}
    section = native.gpu(Probe(made(*SERVER).build, (seen,)))
    assert list(section.problems) == [] and section.lines == ["CUDA0: NVIDIA L4"]


def test_a_mac_without_metal_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.sys, "platform", "darwin")
    monkeypatch.setattr(native.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "NVIDIA", Path("/nonexistent"))
    (problem,) = native.gpu(made("neon", "dotprod")).problems
    assert not problem.is_serious and "CMAKE_ARGS=-DGGML_METAL=on" in shlex.split(problem.command)


def test_the_command_compiles_this_version_anew(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/my python/bin/python")
    assert shlex.split(install_command(environment={})) == [
        f"CXXFLAGS={GCC_FLAGS}",
        *("/opt/my python/bin/python", "-m", "pip", "install", "--no-cache-dir", "--force-reinstall", "--no-deps"),
        *("--no-binary", "llama-cpp-python", f"llama-cpp-python=={installed.installed_version()}"),
    ]
    told = install_command("-DGGML_CUDA=on", environment={"CMAKE_ARGS": "-DGGML_BLAS=off"})
    assert "CMAKE_ARGS=-DGGML_BLAS=off -DGGML_CUDA=on" in shlex.split(told)
    monkeypatch.setattr(native, "cpu_features", lambda: AVX2)  # without the feature no compiler can break its kernels
    assert "CXXFLAGS" not in install_command(environment={})


def test_pip_understands_the_command(cpu: None, tmp_path: Path) -> None:
    """With '--dry-run', '--no-index' and a folder without the package, it fails only because the package is missing."""
    words = [word for word in shlex.split(install_command(environment={})) if "=-" not in word]
    done = subprocess.run(
        [*words, "--dry-run", "--no-index", "--find-links", str(tmp_path)], capture_output=True, text=True
    )
    if "No module named pip" in done.stderr:
        pytest.skip("no pip")
    assert "No matching distribution found for llama-cpp-python==" in done.stderr
