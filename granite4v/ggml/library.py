"""Loads the shared libraries that llama-cpp-python ships, once, on first use.

llama-cpp-python opens the same files when it is imported, so a process has only one ggml, whichever loads it first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from granite4v.errors import DeviceError
from granite4v.ggml import declarations

TESTED_VERSION = "0.25.3"  # ggml in llama-cpp-python 0.3.36
SPINS = 10_000  # iterations that GCC's OpenMP spins before a waiting thread sleeps
_OBJECT_SIZE = 32  # sizeof(struct ggml_object) on 64-bit: two size_t, a pointer, an enum and 4 bytes of padding


@functools.cache
def lib() -> Any:
    """Returns the declared C functions as attributes: `lib().ggml_mul_mat(...)`.

    Raises DeviceError when llama-cpp-python is missing, or its ggml lacks a function that we call or has another layout
    of struct ggml_tensor.
    """
    with openmp_for_this_load():
        _load_llama_cpp()
    opened: dict[str, ctypes.CDLL] = {}
    functions = SimpleNamespace()
    for declaration in declarations.DECLARATIONS:
        if declaration.library not in opened:
            opened[declaration.library] = ctypes.CDLL(str(library_path(declaration.library)))
        try:
            function = getattr(opened[declaration.library], declaration.name)
        except AttributeError:
            raise DeviceError(
                f"llama-cpp-python {metadata.version('llama-cpp-python')} has no '{declaration.name}' in its ggml; "
                f"granite4v is tested with ggml {TESTED_VERSION}. Install the llama-cpp-python that granite4v asks for."
            ) from None
        function.restype = declaration.restype
        function.argtypes = list(declaration.argtypes)
        setattr(functions, declaration.name, function)
    _check_layout(functions, declarations.TensorStruct)
    return functions


@contextlib.contextmanager
def openmp_for_this_load() -> Iterator[None]:
    """Makes an OpenMP that is loaded inside the block spin for only a tenth of a millisecond before a thread sleeps.

    By default GCC's OpenMP spins for milliseconds at each barrier of a graph. With more threads than cores, that takes
    the core from the very thread that the others wait for. `SPINS` is as fast on an idle machine (`scripts/busy.py`
    measures it). OpenMP reads the variable once, when it is loaded, so the block removes it at its end. A setting by
    the user is kept. An OpenMP that another library loaded before is not affected.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def _load_llama_cpp() -> None:
    _library_folder()
    import llama_cpp  # noqa: F401  its own loader sets search paths and opens dependencies in order


def library_path(name: str) -> Path:
    """Finds the file of one of llama-cpp-python's libraries, such as 'ggml-cpu', without loading anything.

    Raises DeviceError when it is missing.
    """
    folder = _library_folder()
    if sys.platform == "win32":
        candidates = [f"{name}.dll", f"lib{name}.dll"]
    elif sys.platform == "darwin":
        candidates = [f"lib{name}.dylib", f"lib{name}.so"]
    else:
        candidates = [f"lib{name}.so"]
    for candidate in candidates:
        if (folder / candidate).exists():
            return folder / candidate
    raise DeviceError(
        f"'{folder}' has no {' or '.join(candidates)}; granite4v needs a llama-cpp-python built with shared libraries, "
        "as its default build is."
    )


def _library_folder() -> Path:
    spec = util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise DeviceError("llama-cpp-python is not installed; install it with 'pip install llama-cpp-python'.")
    return Path(spec.origin).parent / "lib"


def _check_layout(functions: Any, tensor_struct: type[ctypes.Structure]) -> None:
    size = functions.ggml_tensor_overhead() - _OBJECT_SIZE
    if size != ctypes.sizeof(tensor_struct):
        raise DeviceError(
            f"ggml {functions.ggml_version().decode()} has a tensor structure of {size} bytes, granite4v expects "
            f"{ctypes.sizeof(tensor_struct)} (ggml {TESTED_VERSION}). Install the llama-cpp-python that granite4v "
            "asks for."
        )
