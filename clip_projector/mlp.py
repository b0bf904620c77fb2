"""The two-layer projector: joined hidden states, a linear layer, an activation, a linear layer.

Each patch becomes one token (transformers 5.23, `MultiModalProjector` of several models). Tiles are computed one after
the other, as in the tower, so that the joined hidden states of only one tile are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import linear
from granite4v.clip_projector.weights import Weights
from granite4v.families.base import MlpConfig, VisionConfig
from granite4v.ggml.graph import Graph, Tensor


def project(graph: Graph, weights: Weights, config: VisionConfig, states: Mapping[int, list[Tensor]]) -> list[Tensor]:
    """Projects groups of hidden states `[dim, patches, tiles]` to the embeddings `[n_embd, patches, tiles]` of the one
    stream."""
    projector, width = config.projector, config.text_hidden_size
    assert isinstance(projector, MlpConfig)
    (stream,) = config.streams
    n_in = config.tower.hidden_size * len(stream.hidden_states)
    first = linear(
        graph, weights, keys.MLP.format(layer=keys.MLP_FIRST), n_in, width, projector.hidden_act, to_product=True
    )
    second = linear(graph, weights, keys.MLP.format(layer=keys.MLP_SECOND), width, width)

    def run(group: int) -> Tensor:
        x = graph.join([states[k][group] for k in stream.hidden_states], axis=0)
        return second(first(x))

    n_groups = len(states[stream.hidden_states[0]])
    return [graph.join([graph.expand(run(group)) for group in range(n_groups)], axis=2)]
