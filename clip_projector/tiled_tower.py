"""The ViT that attends over all tiles of an image: turns patches into the states that its projector takes.

As transformers 5.24 computes it. Each tile's positions are padded with zeros to a multiple of 8, and tiles that the
image lacks are computed, too. Padding and missing tiles are the idle positions, all others the busy ones. The
reference's mask only keeps idle positions from attending to each other. So idle positions become nonzero in the first
layer, and busy positions attend to them.

Attention does not depend on the order of positions. Here the busy ones come first (class token and patches of the
existing tiles), then those of missing tiles, then all padding. So busy positions attend to all positions, idle ones to
the first `n_busy`, and no mask is needed. For example, with 10 positions per tile, 4 tiles of which the image has 3,
and 6 positions of padding per tile, positions 0 to 29 are busy and attend to all 64; positions 30 to 39 (the missing
tile) and 40 to 63 (padding) attend to 0 to 29. The rows of one tensor are overwritten piece by piece, so that only
keys, values and queries exist for all positions at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import attention, layer_norm, linear
from granite4v.clip_projector.weights import Weights
from granite4v.families.base import TiledTowerConfig
from granite4v.ggml.graph import Graph, Tensor

MULTIPLE = 8  # a tile's positions are padded to a multiple of this
Name = Callable[[str], str]  # from a part of a layer to its tensor name
QUERIES_AT_ONCE = 256  # for attention with oneDNN's products: bounds the scores of one head


def n_padding(config: TiledTowerConfig) -> int:
    """The number of padding positions of a tile."""
    return -config.n_positions % MULTIPLE


def output_states(
    graph: Graph, weights: Weights, config: TiledTowerConfig, pixels: Tensor, zeros: Tensor, ratio: Tensor, n_tiles: int
) -> list[Tensor]:
    """Computes the projector's input for each tile, `[hidden * (1 + intermediate states), positions]`, from patches
    `[values, patches, max_num_tiles]`: the final state, then the intermediate ones, interleaved value by value.

    `zeros` `[hidden, padding of all tiles]` and `ratio` `[1]`, the id of the image's aspect ratio, are inputs;
    `n_tiles` is the number of tiles that the image has.
    """
    tower = _Tower(graph, weights, config, n_tiles)
    x = tower.embed(pixels, zeros, ratio)
    taken: dict[int, Tensor] = {}
    for i in range(config.num_hidden_layers + 1):
        if i in config.intermediate_states:
            taken[i] = x
            x = graph.expand(graph.cont(x))  # a copy, since layers overwrite their input
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
    """Builds the steps of one graph."""

    def __init__(self, graph: Graph, weights: Weights, config: TiledTowerConfig, n_tiles: int) -> None:
        self.graph, self.weights, self.config = graph, weights, config
        self.n_busy = n_tiles * config.n_positions
        self.n_padding = config.max_num_tiles * n_padding(config)
        self.n_real = config.max_num_tiles * config.n_positions  # without padding

    def gate(self, name: str) -> float:
        return math.tanh(float(self.weights.array(name, 1)[0]))

    def tile_vectors(self, name: str, ratio: Tensor, n: int) -> Tensor:
        """The embeddings `[hidden, n, tiles]` that are added to `n` positions of each tile, scaled by their gate."""
        dim, tiles, ids = (
            self.config.hidden_size,
            self.config.max_num_tiles,
            1 + len(self.config.supported_aspect_ratios),
        )
        found = self.weights.lookup(self.graph, name, ratio, dim * n * tiles, ids)
        return self.graph.scale(self.graph.reshape(found, dim, n, tiles), self.gate(keys.TILE_GATE.format(name=name)))

    def embed(self, pixels: Tensor, zeros: Tensor, ratio: Tensor) -> Tensor:
        """Computes the input of the first layer, `[hidden, positions of all tiles]`."""
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
        """Adds each tile's embedding to its positions, including its padding. Overwrites `x`."""
        graph, dim, tiles = self.graph, self.config.hidden_size, self.config.max_num_tiles
        vectors = self.tile_vectors(keys.POST_TILE_EMBD, ratio, 1)
        for first, n in ((0, self.n_real), (self.n_real, self.n_padding)):
            graph.expand(graph.add_(graph.reshape(self.rows(x, first, n), dim, n // tiles, tiles), vectors))
        return x

    def layer(self, x: Tensor, name: Name, *, gated: bool) -> None:
        """Applies one encoder layer; overwrites `x`."""
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
        n = x.ne[1] // config.max_num_tiles  # rows per piece: as many as a tile has with its padding
        for first in range(0, x.ne[1], n):
            part = self.rows(x, first, n)
            part = graph.add_(part, self.scaled(out(self.rows(mixed, first, n)), gates[0]))
            h = layer_norm(graph, weights, name("ln2"), part, eps)
            graph.expand(graph.add_(part, self.scaled(down(up(h)), gates[1])))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Lets busy positions attend to all positions, and idle ones to the busy ones; overwrites `q`."""
        graph, n_busy, n_all = self.graph, self.n_busy, q.ne[1]
        n_heads, arithmetic = self.config.num_attention_heads, self.weights.attention.arithmetic
        at_once = n_all if arithmetic is None else QUERIES_AT_ONCE
        if arithmetic is not None:  # cast once instead of for each piece of the queries
            q, k, v = (x if x.type_name == arithmetic else graph.cast(x, arithmetic) for x in (q, k, v))
        for first, end, n_seen in ((0, n_busy, n_all), (n_busy, n_all, n_busy)):
            keys_seen, values_seen = (graph.expand(self.rows(x, 0, n_seen)) for x in (k, v))
            for start in range(first, end, at_once):
                queries = self.rows(q, start, min(at_once, end - start))
                mixed = attention(graph, self.weights, queries, keys_seen, values_seen, n_heads)
                graph.expand(graph.copy_(queries, mixed))
        return q

    def interleaved(self, x: Tensor, states: list[Tensor], tile: int) -> Tensor:
        """Concatenates a tile's final state with `states`, interleaved: the first value of each, the second of each,
        and so on."""
        graph, dim, n = self.graph, self.config.hidden_size, self.config.n_positions
        first = tile * n
        joined = graph.join([self.rows(state, first, n) for state in states], axis=2)
        mixed = graph.cont(graph.permute(joined, 1, 2, 0, 3))
        return graph.concat(self.rows(x, first, n), graph.reshape(mixed, len(states) * dim, n), axis=0)

    def rows(self, x: Tensor, first: int, n: int) -> Tensor:
        return self.graph.view(x, (x.ne[0], n), (x.nb[1],), first * x.nb[1])

    def scaled(self, x: Tensor, gate: float) -> Tensor:
        return x if gate == 1.0 else self.graph.scale_(x, gate)
