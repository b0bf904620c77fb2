"""The tensors of Mllama's vision file: tower, projector, and the decoder's cross-attention layers.

Checkpoint names: transformers 5.24 `models/mllama`. The names in the file are our own, since llama.cpp does not have
this model.
"""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.converter.tensors import decoder
from granite4v.converter.tensors.rules import TensorGroup, TensorRule, each_layer, linear, norm
from granite4v.families.base import CrossAttentionConfig, TiledTowerConfig, VisionConfig
from granite4v.families.hf_fields import MAX_VOCABULARY, Fields, Json
from granite4v.families.text import MLLAMA_EMBEDDING_ROWS, text_section
from granite4v.families.towers import N_CHANNELS
from granite4v.families.vision_layout import padded_width

TOWER_PREFIXES = ("model.vision_model.", "vision_model.")
PREFIXES = ("model.", "")


def mllama_tensors(config: VisionConfig, hf_config: Json, block: int) -> tuple[TensorGroup, ...]:
    """All tensors of the mmproj file. `block`: feed-forward widths of the tower become a multiple of it."""
    tower, cross = config.tower, config.cross_attention
    assert isinstance(tower, TiledTowerConfig) and cross is not None
    first = keys.MLP.replace("{layer}", str(keys.MLP_FIRST))
    projector = linear("multi_modal_projector", first, config.text_hidden_size, tower.output_size)
    rows = (
        *_ends(tower),
        *each_layer(tower.num_hidden_layers, *_layer("transformer", keys.BLOCK, tower, block)),
        *each_layer(tower.num_global_layers, *_global_layer(tower, block)),
    )
    return (
        TensorGroup(TOWER_PREFIXES, rows),
        TensorGroup(PREFIXES, projector),
        TensorGroup(decoder.PREFIXES, tuple(rule for i in cross.layers for rule in _cross_layer(i, cross))),
        TensorGroup(decoder.PREFIXES, (_image_token(hf_config, cross.hidden_size),)),
    )


def _image_token(hf_config: Json, width: int) -> TensorRule:
    """The embedding of the image token, which is not in the text file."""
    fields = Fields(hf_config)
    n_rows = text_section(hf_config).integer("vocab_size", 1, MAX_VOCABULARY) + MLLAMA_EMBEDDING_ROWS
    name = "image_token_index" if "image_token_index" in fields else "image_token_id"
    token = fields.integer(name, 0, n_rows - 1)
    return TensorRule(decoder.EMBEDDING, keys.IMAGE_TOKEN_EMBD, (n_rows, width), rows=(token, token + 1))


def _ends(tower: TiledTowerConfig) -> tuple[TensorRule, ...]:
    """The tensors before and after the layers. The row of a tile table is selected by the id of the aspect ratio."""
    width, patch, n, tiles = tower.hidden_size, tower.patch_size, tower.n_positions, tower.max_num_tiles
    n_ids = 1 + len(tower.supported_aspect_ratios)  # id 0: no image

    def table(source: str, weight: str, target: str, n_values: int) -> tuple[TensorRule, TensorRule]:
        gate = TensorRule(f"{source}.gate", keys.TILE_GATE.replace("{name}", target), (1,))
        return TensorRule(f"{source}.{weight}.weight", target, (n_ids, n_values)), gate

    positions = "gated_positional_embedding"
    return (
        TensorRule("patch_embedding.weight", keys.PATCH_EMBD_WEIGHT, (width, N_CHANNELS, patch, patch)),
        TensorRule("class_embedding", keys.CLASS_EMBD, (width,)),
        TensorRule(f"{positions}.embedding", keys.POSITION_EMBD, (n, width)),
        *table(positions, "tile_embedding", keys.TILE_POSITION_EMBD, tiles * n * width),
        *table("pre_tile_positional_embedding", "embedding", keys.PRE_TILE_EMBD, tiles * width),
        *table("post_tile_positional_embedding", "embedding", keys.POST_TILE_EMBD, tiles * width),
        *norm("layernorm_pre", keys.PRE_LN, width),
        *norm("layernorm_post", keys.POST_LN, width),
    )


def _layer(room: str, block_name: str, tower: TiledTowerConfig, block: int) -> tuple[TensorRule, ...]:
    """One layer, its number as `{i}`. Its attention has no biases."""
    width, ffn = tower.hidden_size, tower.intermediate_size
    wide, layer = padded_width(ffn, block), f"{room}.layers.{{i}}."

    def key(part: str) -> str:
        return block_name.replace("{part}", part)

    return (
        *norm(f"{layer}input_layernorm", key("ln1"), width),
        *(
            TensorRule(f"{layer}self_attn.{part}_proj.weight", key(f"{ours}.weight"), (width, width))
            for part, ours in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_out"))
        ),
        *norm(f"{layer}post_attention_layernorm", key("ln2"), width),
        *linear(f"{layer}mlp.fc1", key("ffn_up"), ffn, width, padded_out=wide),
        *linear(f"{layer}mlp.fc2", key("ffn_down"), width, ffn, padded_in=wide),
    )


def _global_layer(tower: TiledTowerConfig, block: int) -> tuple[TensorRule, ...]:
    room = "global_transformer"
    gates = tuple(
        TensorRule(f"{room}.layers.{{i}}.{source}", keys.GLOBAL_BLOCK.replace("{part}", part), (1,))
        for source, part in zip(("gate_attn", "gate_ffn"), keys.GATES, strict=True)
    )
    return (*_layer(room, keys.GLOBAL_BLOCK, tower, block), *gates)


def _cross_layer(i: int, cross: CrossAttentionConfig) -> tuple[TensorRule, ...]:
    """Cross-attention layer `i` of the decoder. It has no rotary embedding, so the rows of query and key keep their
    order."""
    hidden, ffn, dim = cross.hidden_size, cross.intermediate_size, cross.head_dim
    q, kv = cross.num_attention_heads * dim, cross.num_key_value_heads * dim
    shapes = {
        "input_layernorm.weight": ("attn_norm.weight", (hidden,)),
        "cross_attn.q_proj.weight": ("attn_q.weight", (q, hidden)),
        "cross_attn.k_proj.weight": ("attn_k.weight", (kv, hidden)),
        "cross_attn.v_proj.weight": ("attn_v.weight", (kv, hidden)),
        "cross_attn.o_proj.weight": ("attn_output.weight", (hidden, q)),
        "cross_attn.q_norm.weight": ("attn_q_norm.weight", (dim,)),
        "cross_attn.k_norm.weight": ("attn_k_norm.weight", (dim,)),
        "cross_attn_attn_gate": (keys.GATES[0], (1,)),
        "post_attention_layernorm.weight": ("ffn_norm.weight", (hidden,)),
        "mlp.gate_proj.weight": ("ffn_gate.weight", (ffn, hidden)),
        "mlp.up_proj.weight": ("ffn_up.weight", (ffn, hidden)),
        "mlp.down_proj.weight": ("ffn_down.weight", (hidden, ffn)),
        "cross_attn_mlp_gate": (keys.GATES[1], (1,)),
    }
    return tuple(
        TensorRule(f"layers.{i}.{source}", keys.CROSS_BLOCK.format(i=i, part=part), shape)
        for source, (part, shape) in shapes.items()
    )
