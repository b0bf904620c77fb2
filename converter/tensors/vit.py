"""The tensors of a SigLIP or CLIP tower, for every family that has one.

Names: transformers 5.23 `models/siglip` and `models/clip`, and llama.cpp's `tools/mtmd/clip-impl.h`. The
feed-forward width (4304 in so400m) is padded with zeros to a multiple of the quantization block size. The padded rows
of the first matrix give gelu(0) = 0, which the padded columns of the second multiply by 0, so the result is exactly the
same.
"""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.converter.tensors.rules import (
    DropRule,
    TensorGroup,
    TensorRule,
    each_layer,
    linear,
    norm,
)
from granite4v.families.base import TowerConfig
from granite4v.families.towers import N_CHANNELS
from granite4v.families.vision_layout import padded_width

# The names of the tower in various versions of transformers, the current one first.
PREFIXES = (
    "model.vision_tower.",
    "model.vision_tower.vision_model.",
    "vision_tower.",
    "vision_tower.vision_model.",
)
DROPS = (
    DropRule("head.*", "the pooling head; features are taken from the patches"),
    DropRule("embeddings.position_ids", "a constant counter that older versions of transformers saved"),
)
POST_NORM = "post_layernorm"


def tower_tensors(
    tower: TowerConfig, block: int, n_held_layers: int | None = None, *, post_norm: bool = True
) -> TensorGroup:
    """Builds the table of a tower: patch embedding, positions, layers, and the norm after the last layer.

    `block`: the feed-forward width becomes a multiple of it. `n_held_layers`: number of layers in the checkpoint, if
    the tower computes fewer. Without `post_norm`, the norm after the last layer is left out: the model does not apply
    it, but libmtmd would.
    """
    width, patch = tower.hidden_size, tower.patch_size
    rules = [
        TensorRule("embeddings.patch_embedding.weight", keys.PATCH_EMBD_WEIGHT, (width, N_CHANNELS, patch, patch)),
        TensorRule("embeddings.position_embedding.weight", keys.POSITION_EMBD, (tower.n_positions, width)),
    ]
    if tower.patch_bias:
        rules.append(TensorRule("embeddings.patch_embedding.bias", keys.PATCH_EMBD_BIAS, (width,)))
    if tower.class_token:
        rules.append(TensorRule("embeddings.class_embedding", keys.CLASS_EMBD, (width,)))
    if tower.pre_norm:
        rules += norm("pre_layrnorm", keys.PRE_LN, width)  # transformers' spelling
    rules += each_layer(tower.num_hidden_layers, *_layer(tower, block))
    if post_norm:
        rules += norm(POST_NORM, keys.POST_LN, width)
    unused = [
        DropRule(f"encoder.layers.{i}.*", "a layer after the last hidden state that is taken")
        for i in range(tower.num_hidden_layers, n_held_layers or 0)
    ]
    if not post_norm:
        unused.append(DropRule(f"{POST_NORM}.*", "a norm that the hidden states do not pass through"))
    return TensorGroup(prefixes=PREFIXES, rules=tuple(rules), drops=(*DROPS, *unused))


def _layer(tower: TowerConfig, block: int) -> tuple[TensorRule, ...]:
    """One encoder layer, with `{i}` for its number."""
    width, ffn = tower.hidden_size, tower.intermediate_size
    wide = padded_width(ffn, block)
    return (
        *norm("encoder.layers.{i}.layer_norm1", _block("ln1"), width),
        *linear("encoder.layers.{i}.self_attn.q_proj", _block("attn_q"), width, width),
        *linear("encoder.layers.{i}.self_attn.k_proj", _block("attn_k"), width, width),
        *linear("encoder.layers.{i}.self_attn.v_proj", _block("attn_v"), width, width),
        *linear("encoder.layers.{i}.self_attn.out_proj", _block("attn_out"), width, width),
        *norm("encoder.layers.{i}.layer_norm2", _block("ln2"), width),
        *linear("encoder.layers.{i}.mlp.fc1", _block("ffn_up"), ffn, width, padded_out=wide),
        *linear("encoder.layers.{i}.mlp.fc2", _block("ffn_down"), width, ffn, padded_in=wide),
    )


def _block(part: str) -> str:
    return keys.BLOCK.replace("{part}", part)
