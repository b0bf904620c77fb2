"""Initial weights: matrices of variance 1/fan-in, and a tower whose first layers attend to neighbouring patches."""

from __future__ import annotations

import math

import torch

from scripts.nano.spec import LORA_TARGETS, NANO_ADAPTER, TEXT, VISION, grid_side, projectors
from tests.toy.spec import CheckpointSpec

Tensors = dict[str, torch.Tensor]


class _Weights:
    """Tensors by name, drawn one after another from one generator, so a seed's result depends on their order."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.tensors: Tensors = {}

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def matrix(self, n_out: int, n_in: int, gain: float = 1.0) -> torch.Tensor:
        return self.randn(n_out, n_in) * (gain / math.sqrt(n_in))

    def linear(self, name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        self.tensors[name + ".weight"] = self.matrix(n_out, n_in, gain)
        self.tensors[name + ".bias"] = torch.zeros(n_out)

    def norm(self, name: str, width: int) -> None:
        self.tensors[name + ".weight"] = torch.ones(width)
        self.tensors[name + ".bias"] = torch.zeros(width)


def initial(spec: CheckpointSpec, n_vocab: int, seed: int) -> tuple[Tensors, Tensors, Tensors]:
    """Returns (text, vision, adapter) as float32 tensors. Matrices have variance 1/fan-in; the adapter's B is zero."""
    generator = torch.Generator().manual_seed(seed)
    text, adapter = _text(spec, n_vocab, _Weights(generator))
    vision = _Weights(generator)
    _tower(spec, vision)
    _projectors(spec, vision)
    return text, vision.tensors, adapter


def _text(spec: CheckpointSpec, n_vocab: int, made: _Weights) -> tuple[Tensors, Tensors]:
    """Draws the decoder's weights and the adapter's."""
    text, adapter = made.tensors, {}
    width, kv = spec.text_hidden, spec.text_hidden // spec.text_heads * spec.text_kv_heads
    text[TEXT + "embed_tokens.weight"] = made.randn(n_vocab, width) / spec.embedding_multiplier
    shapes = dict(zip(LORA_TARGETS, ((width, width), (kv, width), (kv, width), (width, width)), strict=False))
    shapes |= {"mlp.gate_proj": (spec.text_ffn, width), "mlp.up_proj": (spec.text_ffn, width)}
    shapes |= {"mlp.down_proj": (width, spec.text_ffn)}
    for i in range(spec.text_layers):
        at = f"{TEXT}layers.{i}."
        text[at + "input_layernorm.weight"] = torch.ones(width)
        text[at + "post_attention_layernorm.weight"] = torch.ones(width)
        for name, (n_out, n_in) in shapes.items():
            text[f"{at}{name}.weight"] = made.matrix(n_out, n_in)
            adapter[f"{at}{name}.lora_A.weight"] = made.matrix(NANO_ADAPTER.rank, n_in)
            adapter[f"{at}{name}.lora_B.weight"] = torch.zeros(n_out, NANO_ADAPTER.rank)
    text[TEXT + "norm.weight"] = torch.ones(width)
    return text, adapter


def _tower(spec: CheckpointSpec, made: _Weights) -> None:
    """Draws the newline and the vision tower's weights."""
    vision, width = made.tensors, spec.vision_hidden
    vision["model.image_newline"] = made.randn(spec.text_hidden)
    at = VISION + "embeddings."
    n_pixels = 3 * spec.patch_px**2
    vision[at + "patch_embedding.weight"] = made.matrix(width, n_pixels).view(width, 3, spec.patch_px, spec.patch_px)
    vision[at + "patch_embedding.bias"] = torch.zeros(width)
    vision[at + "position_embedding.weight"] = made.randn(grid_side(spec) ** 2, width) * 0.3
    deep = 1 / math.sqrt(2 * spec.vision_layers)
    for i in range(spec.vision_layers):
        at = f"{VISION}encoder.layers.{i}."
        made.norm(at + "layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj"):
            made.linear(f"{at}self_attn.{name}", width, width)
        made.linear(at + "self_attn.out_proj", width, width, deep)
        made.norm(at + "layer_norm2", width)
        made.linear(at + "mlp.fc1", spec.vision_ffn, width)
        made.linear(at + "mlp.fc2", width, spec.vision_ffn, deep)
    _look_at_neighbours(vision, spec)
    made.norm(VISION + "post_layernorm", width)


def _projectors(spec: CheckpointSpec, made: _Weights) -> None:
    width = spec.vision_hidden
    query, window = (int(part) for part in spec.downsample_rate.split("/"))
    for at, _, layer in projectors(spec):
        made.norm(at + "norm", width)
        made.tensors[at + "query"] = made.randn(1, query**2, width) * 0.3
        made.tensors[at + "image_positions"] = made.randn(1, window**2, width) * 0.3
        made.norm(at + "qformer.layernorm", width)
        block = at + "qformer.encoder.layer.0."
        for attention in ("attention", "crossattention"):
            for name in ("query", "key", "value"):
                made.linear(f"{block}{attention}.attention.{name}", width, width)
            made.linear(f"{block}{attention}.output.dense", width, width, 0.5)
            made.norm(f"{block}{attention}.output.LayerNorm", width)
        made.linear(block + "intermediate_query.dense", spec.qformer_ffn, width)
        made.linear(block + "output_query.dense", width, spec.qformer_ffn, 0.5)
        made.norm(block + "output_query.LayerNorm", width)
        made.linear(at + "out_linear", spec.text_hidden, width, 1.0 if layer == 0 else 0.5)


# Which neighbour each head of the first layers attends to initially: (rows down, columns to the right).
NEIGHBOURS = (
    ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (1, 1)),
    ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, 1), (1, -1)),
)
SHARPNESS = 2.6


def _look_at_neighbours(vision: Tensors, spec: CheckpointSpec) -> None:
    """Initializes the first layers similarly to convolutions: each head attends to one neighbour of a patch.

    A letter covers several patches, so without this the tower first has to learn which patches are adjacent. The first
    dimensions of a patch encode its row and column as sines and cosines. A head's query matrix rotates them by its
    offset, so the dot product with a key is largest at the patch at that offset.
    """
    side, size = grid_side(spec), spec.vision_hidden // spec.vision_heads
    n = size // 4  # frequencies of each axis
    angle = torch.outer(torch.arange(side).float(), torch.arange(1, n + 1) * (math.pi / side))
    waves = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)  # (side, 2n)
    place = torch.cat((waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)), dim=-1)
    at = VISION + "embeddings."
    vision[at + "patch_embedding.weight"][:size] = 0
    vision[at + "position_embedding.weight"][:, :size] = place.reshape(side * side, size)
    for i, offsets in enumerate(NEIGHBOURS):
        q = vision[f"{VISION}encoder.layers.{i}.self_attn.q_proj.weight"].view(spec.vision_heads, size, -1)
        k = vision[f"{VISION}encoder.layers.{i}.self_attn.k_proj.weight"].view(spec.vision_heads, size, -1)
        for head, (down, right) in enumerate(offsets):
            q[head] *= 0.1
            k[head] *= 0.1
            k[head, :, :size] = torch.eye(size) * SHARPNESS
            turns = [step * (math.pi / side) * f for step in (down, right) for f in range(1, n + 1)]
            blocks = [torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]) for t in turns]
            q[head, :, :size] = torch.block_diag(*blocks) * SHARPNESS
