"""The decoder of Llama 4: a mixture of experts, and attention whose constants are hard-coded in llama.cpp.

transformers 5.23 `models/llama4`; llama.cpp's `src/models/llama4.cpp`. llama.cpp has no keys for these constants. In
three of four layers, tokens attend within their chunk of 8192, and queries and keys are rotated and then normalized
(not normalized with exactly 128 experts). Every fourth layer attends to all tokens, has no rotary embedding and scales
queries by position. A checkpoint with other constants would convert but answer nonsense, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError
from granite4v.families.hf_fields import MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH, Fields
from granite4v.families.text_config import ExpertsConfig, TextConfig, common_metadata, n_text_layers, sizes

# Defaults of fields that a text_config may leave out.
LLAMA4_DEFAULTS: dict[str, Any] = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
CHUNK = 8192
NOPE_EVERY = 4
ATTENTION_SCALE = 0.1
WITHOUT_QK_NORM = 128  # the number of experts with which llama.cpp leaves the QK norm out
MAX_EXPERTS = 512  # llama.cpp's LLAMA_MAX_EXPERTS
_BUILT_IN = "which llama.cpp has built in for this model"


def llama4_config(text: Fields, tensor_names: Iterable[str]) -> TextConfig:
    """Reads the sizes of a `llama4_text`. Raises CheckpointError if it differs from what llama.cpp computes."""
    experts = _experts(text)
    _check_attention(text, experts.count)
    if text.flag("attention_bias", False):
        raise text.error("attention_bias", "false; llama.cpp's 'llama4' has no such biases")
    return TextConfig(
        **sizes(text, "intermediate_size_mlp"),
        rope_pairs=False,  # transformers rotates adjacent pairs, too
        rotary=True,
        attention_bias=False,
        mlp_bias=False,
        experts=experts,
    )


def llama4_metadata(config: TextConfig, text: Fields) -> dict[str, Any]:
    assert config.experts is not None
    return {
        **common_metadata(config),
        keys.KEY_LENGTH: config.head_dim,
        keys.VALUE_LENGTH: config.head_dim,
        keys.EXPERT_COUNT: config.experts.count,
        keys.EXPERT_USED_COUNT: config.experts.used,
        keys.EXPERT_FEED_FORWARD_LENGTH: config.experts.intermediate_size,
        keys.INTERLEAVE_MOE_LAYER_STEP: config.experts.every,
    }


def _experts(text: Fields) -> ExpertsConfig:
    count = text.integer("num_local_experts", 1, MAX_EXPERTS, 16)
    return ExpertsConfig(
        count=count,
        used=text.integer("num_experts_per_tok", 1, count, 1),
        every=_step(text),
        intermediate_size=text.integer("intermediate_size", 1, MAX_WIDTH),
    )


def _step(text: Fields) -> int:
    """Reads the step between layers with experts. A list in `moe_layers` takes precedence, as in transformers."""
    n_layers = n_text_layers(text)
    step = text.integer("interleave_moe_layer_step", 1, n_layers, 1)
    if text.get("moe_layers") is None:
        return step
    layers = text.integers("moe_layers", 0, MAX_LAYERS)
    step = layers[0] + 1 if layers else 0
    if not step or layers != list(range(step - 1, n_layers, step)):
        raise text.error("moe_layers", "every layer, or every second, third, ..., which llama.cpp computes")
    return step


def _check_attention(text: Fields, n_experts: int) -> None:
    """Raises CheckpointError if attention differs from the constants hard-coded in llama.cpp."""
    for key, wanted in (("attention_chunk_size", CHUNK), ("floor_scale", CHUNK)):
        if text.integer(key, 1, MAX_POSITIONS, wanted) != wanted:
            raise text.error(key, f"{wanted}, {_BUILT_IN}")
    if text.number("attn_scale", 0, 1, ATTENTION_SCALE) != ATTENTION_SCALE:
        raise text.error("attn_scale", f"{ATTENTION_SCALE:g}, {_BUILT_IN}")
    if not text.values.get("attn_temperature_tuning", True):  # a number in published files
        raise text.error("attn_temperature_tuning", f"true, {_BUILT_IN}")
    rotated = [int((i + 1) % NOPE_EVERY != 0) for i in range(n_text_layers(text))]
    if text.integer("no_rope_layer_interval", 1, MAX_LAYERS, NOPE_EVERY) != NOPE_EVERY and not text.get(
        "no_rope_layers"
    ):
        raise text.error("no_rope_layer_interval", f"{NOPE_EVERY}, {_BUILT_IN}")
    if text.get("no_rope_layers") and text.integers("no_rope_layers", 0, 1)[: len(rotated)] != rotated:
        raise text.error("no_rope_layers", f"0 for every {NOPE_EVERY}th layer and 1 for the others, {_BUILT_IN}")
    kinds = ["chunked_attention" if turns else "full_attention" for turns in rotated]
    if text.get("layer_types") is not None and text.get("layer_types") != kinds:
        raise text.error(
            "layer_types", f"'full_attention' for every {NOPE_EVERY}th layer and 'chunked_attention' for the others"
        )
    if text.flag("use_qk_norm", True) == (n_experts == WITHOUT_QK_NORM):
        raise CheckpointError(
            f"'{text.file}' has {n_experts} experts ('{text.path}.num_local_experts') "
            f"{'with' if n_experts == WITHOUT_QK_NORM else 'without'} a norm of queries and keys ('use_qk_norm'); "
            f"llama.cpp's 'llama4' leaves that norm out with {WITHOUT_QK_NORM} experts, and only then."
        )
