"""The tensors of a SigLIP image tower, for every family that has one.

Names: transformers 5.23 `models/siglip`, and llama.cpp's `tools/mtmd/clip-impl.h`. The feed-forward width
(4304 in so400m) is padded with zeros to whole quantized blocks: gelu(0) is 0 and meets zero columns, so
the result is exactly the same.
"""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.families.base import TowerConfig
from granite4v.families.tensor_rules import DropRule, TensorGroup, TensorRule, each_layer, padded_width

N_CHANNELS = 3

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


def siglip_tensors(tower: TowerConfig) -> TensorGroup:
    """The table of a tower: patches, positions, layers, and the norm after the last one."""
    width, ffn, patch = tower.hidden_size, tower.intermediate_size, tower.patch_size
    wide = padded_width(ffn)

    def pair(source: str, part: str, out: int, into: int, **options: tuple[int, ...]) -> tuple[TensorRule, TensorRule]:
        bias = {name: shape[:1] for name, shape in options.items()}
        return (
            TensorRule(f"{source}.weight", _block(part, "weight"), (out, into), **options),  # type: ignore[arg-type]
            TensorRule(f"{source}.bias", _block(part, "bias"), (out,), **bias),  # type: ignore[arg-type]
        )

    layer = "encoder.layers.{i}."
    return TensorGroup(
        prefixes=PREFIXES,
        rules=(
            TensorRule("embeddings.patch_embedding.weight", keys.PATCH_EMBD_WEIGHT, (width, N_CHANNELS, patch, patch)),
            TensorRule("embeddings.patch_embedding.bias", keys.PATCH_EMBD_BIAS, (width,)),
            TensorRule("embeddings.position_embedding.weight", keys.POSITION_EMBD, (tower.grid_side**2, width)),
            *each_layer(
                tower.num_hidden_layers,
                *norm(layer + "layer_norm1", keys.BLOCK, "ln1", width),
                *pair(layer + "self_attn.q_proj", "attn_q", width, width),
                *pair(layer + "self_attn.k_proj", "attn_k", width, width),
                *pair(layer + "self_attn.v_proj", "attn_v", width, width),
                *pair(layer + "self_attn.out_proj", "attn_out", width, width),
                *norm(layer + "layer_norm2", keys.BLOCK, "ln2", width),
                *pair(layer + "mlp.fc1", "ffn_up", ffn, width, padded=(wide, width)),
                *_down(layer + "mlp.fc2", width, ffn, wide),
            ),
            TensorRule("post_layernorm.weight", keys.POST_LN.format(suffix="weight"), (width,)),
            TensorRule("post_layernorm.bias", keys.POST_LN.format(suffix="bias"), (width,)),
        ),
        drops=DROPS,
    )
