"""The table of rates, and the report on kernels that end their process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from granite4v.doctor import kernels, native
from granite4v.doctor.kernels import describe
from granite4v.errors import DeviceError
from granite4v.ggml import autotune
from granite4v.ggml.build import Build
from granite4v.ggml.compiler import GCC_FLAGS
from granite4v.ggml.kernel_timing import MANY
from granite4v.ggml.kernels import FLOAT32, PLAIN, Kernel
from tests.helpers import faulty_kernels

GCC, CLANG = "GCC 12.2.0", "clang 19.1.7"
FEATURES = ("avx2", "avx512", "avx512_vnni", "amx_int8")


def build(compiler: str = GCC) -> Build:
    return Build("0.3.36", "0.25.3", compiler, FEATURES, "0123456789ab")


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, native):
        monkeypatch.setattr(module, "cpu_features", lambda: FEATURES)
    monkeypatch.setattr(native.compiler, "settings", lambda environment: {"CXXFLAGS": GCC_FLAGS})
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native.sys, "platform", "linux")


def test_the_fastest_of_each_type_is_marked() -> None:
    rates = {"F32": {PLAIN: 170.4}, "Q8_0": {PLAIN: 107.0, FLOAT32: 90.0, "AMX": 486.2}, "Q4_K": {"AMX": 361.0}}
    section = describe(rates, 2, build(CLANG), {"AMX"})
    assert section.lines == [
        "GFLOP/s with 2 threads; * the fastest",
        ["", PLAIN, FLOAT32, "AMX"],
        ["F32", "170 ", "-", "-"],
        ["Q8_0", "107 ", "90 ", "486*"],
        ["Q4_K", "-", "-", "361 "],
    ]
    assert section.data == {"n_threads": 2, "gflop_s": rates} and list(section.problems) == []


def test_amx_kernels_that_gcc_broke_are_explained_with_the_command() -> None:
    rates = {"Q8_0": {PLAIN: 107.0, "AMX": None}, "Q4_0": {PLAIN: 84.0, "AMX": None}, "F32": {PLAIN: 170.0}}
    section = describe(rates, 2, build(), {"AMX"})
    (problem,) = section.problems
    assert section.lines[2] == ["Q8_0", "107*", "crashes"]
    assert problem.is_serious and problem.text.startswith(
        "The AMX kernels end the process (Q8_0, Q4_0): GCC 12.2.0 removed the stores that fill the tile configuration"
    )
    assert problem.command == native.install_command() and GCC_FLAGS in problem.command


def test_amx_that_a_virtual_machine_only_announces_needs_no_other_build() -> None:
    (problem,) = describe({"Q8_0": {PLAIN: 107.0, "AMX": None}}, 2, build(CLANG), {"AMX"}).problems
    assert problem.is_serious and "announces AMX and does not let it be used" in problem.text and not problem.command


def test_amx_that_the_system_refuses_is_told() -> None:
    (problem,) = describe({"Q8_0": {PLAIN: 107.0}}, 2, build(), {"CPU_REPACK"}).problems
    assert problem.is_serious and "does not let this process use it" in problem.text and not problem.command


def test_a_plain_kernel_that_crashes_is_serious_and_another_is_not() -> None:
    crash = describe({"Q8_0": {PLAIN: None, "AMX": 400.0}}, 2, build(), {"AMX"}).problems
    assert [(problem.is_serious, "cannot be used" in problem.text) for problem in crash] == [(True, True)]
    crash = describe({"Q8_0": {PLAIN: 9.0, "CPU_REPACK": None, "AMX": 400.0}}, 2, build(), {"AMX"}).problems
    assert [(problem.is_serious, "CPU_REPACK" in problem.text) for problem in crash] == [(False, True)]


def test_a_kernel_that_ends_its_process_is_found_by_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    offered = {name: Kernel(name) for name in (PLAIN, "AMX")}
    monkeypatch.setattr(autotune, "available_kernels", lambda backend, kind: offered)
    monkeypatch.setattr(autotune, "kernel_timing", SimpleNamespace(__name__=faulty_kernels.__name__))
    monkeypatch.setenv("FAULTY_KERNELS", json.dumps({PLAIN: 0.001, "AMX": "abort"}))
    monkeypatch.setenv("FAULTY_KERNELS_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(kernels, "TYPES", ("Q8_0", "F16"))
    section = kernels.measure(build())
    rates = {kind: autotune.gflop(kind) / (0.001 * MANY) for kind in ("Q8_0", "F16")}
    assert section.data["gflop_s"] == {kind: {PLAIN: pytest.approx(rate), "AMX": None} for kind, rate in rates.items()}
    problem = section.problems[0]
    assert "end the process (Q8_0, F16)" in problem.text and GCC_FLAGS in problem.command


def test_what_there_was_no_time_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "available_kernels", lambda backend, kind: {PLAIN: None, "AMX": None})
    monkeypatch.setattr(kernels, "prompt_kernels", lambda kind: {})
    monkeypatch.setattr(kernels, "compiled_kernels", lambda kind, n_rows: {})
    monkeypatch.setattr(kernels, "TYPES", ("F32", "Q8_0", "Q4_0"))
    measured = {"F32": {PLAIN: 100.0, "AMX": 400.0}, "Q8_0": {PLAIN: 80.0}, "Q4_0": {}}
    monkeypatch.setattr(kernels.autotune, "rates", lambda backend, types: measured)
    problem = kernels.measure(build()).problems[-1]
    assert not problem.is_serious and "measure 3 kernels, from 'Q8_0 AMX' on" in problem.text


@pytest.mark.parametrize(("load", "expected"), [(0.1, 0), (2.0, 1)])
def test_a_busy_machine_is_mentioned(
    load: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(kernels.autotune, "rates", lambda backend, types: {"F32": {PLAIN: 100.0}})
    section = kernels.measure(build())
    assert section.data["load_before"] == load
    assert sum("other programs were running" in line for line in section.lines if isinstance(line, str)) == expected


def test_what_cannot_be_measured_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise DeviceError("no device")

    monkeypatch.setattr(kernels, "Backend", refuse)
    section = kernels.measure(build())
    assert [problem.text for problem in section.problems] == ["The kernels cannot be measured: no device"]
