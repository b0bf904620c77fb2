"""The ViT: pixels to hidden states. One loop over layers; each tile passes through a layer on its own.

On a CPU one tile's activations fit its caches and the products are as fast for 576 rows as for 5,760, so a
layer's weights are widened once and the tiles follow one another. A GPU takes all tiles at once.
"""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import attention, layer_norm, linear
from granite4v.clip_projector.weights import Weights
from granite4v.families.base import TowerConfig
from granite4v.ggml.graph import Graph, Tensor


def hidden_states(
    graph: Graph, weights: Weights, config: TowerConfig, pixels: Tensor, wanted: set[int], *, together: bool
) -> dict[int, list[Tensor]]:
    """The wanted hidden states (0 = input of the first layer, k = output of layer k-1) of patches
    `[values, patches, tiles]`.

    Each as a list of `[hidden, patches, group]` tensors: one tile a group, or all tiles in one if `together`.
    """
    groups = [pixels] if together else _tiles(graph, pixels)
    states = _embed(graph, weights, config, groups)
    found = {0: states} if 0 in wanted else {}
    for i in range(max(wanted)):
        states = _layer(graph, weights, config, i, states, keep=i in wanted)
        if i + 1 in wanted:
            found[i + 1] = states
    if config.class_token:
        return {k: [_without_first(graph, x) for x in states] for k, states in found.items()}
    return found


def _without_first(graph: Graph, x: Tensor) -> Tensor:
    """`[hidden, n, tiles]` without its first position."""
    view = graph.view(x, (x.ne[0], x.ne[1] - 1, x.ne[2]), (x.nb[1], x.nb[2], x.nb[3]), x.nb[1])
    return graph.cont(view)


def _tiles(graph: Graph, x: Tensor) -> list[Tensor]:
    return [graph.view(x, (x.ne[0], x.ne[1], 1), (x.nb[1], x.nb[2], x.nb[2]), t * x.nb[2]) for t in range(x.ne[2])]


def _embed(graph: Graph, weights: Weights, config: TowerConfig, groups: list[Tensor]) -> list[Tensor]:
    """Patches `[values, patches, group]` -> `[hidden, positions, group]`, what the first layer takes."""
    n_values, width = groups[0].ne[0], config.hidden_size
    kernel = weights.matrix(graph, keys.PATCH_EMBD_WEIGHT, n_values, width)
    bias = weights.vector(keys.PATCH_EMBD_BIAS, width) if config.patch_bias else None
    positions = weights.table(graph, keys.POSITION_EMBD, width, config.n_positions)

    def run(x: Tensor) -> Tensor:
        h = graph.matmul(kernel, x)
        if bias is not None:
            h = graph.add_(h, bias)
        if config.class_token:
            first = graph.repeat(weights.vector(keys.CLASS_EMBD, width), width, 1, x.ne[2])
            h = graph.concat(first, h, axis=1)
        h = graph.add_(h, positions)
        return layer_norm(graph, weights, keys.PRE_LN, h, config.layer_norm_eps) if config.pre_norm else h

    return [graph.expand(run(x)) for x in groups]


def _layer(
    graph: Graph, weights: Weights, config: TowerConfig, i: int, states: list[Tensor], *, keep: bool
) -> list[Tensor]:
    """One encoder layer on every group. The input is overwritten unless it is to be kept (`keep`)."""
    dim, wide, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps

    def name(part: str) -> str:
        return keys.BLOCK.format(i=i, part=part)

    to_product = weights.attention.arithmetic is not None
    q, k, v = (linear(graph, weights, name(f"attn_{part}"), dim, dim, to_product=to_product) for part in "qkv")
    out = linear(graph, weights, name("attn_out"), dim, dim)
    up = linear(graph, weights, name("ffn_up"), dim, wide, config.hidden_act, to_product=True)
    down = linear(graph, weights, name("ffn_down"), wide, dim)
    add = graph.add if keep else graph.add_

    def run(x: Tensor) -> Tensor:
        h = layer_norm(graph, weights, name("ln1"), x, eps)
        mixed = attention(graph, weights, q(h), k(h), v(h), config.num_attention_heads)
        x = add(x, out(mixed))
        h = layer_norm(graph, weights, name("ln2"), x, eps)
        return graph.add_(x, down(up(h)))

    return [graph.expand(run(x)) for x in states]
