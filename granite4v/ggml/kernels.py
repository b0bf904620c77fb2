"""The ways to multiply weights of a type here: as they are, widened, rearranged, or by oneDNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from granite4v.ggml import onednn
from granite4v.ggml.backend import Backend, buffer_type_name
from granite4v.ggml.compiled.products import multiplies
from granite4v.ggml.cpu_features import cpu_features
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.types import block_size

# Kernels that need no buffer type; the others are called as theirs.
PLAIN, FLOAT32, BFLOAT16 = "plain", "float32", "bfloat16"
COMPILED = "compiled"
ONEDNN, ONEDNN_BF16 = "onednn", "onednn bf16"
ATTENTION = "attention"  # stands for a weight type where the kernels of attention are meant
N_OUT = 4352  # a vision FFN's width
N_IN, N_IN_OF_256 = 1152, 1280  # a vision tower's width, and the next multiple of 256


@dataclass(frozen=True)
class Kernel:
    """How weights of one type are multiplied: as they are, widened, from another buffer type, or by oneDNN.

    `widened`: the type that the weights are converted to. `arithmetic`: by oneDNN, whose factors are rounded to 'F32'
    or 'BF16'; None: by ggml.
    """

    name: str
    widened: str | None = None
    buffer_type: Any = None
    arithmetic: str | None = None

    def matrix(self, graph: Graph, weight: Tensor) -> Tensor:
        """Weights `[n_in, n_out]`, kept in this kernel's buffer type, in the form that `product` takes."""
        if self.arithmetic is not None:
            return weight if weight.type_name in ("F32", self.arithmetic) else graph.cast(weight, "F32")
        if self.widened is None:
            return weight
        values = graph.cast(weight, "F32")  # ggml casts quantized weights to nothing else
        return values if self.widened == "F32" else graph.cast(values, self.widened)

    def product(
        self,
        graph: Graph,
        matrix: Tensor,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        to_product: bool = False,
    ) -> Tensor:
        """`[n_out, n]` from a matrix `[n_in, n_out]` and rows `[n_in, n]`; a matrix may have more columns, of zeros.

        `activation`: one that the kernel `fuses`. `to_product`: only products or attention take the result, which may
        then have the type that they compute in.
        """
        if self.arithmetic is not None:
            kind = self.arithmetic if to_product else "F32"
            return graph.product(matrix, x, bias, arithmetic=self.arithmetic, activation=activation, kind=kind)
        x = x if x.type_name == "F32" else graph.cast(x, "F32")
        y = graph.matmul(matrix, graph.pad(x, matrix.ne[0]))
        return y if bias is None else graph.add_(y, bias)

    def fuses(self, activation: str | None) -> bool:
        """Whether `product` can apply an activation (Hugging Face's name) to its result."""
        return self.arithmetic is not None and activation in onednn.ACTIVATIONS


def available_kernels(backend: Backend, type_name: str) -> dict[str, Kernel]:
    """What there is for a type, or for `ATTENTION`, on the CPU, by name, the plain kernel first. One that crashes may
    be among them.
    """
    found = [Kernel(PLAIN)]
    if type_name != ATTENTION:
        found += [Kernel(FLOAT32, widened="F32")] if type_name != "F32" else []
        found += [
            Kernel(buffer_type_name(buffer_type), buffer_type=buffer_type)
            for buffer_type in backend.extra_buffer_types()
            if backend.multiplies(buffer_type, type_name, n_in(type_name), N_OUT)
        ]
    if onednn.is_installed():
        found.append(Kernel(ONEDNN, arithmetic="F32"))
    if onednn.multiplies_bfloat16():
        found.append(Kernel(ONEDNN_BF16, arithmetic="BF16"))
    return {kernel.name: kernel for kernel in found}


def prompt_kernels(type_name: str) -> dict[str, Kernel]:
    """Further ways to multiply a text model's weights with the rows of a prompt, by copies.

    ggml multiplies Q8_0 row by row, and bfloat16, of twice the size, in tiles where the CPU has instructions for that:
    both factors have then eight significant bits, where Q8_0 rounds the rows of the prompt to 8-bit integers of one
    scale for 32.
    """
    is_faster = type_name == "Q8_0" and "avx512_bf16" in cpu_features()
    return {BFLOAT16: Kernel(BFLOAT16, widened="BF16")} if is_faster else {}


def compiled_kernels(type_name: str, n_rows: int) -> dict[str, Kernel]:
    """A further way to multiply a text model's weights with so many rows, which needs no copy: what is plain otherwise
    is multiplied so."""
    return {COMPILED: Kernel(COMPILED)} if multiplies(type_name, n_rows) else {}


def n_in(type_name: str) -> int:
    """The length of the rows that are measured: about a vision tower's width, a multiple of the type's block."""
    return N_IN if N_IN % block_size(type_name) == 0 else N_IN_OF_256
