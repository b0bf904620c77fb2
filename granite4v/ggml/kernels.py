"""The kernels for weights of a type on this machine: as they are, widened, repacked, compiled, or by oneDNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from granite4v.ggml import onednn
from granite4v.ggml.backend import Backend, buffer_type_name
from granite4v.ggml.compiled.products import multiplies
from granite4v.ggml.cpu_features import cpu_features
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.types import block_size

# Kernels that need no buffer type; the others have the names of their buffer types.
PLAIN, FLOAT32, BFLOAT16 = "plain", "float32", "bfloat16"
COMPILED = "compiled"
ONEDNN, ONEDNN_BF16 = "onednn", "onednn bf16"
ATTENTION = "attention"  # used in place of a weight type for the kernels of attention
N_OUT = 4352  # a vision FFN's width
N_IN, N_IN_OF_256 = 1152, 1280  # a vision tower's width, and the next multiple of 256


@dataclass(frozen=True)
class Kernel:
    """One way to multiply weights of a type: as they are, widened, from another buffer type, or by oneDNN.

    `widened`: the type that the weights are converted to. `arithmetic`: 'F32' or 'BF16', the type that oneDNN rounds
    both factors to; None for a product by ggml.
    """

    name: str
    widened: str | None = None
    buffer_type: Any = None
    arithmetic: str | None = None

    def matrix(self, graph: Graph, weight: Tensor) -> Tensor:
        """Converts weights `[n_in, n_out]`, kept in this kernel's buffer type, to the form that `product` takes."""
        if self.arithmetic is not None:
            return weight if weight.type_name in ("F32", self.arithmetic) else graph.cast(weight, "F32")
        if self.widened is None:
            return weight
        values = graph.cast(weight, "F32")  # the only type that ggml casts quantized weights to
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
        """Multiplies a matrix `[n_in, n_out]` with rows `[n_in, n]`: `[n_out, n]`. The matrix may be wider than the
        rows, with zeros in the excess columns.

        `activation`: one that the kernel `fuses`. `to_product`: only products or attention read the result, so it may
        have the type that they compute in.
        """
        if self.arithmetic is not None:
            kind = self.arithmetic if to_product else "F32"
            return graph.product(matrix, x, bias, arithmetic=self.arithmetic, activation=activation, kind=kind)
        x = x if x.type_name == "F32" else graph.cast(x, "F32")
        y = graph.matmul(matrix, graph.pad(x, matrix.ne[0]))
        return y if bias is None else graph.add_(y, bias)

    def fuses(self, activation: str | None) -> bool:
        """Whether `product` can apply this activation (Hugging Face's name) to its result."""
        return self.arithmetic is not None and activation in onednn.ACTIVATIONS


def available_kernels(backend: Backend, type_name: str) -> dict[str, Kernel]:
    """Lists the kernels for a weight type, or for `ATTENTION`, on the CPU, by name, the plain one first. They are not
    tested: one may crash the process.
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
    """Lists more kernels for a text model's weights and the rows of a prompt, which need widened copies.

    ggml multiplies Q8_0 row by row, but bfloat16, which is twice as large, in tiles if the CPU has instructions for
    that. Both factors then have eight significant bits, whereas for Q8_0 the prompt rows are rounded to 8-bit integers
    with one scale per 32.
    """
    is_faster = type_name == "Q8_0" and "avx512_bf16" in cpu_features()
    return {BFLOAT16: Kernel(BFLOAT16, widened="BF16")} if is_faster else {}


def compiled_kernels(type_name: str, n_rows: int) -> dict[str, Kernel]:
    """Returns the compiled kernel for a text model's weights and this number of rows, if there is one. It needs no copy
    and replaces the plain kernel."""
    return {COMPILED: Kernel(COMPILED)} if multiplies(type_name, n_rows) else {}


def n_in(type_name: str) -> int:
    """Row length used for measurements: about a vision tower's width, and a multiple of the type's block."""
    return N_IN if N_IN % block_size(type_name) == 0 else N_IN_OF_256
