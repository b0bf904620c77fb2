"""The ViT, from pixels to hidden states. One loop over layers; attention stays within a tile.

On a CPU, the activations of one tile fit in its caches, and products are as fast for 576 rows as for 5,760. So a
layer's weights are widened once, and the tiles pass through the layer one after the other. A GPU computes all tiles at
once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import attention, layer_norm, linear
from granite4v.clip_projector.weights import Weights
from granite4v.families.base import TowerConfig
from granite4v.ggml.graph import Graph, Tensor


def hidden_states(
    graph: Graph, weights: Weights, config: TowerConfig, pixels: Tensor, wanted: set[int], *, together: bool
) -> dict[int, list[Tensor]]:
    """Computes the wanted hidden states (0 = input of the first layer, k = output of layer k-1) of patches
    `[values, patches, tiles]`.

    Each is a list of `[hidden, patches, group]` tensors: one tile per group, or one group of all tiles if `together`.
    The graph also gets the inputs of `places`.
    """
    groups = [pixels] if together else _tiles(graph, pixels)
    turns = [graph.input(name, "I32", len(values)) for name, values in places(config).items()]
    states = _embed(graph, weights, config, groups)
    found = {0: states} if 0 in wanted else {}
    for i in range(max(wanted)):
        states = _layer(graph, weights, config, i, states, turns, keep=i in wanted)
        if i + 1 in wanted:
            found[i + 1] = states
    last = config.num_hidden_layers
    if config.post_norm and last in found:
        found[last] = [
            graph.expand(layer_norm(graph, weights, keys.POST_LN, x, config.layer_norm_eps)) for x in found[last]
        ]
    if config.class_token:
        first = 0 if config.class_token_last else 1
        return {k: [_patches(graph, x, first) for x in states] for k, states in found.items()}
    return found


def places(config: TowerConfig) -> dict[str, np.ndarray]:
    """The 2D RoPE positions of queries and keys, as inputs of the graph: the column and the row of each patch, from 1,
    and 0 for a class token after the patches. Empty for a tower without 2D RoPE."""
    if config.rope_theta is None:
        return {}
    patch, rest = np.arange(config.grid_side**2), np.zeros(int(config.class_token), dtype=np.int64)
    found = {"columns": patch % config.grid_side + 1, "rows": patch // config.grid_side + 1}
    return {name: np.concatenate([values, rest]).astype(np.int32) for name, values in found.items()}


def _patches(graph: Graph, x: Tensor, first: int) -> Tensor:
    """Drops the class token from `[hidden, n, tiles]`; `first`: the position of the first patch."""
    view = graph.view(x, (x.ne[0], x.ne[1] - 1, x.ne[2]), (x.nb[1], x.nb[2], x.nb[3]), first * x.nb[1])
    return graph.cont(view)


def _tiles(graph: Graph, x: Tensor) -> list[Tensor]:
    return [graph.view(x, (x.ne[0], x.ne[1], 1), (x.nb[1], x.nb[2], x.nb[2]), t * x.nb[2]) for t in range(x.ne[2])]


def _embed(graph: Graph, weights: Weights, config: TowerConfig, groups: list[Tensor]) -> list[Tensor]:
    """Embeds patches `[values, patches, group]` as the input of the first layer, `[hidden, positions, group]`."""
    n_values, width = groups[0].ne[0], config.hidden_size
    kernel = weights.matrix(graph, keys.PATCH_EMBD_WEIGHT, n_values, width)
    bias = weights.vector(keys.PATCH_EMBD_BIAS, width) if config.patch_bias else None
    positions = weights.table(graph, keys.POSITION_EMBD, width, config.n_positions)

    def run(x: Tensor) -> Tensor:
        h = graph.matmul(kernel, x)
        if bias is not None:
            h = graph.add_(h, bias)
        if config.class_token:
            token = graph.repeat(weights.vector(keys.CLASS_EMBD, width), width, 1, x.ne[2])
            h = graph.concat(h, token, axis=1) if config.class_token_last else graph.concat(token, h, axis=1)
        h = graph.add_(h, positions)
        return layer_norm(graph, weights, keys.PRE_LN, h, config.layer_norm_eps) if config.pre_norm else h

    return [graph.expand(run(x)) for x in groups]


def _layer(
    graph: Graph,
    weights: Weights,
    config: TowerConfig,
    i: int,
    states: list[Tensor],
    turns: list[Tensor],
    *,
    keep: bool,
) -> list[Tensor]:
    """Applies one encoder layer to every group. Overwrites the input unless `keep`."""
    dim, wide, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps

    def name(part: str) -> str:
        return keys.BLOCK.format(i=i, part=part)

    to_product = weights.attention.arithmetic is not None

    def project(part: str) -> Callable[[Tensor], Tensor]:
        if not turns or part == "v":
            return linear(graph, weights, name(f"attn_{part}"), dim, dim, to_product=to_product)
        exact = linear(graph, weights, name(f"attn_{part}"), dim, dim)
        return lambda x: _turned(graph, exact(x), config, turns)

    q, k, v = map(project, "qkv")
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


def _turned(graph: Graph, x: Tensor, config: TowerConfig, turns: list[Tensor]) -> Tensor:
    """Applies 2D RoPE to queries or keys `[dim, n, tiles]`: rotates the pairs in the first half of each head by the
    patch's column, those in the second half by its row. Overwrites `x`."""
    assert config.rope_theta is not None
    half = config.head_dim // 2
    heads = graph.reshape(x, config.head_dim, config.num_attention_heads, x.ne[1], x.ne[2])
    for i, positions in enumerate(turns):
        part = graph.view(heads, (half, *heads.ne[1:]), heads.nb[1:], i * half * heads.nb[0])
        graph.expand(graph.rotate_(part, positions, config.rope_theta))
    return x
