"""What is read from an installed build: its compiler, its CPU features, and an id that changes with its code."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from granite4v.errors import DeviceError
from granite4v.ggml import build, cpu_features
from granite4v.ggml.library import library_path


def elf_file(path: Path, comment: bytes | None) -> Path:
    """Writes a 64-bit ELF file of three sections, the last one '.comment'; without a comment it has two."""
    names = b"\0.shstrtab\0.comment\0"
    sections = [(0, b""), (1, names)] + ([(11, comment)] if comment is not None else [])
    body, entries = b"", b""
    for name, content in sections:
        entries += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, 64 + len(body), len(content), 0, 0, 1, 0)
        body += content
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(sections), 1
    )
    path.write_bytes(header + body + entries)
    return path


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        (b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0", "GCC 12.2.0"),
        (b"GCC: (Debian 12.2.0-14) 12.2.0\0Debian clang version 19.1.7 (3~deb12u1)\0", "clang 19.1.7"),
        (b"Ubuntu clang version 18.1.3 (1ubuntu1)\0GCC: (Ubuntu 13.3.0-6) 13.3.0\0", "clang 18.1.3"),
        (b"Linker: LLD\0", "unknown"),
        (b"\xff" * 100_000, "unknown"),
        (None, "unknown"),
    ],
)
def test_the_compiler_is_read_from_the_file(comment: bytes | None, expected: str, tmp_path: Path) -> None:
    assert build.compiler_of(elf_file(tmp_path / "library.so", comment)) == expected


def test_a_file_of_another_format_has_no_known_compiler(tmp_path: Path) -> None:
    whole = elf_file(tmp_path / "whole.so", b"GCC: (x) 12.2.0\0").read_bytes()
    for content in (b"", b"\xcf\xfa\xed\xfe" * 50, b"\x7fELF\x01\x01" + whole[6:], whole[:64], whole[:100]):
        (tmp_path / "library").write_bytes(content)
        assert build.compiler_of(tmp_path / "library") == "unknown"
    assert build.compiler_of(tmp_path / "nothing") == "unknown"


def test_the_compiler_of_the_installed_library_is_what_readelf_says() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    path = library_path("ggml-cpu")
    told = subprocess.run(["readelf", "-p", ".comment", path], capture_output=True, text=True).stdout
    name, version = build.compiler_of(path).split()
    assert version in told and name in told


def test_the_openmp_library_is_what_readelf_says(tmp_path: Path) -> None:
    (tmp_path / "library").write_bytes(b"\x7fELF\0libomp.so.5\0")
    assert build.openmp_of(tmp_path / "library") == "libomp"
    (tmp_path / "library").write_bytes(b"\x7fELF\0libc.so.6\0")
    assert build.openmp_of(tmp_path / "library") == "" == build.openmp_of(tmp_path / "nothing")
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    path = library_path("ggml-cpu")
    told = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
    needed = [name for name in ("libgomp", "libomp") if f"[{name}." in told]
    assert [build.openmp_of(path)] == (needed or [""])


def test_the_features_are_those_that_the_library_reports() -> None:
    """`llama_print_system_info` lists the same features as text."""
    import llama_cpp

    told = llama_cpp.llama_print_system_info().decode().lower()
    reported = {part.split("=")[0].strip() for part in told.split(":")[-1].split("|") if part.strip().endswith("= 1")}
    assert build.compiled_features() >= reported and reported
    assert set(build.installed_build().features) == reported & cpu_features.FEATURES.keys()


def test_the_id_changes_with_the_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name, content in (("a", b"one"), ("b", b"one"), ("a", b"two")):
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(build, "library_path", lambda _, name=name: tmp_path / name)
        build.build_id.cache_clear()
        seen.append(build.build_id())
    build.build_id.cache_clear()
    assert seen[0] == seen[1] != seen[2] and len(seen[0]) == 12


def test_a_build_for_many_cpus_is_all_of_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Path:
        if name == "ggml-cpu":
            raise DeviceError("no such library")
        return tmp_path / f"lib{name}.so"

    monkeypatch.setattr(build, "library_path", find)
    build.build_id.cache_clear()
    with pytest.raises(DeviceError, match="no such library"):
        build.build_id()
    seen = set()
    for name in ("haswell", "sapphirerapids"):
        (tmp_path / f"libggml-cpu-{name}.so").write_bytes(name.encode())
        build.build_id.cache_clear()
        seen.add(build.build_id())
    build.build_id.cache_clear()
    assert len(seen) == 2


CPUINFO = "processor\t: 0\nmodel name\t: {name}\nmodel\t\t: 143\nstepping\t: 8\nflags\t\t: {flags}\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name", "features"),
    [
        (
            CPUINFO.format(
                name="Intel(R) Xeon(R)", flags="fpu avx avx2 fma f16c avx512f avx512_vnni amx_tile amx_int8"
            ),
            "Intel(R) Xeon(R) 143.8",
            ("avx", "avx2", "fma", "f16c", "avx512", "avx512_vnni", "amx_int8"),
        ),
        (CPUINFO.format(name="Old", flags="fpu sse2"), "Old 143.8", ()),
        (
            "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm sve\n"
            "CPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
            "ARM 0x41 0xd40.",
            ("neon", "dotprod", "fp16_va", "matmul_int8", "sve"),
        ),
    ],
)
def test_what_a_cpu_offers_is_read_from_linux(
    cpuinfo: str, name: str, features: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(cpu_features, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu_features, "told_by_sysctl", dict)
    cpu_features.cpu_name.cache_clear()
    cpu_features.cpu_features.cache_clear()
    try:
        assert (cpu_features.cpu_name(), cpu_features.cpu_features()) == (name, features)
    finally:
        cpu_features.cpu_name.cache_clear()
        cpu_features.cpu_features.cache_clear()


def test_what_a_cpu_offers_is_read_from_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "hw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
    told += "machdep.cpu.brand_string: Apple M2\n"
    monkeypatch.setattr(cpu_features, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(cpu_features, "told_by_sysctl", lambda: cpu_features.parse_sysctl(told))
    cpu_features.cpu_name.cache_clear()
    cpu_features.cpu_features.cache_clear()
    try:
        assert cpu_features.cpu_name() == "Apple M2"
        assert cpu_features.cpu_features() == ("neon", "dotprod")
    finally:
        cpu_features.cpu_name.cache_clear()
        cpu_features.cpu_features.cache_clear()
