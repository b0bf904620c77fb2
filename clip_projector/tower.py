"""The ViT: pixels to hidden states. One loop over layers; each tile passes through a layer on its own.

On a CPU one tile's activations fit its caches and the products are as fast for 576 rows as for 5,760, so a
layer's weights are readied once and the tiles follow one another. A GPU takes all tiles at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import activation, attention, layer_norm, linear

if TYPE_CHECKING:
    import numpy as np

    from granite4v.clip_projector.weights import Weights
    from granite4v.families.base import TowerConfig
    from granite4v.ggml.graph import Graph, Tensor

N_CHANNELS = 3


def patches(tiles: np.ndarray, patch_size: int) -> np.ndarray:
    """Normalized tiles `(tiles, px, px, 3)` cut into patches `(tiles, patches, 3 * patch_size^2)`.

    A patch's values are in the order of the convolution kernel (channel, row, column), so that patch
    embedding is a matrix product in float32; ggml_conv_2d would round the pixels to half precision.
    """
    import numpy as np

    n, px, _, channels = tiles.shape
    side = px // patch_size
    grid = tiles.reshape(n, side, patch_size, side, patch_size, channels).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(grid).reshape(n, side * side, channels * patch_size**2)


def hidden_states(
    graph: Graph, weights: Weights, config: TowerConfig, pixels: Tensor, wanted: set[int], *, together: bool
) -> dict[int, list[Tensor]]:
    """The wanted hidden states (0 = embeddings, k = output of layer k-1) of patches `[values, patches, tiles]`.

    Each as a list of `[hidden, patches, group]` tensors: one tile a group, or all tiles in one if `together`.
    """
    groups = [pixels] if together else _tiles(graph, pixels)
    states = _embed(graph, weights, config, groups)
    found = {0: states} if 0 in wanted else {}
    for i in range(max(wanted)):
        states = _layer(graph, weights, config, i, states, keep=i in wanted)
        if i + 1 in wanted:
            found[i + 1] = states
    return found


def _tiles(graph: Graph, x: Tensor) -> list[Tensor]:
    return [graph.view(x, (x.ne[0], x.ne[1], 1), (x.nb[1], x.nb[2], x.nb[2]), t * x.nb[2]) for t in range(x.ne[2])]


def _embed(graph: Graph, weights: Weights, config: TowerConfig, groups: list[Tensor]) -> list[Tensor]:
    n_values, n_patches = groups[0].ne[0], groups[0].ne[1]
    kernel = weights.matrix(graph, keys.PATCH_EMBD_WEIGHT, n_values, config.hidden_size)
    bias = weights.vector(keys.PATCH_EMBD_BIAS, config.hidden_size)
    positions = weights.vector(keys.POSITION_EMBD, config.hidden_size * n_patches)
    embed = lambda x: graph.add_(graph.add_(graph.matmul(kernel, x), bias), positions)  # noqa: E731
    return [graph.expand(embed(x)) for x in groups]


def _layer(
    graph: Graph, weights: Weights, config: TowerConfig, i: int, states: list[Tensor], *, keep: bool
) -> list[Tensor]:
    """One encoder layer on every group. The input is overwritten unless somebody wants to `keep` it."""
    dim, wide, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
    name = lambda part: keys.BLOCK.format(i=i, part=part, suffix="")[:-1]  # noqa: E731
    q, k, v, out = (linear(graph, weights, name(f"attn_{part}"), dim, dim) for part in ("q", "k", "v", "out"))
    up = linear(graph, weights, name("ffn_up"), dim, wide)
    down = linear(graph, weights, name("ffn_down"), wide, dim)
    add = graph.add if keep else graph.add_

    def run(x: Tensor) -> Tensor:
        h = layer_norm(graph, weights, name("ln1"), x, eps)
        mixed = attention(graph, q(h), k(h), v(h), config.num_attention_heads)
        x = add(x, out(mixed))
        h = layer_norm(graph, weights, name("ln2"), x, eps)
        return graph.add_(x, down(activation(graph, config.hidden_act, up(h))))

    return [graph.expand(run(x)) for x in states]
