"""Decoder architectures: from a checkpoint's `text_config` to the GGUF architecture that llama.cpp computes.

One `TextArchitecture` for each GGUF architecture. Names and defaults: transformers 5.23 `models/granite*`, `llama`,
`mistral` and `qwen2`; llama.cpp's `src/models`, `src/llama-arch.cpp` and the `gguf` package.
"""

from __future__ import annotations

import math
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
ROPE_FACTORS = "rope_freqs.weight"

# What a text_config may leave out, as published checkpoints do, by its model_type.
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "granite": _LLAMA_DEFAULTS,
    "llama": _LLAMA_DEFAULTS,
    "mistral": {
        **_LLAMA_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_LLAMA_DEFAULTS,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}


def with_defaults(text: Metadata) -> Metadata:
    """A `text_config` with what it leaves out filled in."""
    return {**DEFAULTS.get(str(text.get("model_type")), {}), **text}


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a decoder, read from `text_config` once, defaults filled in.

    `rope_linear_factor`, `rope_factors`: positions divided by one number, or the frequency of each pair by its own.
    `rope_pairs`: the rotary embedding of this GGUF architecture turns neighbouring rows, not the halves of a head.
    `attention_bias` is that of query, key and value.
    """

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
    fused_mlp: bool = False
    output_bias: bool = False
    rope_pairs: bool = True
    rope_factors: tuple[float, ...] | None = None

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
    head_dim = int(text.get("head_dim") or hidden // heads)
    rope = _Rope.read(text, head_dim)
    return TextConfig(
        vocab_size=_size(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(text, "shared_intermediate_size" if hybrid else "intermediate_size"),
        num_hidden_layers=_size(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        max_position_embeddings=int(text.get("max_position_embeddings", 2048)),
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        rope_theta=rope.theta,
        rope_linear_factor=rope.linear_factor,
        rope_factors=rope.factors,
        # granitemoehybrid turns the rotary embedding on by name; granite always has it
        rotary=not hybrid or text.get("position_embedding_type") == "rope",
        attention_bias=bool(text.get("attention_bias", False)),
        output_bias=bool(text.get("attention_bias", False)),
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


# --- llama, which mistral is too, and qwen2 ---


def _llama_config(text: Metadata, tensor_names: Iterable[str]) -> TextConfig:
    return _plain_config(text, text.get("sliding_window"), bias=bool(text.get("attention_bias", False)))


def _qwen2_config(text: Metadata, tensor_names: Iterable[str]) -> TextConfig:
    """Query, key and value always have a bias, the output never; the rotary embedding turns halves."""
    window = text.get("sliding_window") if text.get("use_sliding_window") else None
    config = _plain_config(text, window, bias=True, output_bias=False, rope_pairs=False)
    if config.rope_factors is not None:
        raise CheckpointError(
            "text_config has rope type 'llama3' and model_type 'qwen2'; llama.cpp's 'qwen2' has no such frequencies."
        )
    return config


def _plain_config(
    text: Metadata, window: int | None, *, bias: bool, output_bias: bool | None = None, rope_pairs: bool = True
) -> TextConfig:
    """`window`: each token sees so many. llama.cpp's architectures see all, so the context ends where that differs."""
    _expect(text, "hidden_act", "silu", "silu")
    heads, hidden = _size(text, "num_attention_heads"), _size(text, "hidden_size")
    head_dim = int(text.get("head_dim") or hidden // heads)
    rope = _Rope.read(text, head_dim)
    context = _size(text, "max_position_embeddings")
    return TextConfig(
        vocab_size=_size(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(text, "intermediate_size"),
        num_hidden_layers=_size(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        max_position_embeddings=min(context, window) if window else context,
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        rope_theta=rope.theta,
        rope_linear_factor=rope.linear_factor,
        rope_factors=rope.factors,
        rope_pairs=rope_pairs,
        rotary=True,
        attention_bias=bias,
        output_bias=bias if output_bias is None else output_bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
    )


def _plain_metadata(config: TextConfig, text: Metadata) -> dict[str, Any]:
    return _common_metadata(config)


# --- what they share ---


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

    Query and key rows are reordered where llama.cpp's rotary embedding of the architecture turns neighbouring
    pairs; transformers always turns the two halves of a head.
    """
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    n_q, n_kv = config.num_attention_heads, config.num_key_value_heads
    q, kv = n_q * dim, n_kv * dim
    q_pairs, k_pairs = (n_q, n_kv) if config.rope_pairs else (0, 0)
    rows = [
        TensorRule("layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", (hidden,)),
        TensorRule("layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", (q, hidden), rope_heads=q_pairs),
        TensorRule("layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight", (kv, hidden), rope_heads=k_pairs),
        TensorRule("layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight", (kv, hidden)),
        TensorRule("layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight", (hidden, q)),
        TensorRule("layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", (hidden,)),
    ]
    if config.attention_bias:
        rows += [
            TensorRule("layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias", (q,), rope_heads=q_pairs),
            TensorRule("layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias", (kv,), rope_heads=k_pairs),
            TensorRule("layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias", (kv,)),
        ]
    if config.output_bias:
        rows.append(TensorRule("layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias", (hidden,)))
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
                *_rope_factors(config),
            ),
            drops=each_layer_drop(config.num_hidden_layers),
        ),
        TensorGroup(
            prefixes=HEAD_PREFIXES,
            rules=() if tied else (TensorRule(HEAD, "output.weight", (config.vocab_size, hidden)),),
            drops=(DropRule(HEAD, "the same as the token embedding, to which it is tied"),) if tied else (),
        ),
    )


def _rope_factors(config: TextConfig) -> tuple[TensorRule, ...]:
    if config.rope_factors is None:
        return ()
    shape = (len(config.rope_factors),)
    return (TensorRule("factors of the rotary frequencies", ROPE_FACTORS, shape, values=config.rope_factors),)


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


@dataclass(frozen=True)
class _Rope:
    theta: float
    linear_factor: float | None = None
    factors: tuple[float, ...] | None = None

    @classmethod
    def read(cls, text: Metadata, head_dim: int) -> _Rope:
        """The rotary embedding of a `text_config`, in today's spelling or an older one; raises CheckpointError."""
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        theta = float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0)
        kind = rope.get("rope_type", rope.get("type", "default"))
        try:
            if kind == "default":
                return cls(theta)
            if kind == "linear":
                return cls(theta, linear_factor=float(rope["factor"]))
            if kind == "llama3":
                return cls(theta, factors=_llama3_factors(rope, theta, head_dim))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"text_config has rope type {kind!r} without all that it needs ({error}).") from None
        raise CheckpointError(
            f"text_config has rope type {kind!r}; the types that convert are 'default', 'linear' and 'llama3'."
        )


def _llama3_factors(rope: Metadata, theta: float, head_dim: int) -> tuple[float, ...]:
    """What the frequency of each pair is divided by: long waves by `factor`, short ones by 1, a slope between.

    transformers 5.23, `modeling_rope_utils._compute_llama3_parameters`.
    """
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        smooth = min(max((context / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


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
    TextArchitecture(
        arch="llama",
        hf_model_types=("llama", "mistral"),
        config=_llama_config,
        metadata=_plain_metadata,
        tensors=_decoder_tensors,
    ),
    TextArchitecture(
        arch="qwen2",
        hf_model_types=("qwen2",),
        config=_qwen2_config,
        metadata=_plain_metadata,
        tensors=_decoder_tensors,
    ),
)
