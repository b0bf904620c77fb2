"""The window Q-Former: one BLIP-2 layer over windows of patches, 16 queries for 64 patches.

The layer is BLIP-2's (transformers 5.23, `Blip2QFormerLayer`). Attention runs within each window, so windows are the
batch axis. Windowing is a transposition of a four-axis view, so no gather by index is needed. For a grid of 24x24
patches and windows of 8x8 patches, [fastest axis first]:

    raster     [dim, 576, tiles]           patch = 24 * row + column
    reshaped   [dim * 8, 3, 8, 3 * tiles]  8 patches of a window row; window column; row in window; window row and tile
    swapped    [dim * 8, 8, 3, 3 * tiles]  the 8 rows of a window are now adjacent
    windows    [dim, 64, 9 * tiles]        64 patches per window, 9 windows per tile

For instance, the patch in row 9 and column 17 becomes patch 8 * 1 + 1 = 9 of window 3 * 1 + 2 = 5.

The queries are windowed in the same way at half the side: a raster of 12x12 in windows of 4x4, so that query window i
covers the same part of the tile as patch window i. `_raster` is the inverse.
"""

from __future__ import annotations

from collections.abc import Mapping

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import attention, layer_norm, linear
from granite4v.clip_projector.weights import Weights
from granite4v.families.base import Stream, VisionConfig, WindowQFormerConfig
from granite4v.ggml.graph import Graph, Tensor


def project(graph: Graph, weights: Weights, config: VisionConfig, states: Mapping[int, list[Tensor]]) -> list[Tensor]:
    """Projects groups of hidden states `[dim, patches, tiles]` to the embeddings `[n_embd, tokens_per_tile, tiles]` of
    each stream.

    All tiles pass through a projector at once, since its products are small.
    """
    joined = {k: graph.join(groups, axis=2) for k, groups in states.items()}
    found = []
    for p, stream in enumerate(config.streams):
        (state,) = stream.hidden_states
        found.append(graph.expand(_project(graph, weights, config, p, stream, joined[state])))
    return found


def _project(graph: Graph, weights: Weights, config: VisionConfig, p: int, stream: Stream, features: Tensor) -> Tensor:
    """Applies projector `p`: hidden states `[dim, patches, tiles]` -> embeddings `[n_embd, tokens_per_tile, tiles]`."""
    projector, side = config.projector, config.tower.grid_side
    assert isinstance(projector, WindowQFormerConfig)
    dim, n_tiles, eps = features.ne[0], features.ne[2], projector.layer_norm_eps
    n_windows = (side // projector.window_side) ** 2 * n_tiles
    n_queries, n_patches = projector.query_side**2, projector.window_side**2

    def name(part: str) -> str:
        return keys.PROJ.format(p=p, part=part)

    def apply(part: str, x: Tensor, n_out: int = dim, act: str | None = None) -> Tensor:
        """Applies a linear layer to `[n, tokens, windows]`, as one large product over all tokens of all windows."""
        flat = graph.reshape(x, x.ne[0], x.ne[1] * x.ne[2])
        return graph.reshape(linear(graph, weights, name(part), x.ne[0], n_out, act)(flat), n_out, x.ne[1], x.ne[2])

    def attend(part: str, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = apply(f"{part}_q", x), apply(f"{part}_k", memory), apply(f"{part}_v", memory)
        mixed = attention(graph, weights, q, k, v, projector.num_attention_heads)
        return layer_norm(graph, weights, name(f"{part}_norm"), graph.add_(apply(f"{part}_out", mixed), x), eps)

    x = layer_norm(graph, weights, name("norm"), features, projector.input_norm_eps)
    small = _halve(graph, x, side, stream.spatial_offset)
    queries = graph.reshape(_windows(graph, small, side // 2, projector.query_side), dim, n_queries, n_windows)
    memory = graph.reshape(_windows(graph, x, side, projector.window_side), dim, n_patches, n_windows)
    positions = weights.vector(keys.PROJ_IMG_POS.format(p=p), dim * n_patches)
    learned = weights.vector(keys.PROJ_QUERY.format(p=p), dim * n_queries)
    memory = graph.add_(memory, graph.reshape(positions, dim, n_patches))
    queries = graph.add_(queries, graph.reshape(learned, dim, n_queries))

    h = layer_norm(graph, weights, name("post_norm"), queries, eps)
    h = attend("self_attn", h, h)
    h = attend("cross_attn", h, memory)
    wide = weights.n_rows(f"{name('ffn_up')}.weight")
    inner = apply("ffn_up", h, wide, projector.hidden_act)
    h = layer_norm(graph, weights, name("ffn_norm"), graph.add_(apply("ffn_down", inner), h), eps)
    raster = _raster(graph, h, side // 2, projector.query_side, n_tiles)
    return apply("linear", raster, config.text_hidden_size)


def _halve(graph: Graph, x: Tensor, side: int, offset: int | None) -> Tensor:
    """Halves the side of a `side` x `side` raster: takes the mean of every 2x2 block, or its corner `offset` (0 top
    left, 1 top right, 2 bottom left, 3 bottom right)."""
    dim, row, n_tiles = x.ne[0], x.nb[1], x.ne[2]

    def corner(i: int) -> Tensor:
        start = (i // 2 * side + i % 2) * row
        strides = (2 * row, 2 * side * row, side * side * row)
        return graph.view(x, (dim, side // 2, side // 2, n_tiles), strides, start)

    if offset is not None:
        return graph.cont(corner(offset))
    # area interpolation to half the side is this mean
    total = graph.add(corner(0), corner(1))
    return graph.scale_(graph.add_(graph.add_(total, corner(2)), corner(3)), 0.25)


def _windows(graph: Graph, x: Tensor, side: int, window: int) -> Tensor:
    """Converts raster order `[dim, side * side, tiles]` to window order, as described in the module docstring."""
    n, dim, tiles = side // window, x.ne[0], _count(x) // (side * side)
    return graph.cont(graph.permute(graph.reshape(x, dim * window, n, window, n * tiles), 0, 2, 1, 3))


def _raster(graph: Graph, x: Tensor, side: int, window: int, n_tiles: int) -> Tensor:
    """Converts window order back to raster order, `[dim, side * side, tiles]`."""
    n, dim = side // window, x.ne[0]
    swapped = graph.permute(graph.reshape(x, dim * window, window, n, n * n_tiles), 0, 2, 1, 3)
    return graph.reshape(graph.cont(swapped), dim, side * side, n_tiles)


def _count(x: Tensor) -> int:
    return x.ne[1] * x.ne[2] * x.ne[3]
