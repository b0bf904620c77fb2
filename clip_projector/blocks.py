"""Graph building blocks that towers and projectors share: linear, LayerNorm, activation, attention.

Shapes in square brackets are in ggml's order, fastest axis first; `tokens` may be split over axes 1 to 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from granite4v.clip_projector.weights import Weights
from granite4v.errors import ModelFileError
from granite4v.ggml.graph import Graph, Tensor

GELU_CUBIC = 0.044715  # Hendrycks & Gimpel, "Gaussian Error Linear Units", the tanh form
QUICK_GELU_SLOPE = 1.702  # same paper, the sigmoid form


def linear(
    graph: Graph,
    weights: Weights,
    name: str,
    n_in: int,
    n_out: int,
    act: str | None = None,
    *,
    to_product: bool = False,
    has_bias: bool = True,
) -> Callable[[Tensor], Tensor]:
    """Returns a function x `[n_in, tokens]` -> act(x.W^T + b) `[n_out, tokens]`. The weight is widened or packed once
    for all calls.

    `act`: the activation by Hugging Face's name. `to_product`: see `Kernel.product`.
    """
    weight = weights.matrix(graph, f"{name}.weight", n_in, n_out)
    bias = weights.vector(f"{name}.bias", n_out) if has_bias else None
    kernel = weights.kernel(f"{name}.weight")
    fused = act if kernel.fuses(act) else None

    def multiply(x: Tensor) -> Tensor:
        y = kernel.product(graph, weight, x, bias, activation=fused, to_product=to_product)
        return y if act is None or act == fused else activation(graph, act, y)

    return multiply


def layer_norm(graph: Graph, weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    n = x.ne[0]
    normal = graph.normalize(x, eps)
    scaled = graph.mul_(normal, weights.vector(f"{name}.weight", n))
    return graph.add_(scaled, weights.vector(f"{name}.bias", n))


def activation(graph: Graph, kind: str, x: Tensor) -> Tensor:
    """Applies an activation; `kind` is Hugging Face's name. Raises ModelFileError for an unknown one.

    ggml's own gelu and gelu_quick look values up in a half-precision table. Written with silu, which ggml computes with
    vector instructions, both are exact and (on AVX-512) faster than the table.
    """
    if kind == "gelu_pytorch_tanh":
        # x * sigmoid(x * c) = silu(x * c) / c with c = 2 * sqrt(2/pi) * (1 + 0.044715 x^2)
        slope = 2 * math.sqrt(2 / math.pi)
        c = graph.scale_(graph.square(x), slope * GELU_CUBIC, slope)
        return graph.div_(graph.unary_("silu", graph.mul(x, c)), c)
    if kind == "gelu":
        return graph.unary_("gelu_erf", x)
    if kind == "quick_gelu":
        return graph.scale_(graph.unary_("silu", graph.scale_(x, QUICK_GELU_SLOPE)), 1 / QUICK_GELU_SLOPE)
    raise ModelFileError(f"activation {kind!r} is not supported; known: gelu_pytorch_tanh, gelu, quick_gelu.")


def attention(graph: Graph, weights: Weights, q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """Full attention within each of `b` groups: q `[dim, n, b]`, k and v `[dim, m, b]` -> `[dim, n, b]`.

    Uses oneDNN's products where they are faster, else ggml's flash attention with float32 keys and values. On the CPU
    that keeps the scores in cache and computes in float32; with half-precision keys, as in llama.cpp's tools, it is
    slower and less exact.
    """
    dim, n, b = q.ne[0], q.ne[1], q.ne[2]
    head = dim // n_heads
    arithmetic = weights.attention.arithmetic
    if b == 1 and arithmetic is not None:
        return graph.product_attention(q, k, v, n_heads, arithmetic)

    def heads(x: Tensor) -> Tensor:
        return graph.permute(graph.reshape(x, head, n_heads, x.ne[1], b), 0, 2, 1, 3)

    mixed = graph.flash_attention(heads(q), heads(k), heads(v), 1 / math.sqrt(head))
    return graph.reshape(mixed, dim, n, b)
