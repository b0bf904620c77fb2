"""Describes the installed llama-cpp-python: its version, and the compiler and CPU features of its ggml.

Reads the library file instead of loading it where possible, so that a build that cannot be loaded can still be
identified.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import re
import struct
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from granite4v.errors import DeviceError, Granite4vError
from granite4v.ggml.backend import find_device, registry_name
from granite4v.ggml.cpu_features import FEATURES, in_words
from granite4v.ggml.declarations import Feature, RegistryP
from granite4v.ggml.library import lib, library_path

UNKNOWN = "unknown"
MAX_COMMENT_BYTES = 1 << 16  # read of a section at most; the one that names the compilers has a few dozen
DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}  # enum ggml_backend_dev_type
_ELF64_LITTLE = b"\x7fELF\x02\x01"


@dataclass(frozen=True)
class Build:
    """One build of llama-cpp-python.

    `features`: the CPU features that its kernels were compiled for, by ggml's names (`cpu_features`). `id`: see
    `build_id`. `openmp`: the OpenMP library whose threads it uses, 'libgomp' or 'libomp'; '' for ggml's own threads.
    """

    version: str
    ggml: str
    compiler: str
    features: tuple[str, ...]
    id: str
    openmp: str = ""

    @property
    def summary(self) -> str:
        """The build in one line: 'llama-cpp-python 0.3.36, ggml 0.25.3, GCC 12.2.0, for AVX2, FMA'."""
        newest = [name for name in self.features if name.startswith(("avx512", "amx"))] or self.features
        return (
            f"llama-cpp-python {self.version}, ggml {self.ggml}, {self.compiler}, for {in_words(newest) or 'any CPU'}"
        )


@functools.cache
def installed_build() -> Build:
    """Describes the build that this process loads. Raises DeviceError when it is missing or cannot be used."""
    ggml = lib()
    return Build(
        version=installed_version(),
        ggml=ggml.ggml_version().decode(),
        compiler=compiler_of(_cpu_libraries()[0]),
        features=tuple(name for name in FEATURES if name in compiled_features()),
        id=build_id(),
        openmp=openmp_of(_cpu_libraries()[0]),
    )


def devices() -> list[dict[str, Any]]:
    """Lists the devices that ggml sees: name, kind ('cpu', 'gpu', 'igpu', 'accel', 'other'), backend registry and
    description."""
    ggml = lib()
    found = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    return [
        {
            "name": ggml.ggml_backend_dev_name(device).decode(),
            "kind": DEVICE_KINDS.get(ggml.ggml_backend_dev_type(device), "other"),
            "registry": registry_name(device),
            "description": ggml.ggml_backend_dev_description(device).decode(errors="replace"),
        }
        for device in found
    ]


def installed_version() -> str:
    """Returns the version of llama-cpp-python; 'unknown' if it is not installed."""
    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return UNKNOWN


@functools.cache
def build_id() -> str:
    """Hashes the libraries with the CPU kernels to twelve hexadecimal digits, which also tell apart builds of one
    version with different flags.

    Raises DeviceError when llama-cpp-python is missing, or has no such library or none that can be read.
    """
    digest = hashlib.blake2b(digest_size=6)
    for path in _cpu_libraries():
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise DeviceError(f"cannot read '{path}': {error.strerror}; reinstall llama-cpp-python.") from None
    return digest.hexdigest()


def compiled_features() -> frozenset[str]:
    """Returns the features that ggml says its CPU backend was compiled with, in lower case: 'avx2', 'openmp', 'repack',
    ..."""
    ggml = lib()
    registry = ggml.ggml_backend_dev_backend_reg(find_device("cpu"))
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_get_features")
    if not address:
        return frozenset()
    array = ctypes.CFUNCTYPE(ctypes.POINTER(Feature), RegistryP)(address)(registry)
    rows = itertools.takewhile(lambda row: row.name, (array[i] for i in itertools.count()))
    return frozenset(row.name.decode().lower() for row in rows if row.value != b"0")


def _cpu_libraries() -> list[Path]:
    """Finds the library with ggml's CPU kernels; several if the build has one for each kind of CPU."""
    try:
        return [library_path("ggml-cpu")]
    except DeviceError:
        variants = sorted(library_path("ggml-base").parent.glob("*ggml-cpu-*"))
        if not variants:
            raise
        return variants


def compiler_of(library: Path) -> str:
    """Reads the compiler from a library file: 'GCC 12.2.0' or 'clang 19.1.7'; 'unknown' if it names none or is not
    64-bit little-endian ELF."""
    try:
        comment = _comment_section(library)
    except (OSError, struct.error, ValueError):
        return UNKNOWN
    found = re.search(r"clang version ([\d.]+)", comment)
    if found:  # checked first: start-up code that is linked in leaves a GCC entry even in a file by clang
        return f"clang {found[1]}"
    found = re.search(r"GCC: \([^)]*\) ([\d.]+)", comment)
    return f"GCC {found[1]}" if found else UNKNOWN


def openmp_of(library: Path) -> str:
    """Finds the OpenMP library that a library file is linked to: 'libgomp' (GCC) or 'libomp' (LLVM), which do not share
    threads; '' for none."""
    try:
        content = library.read_bytes()
    except OSError:
        return ""
    return next((name for name in ("libgomp", "libomp") if f"{name}.".encode() in content), "")


def _comment_section(library: Path) -> str:
    """Reads the section '.comment', where each compiler leaves its name. Layout: ELF-64 Object File Format 1.5, figures
    2 and 8; all fields little-endian. Raises ValueError for another format or a file without the section."""
    with open(library, "rb") as file:
        header = file.read(64)
        if not header.startswith(_ELF64_LITTLE):
            raise ValueError("not a little-endian 64-bit ELF file")
        (table,) = struct.unpack_from("<Q", header, 40)  # e_shoff
        entry_bytes, n_entries, i_names = struct.unpack_from("<3H", header, 58)  # e_shentsize, e_shnum, e_shstrndx

        def section(index: int) -> tuple[int, int, int]:  # sh_name, sh_offset, sh_size
            file.seek(table + index * entry_bytes)
            entry = file.read(64)
            return struct.unpack_from("<I", entry)[0], *struct.unpack_from("<2Q", entry, 24)

        def content(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(min(size, MAX_COMMENT_BYTES))

        _, offset, size = section(i_names)
        names = content(offset, size)
        for index in range(n_entries):
            name, offset, size = section(index)
            if names[name:].startswith(b".comment\0"):
                return content(offset, size).decode("ascii", "replace")
    raise ValueError("no section '.comment'")


def main() -> None:
    """Runs in a child process for `doctor`: prints the build and the devices as JSON, or the error."""
    try:
        told = {"build": asdict(installed_build()), "devices": devices()}
    except Granite4vError as error:
        told = {"error": str(error)}
    except Exception as error:  # importing a broken package can raise anything
        told = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(told))
