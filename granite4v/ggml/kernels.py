"""The ways in which weights of a type can be multiplied here: as they are, widened to float32, or rearranged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from granite4v.ggml.backend import Backend, buffer_type_name
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.types import block_size

PLAIN, FLOAT32 = "plain", "float32"  # kernels that need no buffer type; the others are called as theirs
N_OUT = 4352  # a vision FFN's width
N_IN, N_IN_OF_256 = 1152, 1280  # a vision tower's width, and the next multiple of 256


@dataclass(frozen=True)
class Kernel:
    """How weights of one type are multiplied: as they are, widened to float32, or from another buffer type."""

    name: str
    as_float32: bool = False
    buffer_type: Any = None

    def product(self, graph: Graph, weight: Tensor, x: Tensor) -> Tensor:
        """`[n_out, n]` from weights `[n_in, n_out]`, kept in this kernel's buffer type, and rows `[n_in, n]`."""
        return graph.matmul(graph.cast(weight, "F32") if self.as_float32 else weight, x)


def available_kernels(backend: Backend, type_name: str) -> dict[str, Kernel]:
    """What ggml offers for a type on the CPU, by name, the plain kernel first. One that crashes may be among them."""
    found = [Kernel(PLAIN), Kernel(FLOAT32, as_float32=True)]
    found += [
        Kernel(buffer_type_name(buffer_type), buffer_type=buffer_type)
        for buffer_type in backend.extra_buffer_types()
        if backend.multiplies(buffer_type, type_name, n_in(type_name), N_OUT)
    ]
    return {kernel.name: kernel for kernel in found}


def n_in(type_name: str) -> int:
    """The length of the rows that are measured: about a vision tower's width, a multiple of the type's block."""
    return N_IN if N_IN % block_size(type_name) == 0 else N_IN_OF_256
