"""Projects the tower's hidden states to the embeddings of every stream, with the projector that is configured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from granite4v.clip_projector import mlp, pixel_shuffle, qformer
from granite4v.clip_projector.weights import Weights
from granite4v.families.base import MlpConfig, PixelShuffleMlpConfig, VisionConfig, WindowQFormerConfig
from granite4v.ggml.graph import Graph, Tensor

States = Mapping[int, list[Tensor]]
Project = Callable[[Graph, Weights, VisionConfig, States], list[Tensor]]

KINDS: dict[type, Project] = {
    WindowQFormerConfig: qformer.project,
    MlpConfig: mlp.project,
    PixelShuffleMlpConfig: pixel_shuffle.project,
}


def project(graph: Graph, weights: Weights, config: VisionConfig, states: States) -> list[Tensor]:
    """Returns the embeddings `[n_embd, tokens_per_tile, tiles]` of every stream. `states`: hidden states by index, each
    as a list of groups `[dim, patches, tiles of the group]`."""
    return KINDS[type(config.projector)](graph, weights, config, states)
