"""The ViT that attends over all tiles of an image: patches to the states that its projector takes.

As transformers 5.24 computes it. Each tile's positions are filled up with zeros to a multiple of 8, and tiles
that the image lacks are computed, too. The reference masks padding and lacking tiles (together: the idle positions)
for each other and for nobody else, so these are no zeros soon, and all positions see them.

Attention asks for no order of the positions. Here the busy ones come first (class token and patches of the tiles that
there are), then those of lacking tiles, then all padding: so busy positions see all, idle ones the first few, and no
mask is needed. The rows of one tensor are overwritten piece by piece, so that only keys, values and queries exist for
all positions at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import attention, layer_norm, linear
from granite4v.clip_projector.weights import Weights
from granite4v.families.base import TiledTowerConfig
from granite4v.ggml.graph import Graph, Tensor

MULTIPLE = 8  # of a tile's positions, with padding
Name = Callable[[str], str]  # a layer's tensor name, of its part
QUERIES_AT_ONCE = 256  # of products' attention: bounds the scores of one head


def n_padding(config: TiledTowerConfig) -> int:
    """Positions of zeros that a tile gets."""
    return -config.n_positions % MULTIPLE


def output_states(
    graph: Graph, weights: Weights, config: TiledTowerConfig, pixels: Tensor, zeros: Tensor, ratio: Tensor, n_tiles: int
) -> list[Tensor]:
    """Patches `[values, patches, max_num_tiles]` -> for each tile what the projector takes,
    `[hidden * (1 + intermediate states), positions]`: the final state, then value by value the intermediate ones.

    `zeros` `[hidden, padding of all tiles]` and `ratio` `[1]`, the id of the image's aspect ratio, are inputs;
    `n_tiles` is how many tiles the image has.
    """
    tower = _Tower(graph, weights, config, n_tiles)
    x = tower.embed(pixels, zeros, ratio)
    taken: dict[int, Tensor] = {}
    for i in range(config.num_hidden_layers + 1):
        if i in config.intermediate_states:
            taken[i] = x
            x = graph.expand(graph.cont(x))  # layers overwrite their input
        if i < config.num_hidden_layers:
            tower.layer(x, _named(keys.BLOCK, i), gated=False)
    x = tower.add_tiles(layer_norm(graph, weights, keys.POST_LN, x, config.layer_norm_eps), ratio)
    for i in range(config.num_global_layers):
        tower.layer(x, _named(keys.GLOBAL_BLOCK, i), gated=True)
    states = [taken[i] for i in config.intermediate_states]
    return [tower.interleaved(x, states, tile) for tile in range(config.max_num_tiles)]


def _named(block: str, i: int) -> Name:
    return lambda part: block.format(i=i, part=part)


class _Tower:
    """The steps of one graph."""

    def __init__(self, graph: Graph, weights: Weights, config: TiledTowerConfig, n_tiles: int) -> None:
        self.graph, self.weights, self.config = graph, weights, config
        self.n_busy = n_tiles * config.n_positions
        self.n_padding = config.max_num_tiles * n_padding(config)
        self.n_real = config.max_num_tiles * config.n_positions  # without padding

    def gate(self, name: str) -> float:
        return math.tanh(float(self.weights.array(name, 1)[0]))

    def tile_vectors(self, name: str, ratio: Tensor, n: int) -> Tensor:
        """What is added to `n` positions of each tile, `[hidden, n, tiles]`, before its gate."""
        dim, tiles, ids = (
            self.config.hidden_size,
            self.config.max_num_tiles,
            1 + len(self.config.supported_aspect_ratios),
        )
        found = self.weights.lookup(self.graph, name, ratio, dim * n * tiles, ids)
        return self.graph.scale(self.graph.reshape(found, dim, n, tiles), self.gate(keys.TILE_GATE.format(name=name)))

    def embed(self, pixels: Tensor, zeros: Tensor, ratio: Tensor) -> Tensor:
        """What the first layer takes, `[hidden, positions of all tiles]`."""
        graph, weights, config = self.graph, self.weights, self.config
        dim, n = config.hidden_size, config.n_positions
        h = graph.matmul(weights.matrix(graph, keys.PATCH_EMBD_WEIGHT, pixels.ne[0], dim), pixels)
        h = graph.add_(h, self.tile_vectors(keys.PRE_TILE_EMBD, ratio, 1))
        first = graph.repeat(weights.vector(keys.CLASS_EMBD, dim), dim, 1, config.max_num_tiles)
        h = graph.concat(first, h, axis=1)
        shared = 1 - self.gate(keys.TILE_GATE.format(name=keys.TILE_POSITION_EMBD))
        h = graph.add_(h, graph.scale(weights.table(graph, keys.POSITION_EMBD, dim, n), shared))
        h = graph.add_(h, self.tile_vectors(keys.TILE_POSITION_EMBD, ratio, n))
        h = layer_norm(graph, weights, keys.PRE_LN, h, config.layer_norm_eps)
        return graph.expand(graph.concat(graph.reshape(h, dim, self.n_real), zeros, axis=1))

    def add_tiles(self, x: Tensor, ratio: Tensor) -> Tensor:
        """Each tile's own vector added to its positions, those of its padding too."""
        graph, dim, tiles = self.graph, self.config.hidden_size, self.config.max_num_tiles
        vectors = self.tile_vectors(keys.POST_TILE_EMBD, ratio, 1)
        for first, n in ((0, self.n_real), (self.n_real, self.n_padding)):
            graph.expand(graph.add_(graph.reshape(self.rows(x, first, n), dim, n // tiles, tiles), vectors))
        return x

    def layer(self, x: Tensor, name: Name, *, gated: bool) -> None:
        """One encoder layer; overwrites `x`."""
        graph, weights, config = self.graph, self.weights, self.config
        dim, wide, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        to_product = weights.attention.arithmetic is not None
        q, k, v = (
            linear(graph, weights, name(f"attn_{part}"), dim, dim, to_product=to_product, has_bias=False)
            for part in "qkv"
        )
        out = linear(graph, weights, name("attn_out"), dim, dim, has_bias=False)
        up = linear(graph, weights, name("ffn_up"), dim, wide, config.hidden_act, to_product=True)
        down = linear(graph, weights, name("ffn_down"), wide, dim)
        gates = [self.gate(name(part)) if gated else 1.0 for part in keys.GATES]

        h = layer_norm(graph, weights, name("ln1"), x, eps)
        mixed = self.attend(q(h), k(h), v(h))
        n = x.ne[1] // config.max_num_tiles  # rows at a time, about a tile's
        for first in range(0, x.ne[1], n):
            part = self.rows(x, first, n)
            part = graph.add_(part, self.scaled(out(self.rows(mixed, first, n)), gates[0]))
            h = layer_norm(graph, weights, name("ln2"), part, eps)
            graph.expand(graph.add_(part, self.scaled(down(up(h)), gates[1])))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of busy positions over all, and of idle ones over the busy ones; overwrites q."""
        graph, n_busy, n_all = self.graph, self.n_busy, q.ne[1]
        n_heads, arithmetic = self.config.num_attention_heads, self.weights.attention.arithmetic
        at_once = n_all if arithmetic is None else QUERIES_AT_ONCE
        if arithmetic is not None:  # once, and not with each piece of the queries
            q, k, v = (x if x.type_name == arithmetic else graph.cast(x, arithmetic) for x in (q, k, v))
        for first, end, n_seen in ((0, n_busy, n_all), (n_busy, n_all, n_busy)):
            keys_seen, values_seen = (graph.expand(self.rows(x, 0, n_seen)) for x in (k, v))
            for start in range(first, end, at_once):
                queries = self.rows(q, start, min(at_once, end - start))
                mixed = attention(graph, self.weights, queries, keys_seen, values_seen, n_heads)
                graph.expand(graph.copy_(queries, mixed))
        return q

    def interleaved(self, x: Tensor, states: list[Tensor], tile: int) -> Tensor:
        """A tile's final state, and after it the first value of each of `states`, the second of each, and so on."""
        graph, dim, n = self.graph, self.config.hidden_size, self.config.n_positions
        first = tile * n
        joined = graph.join([self.rows(state, first, n) for state in states], axis=2)
        mixed = graph.cont(graph.permute(joined, 1, 2, 0, 3))
        return graph.concat(self.rows(x, first, n), graph.reshape(mixed, len(states) * dim, n), axis=0)

    def rows(self, x: Tensor, first: int, n: int) -> Tensor:
        return self.graph.view(x, (x.ne[0], n), (x.nb[1],), first * x.nb[1])

    def scaled(self, x: Tensor, gate: float) -> Tensor:
        return x if gate == 1.0 else self.graph.scale_(x, gate)
