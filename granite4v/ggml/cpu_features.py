"""Reads the CPU's name, and which of the instruction sets that ggml has kernels for it supports. `build` has those that
a build was compiled for."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

# ggml's name of a feature (as in `ggml_cpu_has_avx2`): how Linux lists it in /proc/cpuinfo, and macOS as a sysctl.
# Source: ggml-cpu.c of ggml 0.25.3; arch/x86/include/asm/cpufeatures.h, arch/arm64/kernel/cpuinfo.c of Linux 6.12.
X86_FEATURES = {
    "avx": ("avx", "hw.optional.avx1_0"),
    "avx2": ("avx2", "hw.optional.avx2_0"),
    "fma": ("fma", "hw.optional.fma"),
    "f16c": ("f16c", "hw.optional.f16c"),
    "avx_vnni": ("avx_vnni", ""),
    "avx512": ("avx512f", "hw.optional.avx512f"),
    "avx512_vbmi": ("avx512vbmi", "hw.optional.avx512vbmi"),
    "avx512_vnni": ("avx512_vnni", ""),
    "avx512_bf16": ("avx512_bf16", ""),
    "amx_int8": ("amx_int8", ""),
}
ARM_FEATURES = {
    "neon": ("asimd", "hw.optional.AdvSIMD"),
    "dotprod": ("asimddp", "hw.optional.arm.FEAT_DotProd"),
    "fp16_va": ("asimdhp", "hw.optional.arm.FEAT_FP16"),
    "matmul_int8": ("i8mm", "hw.optional.arm.FEAT_I8MM"),
    "sve": ("sve", ""),
}
FEATURES = {**X86_FEATURES, **ARM_FEATURES}
_WORDS = {
    "avx512": "AVX-512",
    "avx512_vbmi": "AVX-512 VBMI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX",
    "fp16_va": "FP16",
    "matmul_int8": "I8MM",
}
CPUINFO = Path("/proc/cpuinfo")
_SYSCTL_TIMEOUT_S = 5.0


@functools.cache
def cpu_name() -> str:
    """Returns the CPU's model name, with the numbers that tell apart two CPUs of one name if the system knows them."""
    fields = _cpuinfo()
    if "model name" in fields:
        return f"{fields['model name']} {fields.get('model', '')}.{fields.get('stepping', '')}"
    if "CPU part" in fields:  # Linux on ARM
        return f"ARM {fields.get('CPU implementer', '?')} {fields['CPU part']}.{fields.get('CPU revision', '')}"
    return told_by_sysctl().get("machdep.cpu.brand_string") or platform.processor() or platform.machine()


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Lists which of `FEATURES` this CPU has, by ggml's names; empty if the system does not report them."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    values = told_by_sysctl()
    return tuple(
        name
        for name, (flag, sysctl) in FEATURES.items()
        if flag in flags or (sysctl and values.get(sysctl, "0").strip() == "1")
    )


def _cpuinfo() -> dict[str, str]:
    """Reads the fields of the first CPU in /proc/cpuinfo; empty on systems other than Linux."""
    try:
        first = CPUINFO.read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def told_by_sysctl() -> dict[str, str]:
    """Returns what sysctl reports about the CPU on macOS; empty on other systems."""
    if sys.platform != "darwin":
        return {}
    command = ["/usr/sbin/sysctl", "hw.optional", "machdep.cpu.brand_string"]
    try:
        return parse_sysctl(subprocess.run(command, capture_output=True, text=True, timeout=_SYSCTL_TIMEOUT_S).stdout)
    except (OSError, subprocess.SubprocessError):
        return {}


def parse_sysctl(printed: str) -> dict[str, str]:
    """Parses lines such as 'hw.optional.AdvSIMD: 1' into values by name."""
    return dict(re.findall(r"^([\w.]+): (.*)$", printed, re.MULTILINE))


def in_words(features: Iterable[str]) -> str:
    """Formats features for people: 'AVX2, AVX-512 VNNI, AMX' for ('avx2', 'avx512_vnni', 'amx_int8')."""
    return ", ".join(_WORDS.get(name, name.upper().replace("_", "-")) for name in features)
