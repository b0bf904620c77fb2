"""Element-wise operations of the model, which torch.compile may fuse, and attention with a backward pass for CPUs."""

from __future__ import annotations

import itertools
from typing import Any

import torch


class Kernels:
    """The element-wise operations, fused by torch.compile if `fuse` is set, and attention."""

    def __init__(self, fuse: bool) -> None:
        def wrap(function: Any) -> Any:
            return torch.compile(function, dynamic=True) if fuse else function

        self.rms_norm = wrap(_rms_norm)
        self.layer_norm = wrap(_layer_norm)
        self.silu_mul = wrap(_silu_mul)
        self.gelu = wrap(_gelu)
        self.gelu_tanh = wrap(_gelu_tanh)
        self.rope = wrap(_rope)
        self.scaled_add = wrap(_scaled_add)
        self.small_attention = wrap(_small_attention)
        self.attention = _attention_on_cpu()


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias).to(x.dtype)


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x.float()).to(x.dtype)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x.float(), approximate="tanh").to(x.dtype)


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies the rotary embedding. x: (batch, positions, heads, head_dim); cos, sin: (positions, 1, head_dim / 2)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _scaled_add(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    return (x.float() + y.float() * scale).to(x.dtype)


def _small_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention for large n with few queries and keys. q: (n, queries, heads, size), k, v: (n, keys, ...)."""
    scores = (q.float().unsqueeze(2) * k.float().unsqueeze(1)).sum(-1) * scale
    weights = torch.softmax(scores, dim=2)
    return (weights.unsqueeze(-1) * v.float().unsqueeze(1)).sum(2).to(q.dtype)


# Heads, and queries of each, whose gradient is computed at a time, so that intermediate results fit the CPU's cache.
BLOCK_HEADS, BLOCK_ROWS = 12, 256


def _attention_on_cpu() -> Any:
    """Returns softmax attention (q, k, v, causal, scale) of tensors (n, heads, positions, size).

    On a CPU the backward pass recomputes the attention weights, a few heads and queries at a time, which takes about
    half as long as the backward pass of torch's flash kernel in bfloat16. Other devices use torch's own attention.
    """

    class Attention(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
            out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
            ctx.save_for_backward(q, k, v)
            ctx.causal, ctx.scale = causal, scale
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            shape = ctx.saved_tensors[0].shape
            q, k, v, grad = (t.flatten(0, 1) for t in (*ctx.saved_tensors, grads[0]))
            q = q * ctx.scale
            d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for head, row in itertools.product(range(0, len(q), BLOCK_HEADS), range(0, shape[2], BLOCK_ROWS)):
                heads, rows = slice(head, head + BLOCK_HEADS), slice(row, min(row + BLOCK_ROWS, shape[2]))
                asked, seen = (heads, rows), (heads, slice(rows.stop if ctx.causal else None))
                scores = q[asked] @ k[seen].mT
                if ctx.causal:
                    n = rows.stop - row
                    scores[:, :, row:] += torch.full((n, n), -torch.inf, dtype=q.dtype).triu(1)
                # The weights must be computed from the rounded scores and sum to one. With the sums of the forward
                # pass, a head that attends to one position only would get a spurious gradient, and diverge.
                weights = torch.softmax(scores, dim=-1)
                d_scores = torch._softmax_backward_data(grad[asked] @ v[seen].mT, weights, -1, q.dtype)
                d_q[asked] = d_scores @ k[seen]
                d_k[seen] += d_scores.mT @ q[asked]
                d_v[seen] += weights.mT @ grad[asked]
            return *(t.view(shape) for t in (d_q * ctx.scale, d_k, d_v)), None, None

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
        if q.device.type == "cpu":
            return Attention.apply(q, k, v, causal, scale)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    return attention
