"""Decoder architectures: from a checkpoint's `text_config` to the GGUF architecture that llama.cpp computes.

One `TextArchitecture` for each GGUF architecture. Names: transformers' `models/granite*`, llama.cpp's
`src/llama-arch.cpp` and the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from granite4v.errors import CheckpointError
from granite4v.families.base import Metadata
from granite4v.families.tensor_rules import DropRule, TensorGroup, TensorRule, each_layer

# Where the decoder's tensors stand, today's spelling first. Adapters trained on the text model alone
# and text-only checkpoints have the last one.
PREFIXES = ("model.language_model.", "language_model.model.", "model.language_model.model.", "model.")
HEAD_PREFIXES = ("", "language_model.", "model.language_model.", "model.")
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a decoder, read from `text_config` once, defaults filled in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_linear_factor: float | None
    rotary: bool
    attention_bias: bool
    mlp_bias: bool
    fused_mlp: bool

    @property
    def n_gqa(self) -> int:
        """Query heads for each key-value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class TextArchitecture:
    """`arch`: the GGUF architecture. `metadata` is written with the architecture as prefix."""

    arch: str
    hf_model_types: tuple[str, ...]
    config: Callable[[Metadata, Iterable[str]], TextConfig]
    metadata: Callable[[TextConfig, Metadata], dict[str, Any]]
    tensors: Callable[[TextConfig, bool], tuple[TensorGroup, ...]]


def text_architecture(text_config: Metadata) -> TextArchitecture:
    """The architecture of a `text_config`; raises CheckpointError when none is known."""
    model_type = text_config.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.hf_model_types:
            return architecture
    known = ", ".join(repr(name) for architecture in ARCHITECTURES for name in architecture.hf_model_types)
    raise CheckpointError(f"text_config has model_type {model_type!r}; the text models that convert are {known}.")


# --- granite ---


def _granite_config(text: Metadata, tensor_names: Iterable[str]) -> TextConfig:
    """Sizes of a `granite`, or of a `granitemoehybrid` whose layers are all attention and dense.

    Whether gate and up are fused is a fact of the checkpoint: see its tensor names.
    """
    hybrid = text.get("model_type") == "granitemoehybrid"
    if hybrid:
        _check_dense_attention(text)
    _expect(text, "hidden_act", "silu", "silu")
    heads, hidden = _size(text, "num_attention_heads"), _size(text, "hidden_size")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return TextConfig(
        vocab_size=_size(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(text, "shared_intermediate_size" if hybrid else "intermediate_size"),
        num_hidden_layers=_size(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        max_position_embeddings=int(text.get("max_position_embeddings", 2048)),
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0),
        rope_linear_factor=_linear_factor(rope),
        # granitemoehybrid turns the rotary embedding on by name; granite always has it
        rotary=not hybrid or text.get("position_embedding_type") == "rope",
        attention_bias=bool(text.get("attention_bias", False)),
        mlp_bias=bool(text.get("mlp_bias", False)),
        fused_mlp=any("shared_mlp.input_linear" in name for name in tensor_names),
    )


def _granite_metadata(config: TextConfig, text: Metadata) -> dict[str, Any]:
    return {
        **_common_metadata(config),
        # llama.cpp divides the logits by logit_scale and multiplies by the others, as transformers does
        "attention.scale": float(text.get("attention_multiplier", 1.0)),
        "embedding_scale": float(text.get("embedding_multiplier", 1.0)),
        "residual_scale": float(text.get("residual_multiplier", 1.0)),
        "logit_scale": float(text.get("logits_scaling", 1.0)),
        # granite uses this key as the switch of the rotary embedding
        "rope.scaling.finetuned": config.rotary,
    }


def _common_metadata(config: TextConfig) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        metadata |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.rope_linear_factor is not None:
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_linear_factor}
    return metadata


def _decoder_tensors(config: TextConfig, tied: bool) -> tuple[TensorGroup, ...]:
    """A llama-style decoder: q, k, v, o, gate, up, down and two RMS norms a layer.

    Query and key rows are reordered, for llama.cpp's rotary embedding of these architectures turns
    neighbouring pairs where transformers turns the two halves of a head.
    """
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    n_q, n_kv = config.num_attention_heads, config.num_key_value_heads
    q, kv = n_q * dim, n_kv * dim
    rows = [
        TensorRule("layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", (hidden,)),
        TensorRule("layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", (q, hidden), rope_heads=n_q),
        TensorRule("layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight", (kv, hidden), rope_heads=n_kv),
        TensorRule("layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight", (kv, hidden)),
        TensorRule("layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight", (hidden, q)),
        TensorRule("layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", (hidden,)),
    ]
    if config.attention_bias:
        rows += [
            TensorRule("layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias", (q,), rope_heads=n_q),
            TensorRule("layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias", (kv,), rope_heads=n_kv),
            TensorRule("layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias", (kv,)),
            TensorRule("layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias", (hidden,)),
        ]
    if config.fused_mlp:
        both = "layers.{i}.shared_mlp.input_linear.weight"
        rows += [
            TensorRule(both, "blk.{i}.ffn_gate.weight", (2 * ffn, hidden), rows=(0, ffn)),
            TensorRule(both, "blk.{i}.ffn_up.weight", (2 * ffn, hidden), rows=(ffn, 2 * ffn)),
            TensorRule("layers.{i}.shared_mlp.output_linear.weight", "blk.{i}.ffn_down.weight", (hidden, ffn)),
        ]
    else:
        rows += [
            TensorRule("layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", (ffn, hidden)),
            TensorRule("layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight", (ffn, hidden)),
            TensorRule("layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight", (hidden, ffn)),
        ]
    if config.mlp_bias:
        rows += [
            TensorRule("layers.{i}.mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias", (ffn,)),
            TensorRule("layers.{i}.mlp.up_proj.bias", "blk.{i}.ffn_up.bias", (ffn,)),
            TensorRule("layers.{i}.mlp.down_proj.bias", "blk.{i}.ffn_down.bias", (hidden,)),
        ]
    return (
        TensorGroup(
            prefixes=PREFIXES,
            rules=(
                TensorRule(EMBEDDING, "token_embd.weight", (config.vocab_size, hidden)),
                *each_layer(config.num_hidden_layers, *rows),
                TensorRule("norm.weight", "output_norm.weight", (hidden,)),
            ),
            drops=each_layer_drop(config.num_hidden_layers),
        ),
        TensorGroup(
            prefixes=HEAD_PREFIXES,
            rules=() if tied else (TensorRule(HEAD, "output.weight", (config.vocab_size, hidden)),),
            drops=(DropRule(HEAD, "the same as the token embedding, to which it is tied"),) if tied else (),
        ),
    )


def each_layer_drop(n_layers: int) -> tuple[DropRule, ...]:
    """Rotary frequencies that older versions of transformers saved."""
    reason = "rotary frequencies, computed from the configuration"
    return (
        DropRule("rotary_emb.inv_freq", reason),
        *(DropRule(f"layers.{i}.self_attn.rotary_emb.inv_freq", reason) for i in range(n_layers)),
    )


def is_tied(hf_config: Metadata, text: Metadata, has_head: bool) -> bool:
    """Whether the output head is the token embedding.

    The outer configuration decides, as in transformers, then text_config. A checkpoint that says 'untied'
    in one place, 'tied' in the other and holds no head is tied.
    """
    outer, inner = hf_config.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if not has_head:
        return bool(outer or inner)
    return bool(inner if outer is None else outer)


def _linear_factor(rope: Metadata) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return float(rope["factor"])
    raise CheckpointError(f"text_config has rope type {kind!r}; the types that convert are 'default' and 'linear'.")


def _check_dense_attention(text: Metadata) -> None:
    layers = text.get("layer_types") or text.get("layers_block_type") or ()
    others = sorted({kind for kind in layers if kind not in ("attention", "full_attention")})
    if others or not layers:
        raise CheckpointError(
            f"text_config is a granitemoehybrid with layer types {others or 'not given'}; only models whose layers "
            "are all 'attention' convert."
        )
    if text.get("num_local_experts"):
        raise CheckpointError(
            f"text_config is a granitemoehybrid with {text['num_local_experts']} experts; only dense models convert."
        )


def _expect(text: Metadata, key: str, expected: str, default: str) -> None:
    value = text.get(key, default)
    if value != expected:
        raise CheckpointError(f"text_config has {key} {value!r}; this architecture computes {expected!r}.")


def _size(text: Metadata, key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"text_config has '{key}' = {value!r}; expected a positive integer.")
    return value


ARCHITECTURES = (
    TextArchitecture(
        arch="granite",
        hf_model_types=("granite4_vision_text", "granite", "granitemoehybrid"),
        config=_granite_config,
        metadata=_granite_metadata,
        tensors=_decoder_tensors,
    ),
)
