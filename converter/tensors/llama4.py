"""The tensors of Llama 4's vision file: tower and projector.

Checkpoint names: transformers 5.23 `models/llama4`. The names in the file are our own, since libmtmd's model of that
name computes something else. Feed-forward widths are padded as in `vit.py`.
"""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.converter.tensors.rules import TensorGroup, TensorRule, each_layer, linear, norm
from granite4v.families.base import PixelShuffleMlpConfig, TowerConfig, VisionConfig
from granite4v.families.hf_fields import Json
from granite4v.families.towers import N_CHANNELS
from granite4v.families.vision_layout import padded_width

TOWER_PREFIXES = ("vision_model.", "model.vision_model.")
PREFIXES = ("", "model.")


def llama4_vision_tensors(config: VisionConfig, hf_config: Json, block: int) -> tuple[TensorGroup, ...]:
    """All tensors of the mmproj file. `block`: feed-forward widths of the tower become a multiple of it."""
    tower, projector = config.tower, config.projector
    assert isinstance(tower, TowerConfig) and isinstance(projector, PixelShuffleMlpConfig)
    width, patch = tower.hidden_size, tower.patch_size
    joined, mlp = width * projector.block_side**2, "vision_adapter.mlp."
    rules = (
        TensorRule("patch_embedding.linear.weight", keys.PATCH_EMBD_WEIGHT, (width, N_CHANNELS * patch * patch)),
        TensorRule("class_embedding", keys.CLASS_EMBD, (width,)),
        TensorRule("positional_embedding_vlm", keys.POSITION_EMBD, (tower.n_positions, width)),
        *norm("layernorm_pre", keys.PRE_LN, width),
        *each_layer(tower.num_hidden_layers, *_layer(tower, block)),
        *norm("layernorm_post", keys.POST_LN, width),
        TensorRule(f"{mlp}fc1.weight", _mlp(keys.MLP_FIRST), (projector.width, joined)),
        TensorRule(f"{mlp}fc2.weight", _mlp(keys.MLP_SECOND), (projector.width, projector.width)),
    )
    last = TensorRule(
        "multi_modal_projector.linear_1.weight",
        _mlp(keys.MLP_THIRD),
        (config.text_hidden_size, projector.width),
    )
    return TensorGroup(TOWER_PREFIXES, rules), TensorGroup(PREFIXES, (last,))


def _mlp(layer: int) -> str:
    return f"{keys.MLP.replace('{layer}', str(layer))}.weight"


def _layer(tower: TowerConfig, block: int) -> tuple[TensorRule, ...]:
    """One encoder layer, with `{i}` for its number."""
    width, ffn = tower.hidden_size, tower.intermediate_size
    wide, layer = padded_width(ffn, block), "model.layers.{i}."

    def key(part: str) -> str:
        return keys.BLOCK.replace("{part}", part)

    attention = (
        linear(f"{layer}self_attn.{part}_proj", key(ours), width, width)
        for part, ours in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_out"))
    )
    return (
        *norm(f"{layer}input_layernorm", key("ln1"), width),
        *(rule for rules in attention for rule in rules),
        *norm(f"{layer}post_attention_layernorm", key("ln2"), width),
        *linear(f"{layer}mlp.fc1", key("ffn_up"), ffn, width, padded_out=wide),
        *linear(f"{layer}mlp.fc2", key("ffn_down"), width, ffn, padded_in=wide),
    )
