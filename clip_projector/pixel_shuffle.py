"""The projector that makes one token from each block of patches: joins the patches, then applies three linear layers.

As transformers 5.24 computes it (`pixel_shuffle` and the layers after it). The values of a block are in the order
(row in block, column in block, value). For 24x24 patches of `dim` values and blocks of 2x2, [fastest axis first]:

    raster    [dim, 576, tiles]              patch = 24 * row + column
    reshaped  [2 * dim, 12, 2, 12 * tiles]   2 patches of a block row; block column; row in block; block row and tile
    swapped   [2 * dim, 2, 12, 12 * tiles]   the 2 rows of a block are now adjacent
    joined    [4 * dim, 144, tiles]          token = 12 * block row + block column
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import linear
from granite4v.clip_projector.weights import Weights
from granite4v.families.base import PixelShuffleMlpConfig, VisionConfig
from granite4v.ggml.graph import Graph, Tensor


def project(graph: Graph, weights: Weights, config: VisionConfig, states: Mapping[int, list[Tensor]]) -> list[Tensor]:
    """Projects groups of hidden states `[dim, patches, tiles]` to the embeddings `[n_embd, tokens_per_tile, tiles]` of
    the one stream."""
    projector = config.projector
    assert isinstance(projector, PixelShuffleMlpConfig)
    (stream,) = config.streams
    (state,) = stream.hidden_states
    n_in, width, act = config.tower.hidden_size * projector.block_side**2, projector.width, projector.hidden_act

    def layer(number: int, n_in: int, n_out: int, act: str | None = None) -> Callable[[Tensor], Tensor]:
        name = keys.MLP.format(layer=number)
        return linear(graph, weights, name, n_in, n_out, act, to_product=act is not None, has_bias=False)

    first, second = layer(keys.MLP_FIRST, n_in, width, act), layer(keys.MLP_SECOND, width, width, act)
    third = layer(keys.MLP_THIRD, width, config.text_hidden_size)

    def run(x: Tensor) -> Tensor:
        return third(second(first(_joined(graph, x, config.tower.grid_side, projector.block_side))))

    return [graph.join([graph.expand(run(x)) for x in states[state]], axis=2)]


def _joined(graph: Graph, x: Tensor, side: int, block: int) -> Tensor:
    dim, n_tiles, n = x.ne[0], x.ne[2], side // block
    grid = graph.reshape(x, block * dim, n, block, n * n_tiles)
    swapped = graph.cont(graph.permute(grid, 0, 2, 1, 3))
    return graph.reshape(swapped, block**2 * dim, n * n, n_tiles)
