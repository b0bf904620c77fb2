"""Computes the image input of a decoder with cross-attention: the projected states of every position of every tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import linear
from granite4v.clip_projector.grid_canvas import CanvasLayout, canvas_layout
from granite4v.clip_projector.tiled_tower import QUERIES_AT_ONCE, n_padding, output_states
from granite4v.clip_projector.tiles_canvas import canvas_patches, cut_canvas
from granite4v.clip_projector.weights import Weights
from granite4v.families.base import CanvasConfig, TiledTowerConfig
from granite4v.families.towers import N_CHANNELS
from granite4v.ggml.graph import Graph

NODES_PER_TILE_AND_LAYER = 64
NODES_PER_PIECE = 8  # per piece of at most QUERIES_AT_ONCE queries
STATES = "states"  # the name of the graph's output


@dataclass(frozen=True)
class CrossFeatures:
    """The features of one image for the cross-attention layers of a decoder.

    `states`: float32 `(max_num_tiles, positions_per_tile, text_hidden_size)`, with the class token first in each tile;
    tiles from index `n_tiles` on are missing in the image. `layout`: the canvas.
    """

    states: np.ndarray
    layout: CanvasLayout

    @property
    def n_tiles(self) -> int:
        return self.layout.n_tiles

    @property
    def n_tokens(self) -> int:
        return self.layout.n_tokens

    @property
    def nbytes(self) -> int:
        return self.states.nbytes


def max_nodes(config: TiledTowerConfig) -> int:
    """An upper bound for the number of nodes in the graph of `fill_states`."""
    n_layers = config.num_hidden_layers + config.num_global_layers + 2
    n_pieces = 2 + config.max_num_tiles * config.n_positions // QUERIES_AT_ONCE
    return n_layers * (NODES_PER_TILE_AND_LAYER * (config.max_num_tiles + 1) + NODES_PER_PIECE * n_pieces)


def fill_states(graph: Graph, weights: Weights, config: TiledTowerConfig, text_hidden_size: int, n_tiles: int) -> None:
    """Builds the graph of tower and projector for images of `n_tiles` tiles. `canvas_inputs` returns its inputs; its
    output is named `STATES`."""
    tiles, n_values = config.max_num_tiles, N_CHANNELS * config.patch_size**2
    pixels = graph.input("pixels", "F32", n_values, config.grid_side**2, tiles)
    zeros = graph.input("padding", "F32", config.hidden_size, tiles * n_padding(config))
    ratio = graph.input("aspect_ratio", "I32", 1)
    project = linear(graph, weights, keys.MLP.format(layer=keys.MLP_FIRST), config.output_size, text_hidden_size)
    found = output_states(graph, weights, config, pixels, zeros, ratio, n_tiles)
    graph.output(STATES, graph.join([graph.expand(project(tile)) for tile in found], axis=2))


def canvas_inputs(
    image: Image, config: TiledTowerConfig, tiling: CanvasConfig
) -> tuple[CanvasLayout, dict[str, np.ndarray]]:
    """Computes the canvas of an RGB image, and the inputs of the graph for that number of tiles."""
    where = canvas_layout(image.size, tiling)
    tiles, n_zeros = config.max_num_tiles, config.max_num_tiles * n_padding(config)
    return where, {
        "pixels": canvas_patches(cut_canvas(image, where, tiling), tiling, config.patch_size, tiles),
        "padding": np.zeros((n_zeros, config.hidden_size), dtype=np.float32),
        "aspect_ratio": np.array([where.aspect_ratio_id], dtype=np.int32),
    }
