"""The configuration that every decoder architecture has: its sizes, and the GGUF keys that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError
from granite4v.families.hf_fields import MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH, Fields
from granite4v.families.rope import Rope


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts: a router chooses `used` of `count` feed-forward networks for each token, in addition to a
    shared expert.

    `every`: the step between layers with experts; with 2, layers 1, 3, 5, ... have them. The other layers have one
    dense network. `intermediate_size`: of each expert, including the shared one.
    """

    count: int
    used: int
    every: int
    intermediate_size: int

    def at(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return (layer + 1) % self.every == 0


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a decoder, read from `text_config` once, with defaults filled in.

    `rope_linear_factor`: a divisor of all positions. `rope_factors`: a divisor for the frequency of each pair.
    `rope_pairs`: the rotary embedding of this GGUF architecture rotates pairs of adjacent rows, while transformers
    rotates the two halves of a head.
    `attention_bias`: query, key and value have a bias.
    `layers`: the checkpoint's indices of these layers if there are other layers between them, which
    `num_hidden_layers` does not count. `embedding_rows`: rows of the checkpoint's token embedding beyond the
    vocabulary, which are left out. `experts`: replace the single feed-forward network in some layers.
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
    layers: tuple[int, ...] | None = None
    embedding_rows: int = 0
    experts: ExpertsConfig | None = None

    @property
    def n_gqa(self) -> int:
        """Query heads per key-value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class TextArchitecture:
    """One GGUF architecture, `arch`, and how to read and write it. `config` reads a text_config, given the checkpoint's
    tensor names. `metadata` returns GGUF values by key, with `{arch}` in the keys."""

    arch: str
    hf_model_types: tuple[str, ...]
    config: Callable[[Fields, Iterable[str]], TextConfig]
    metadata: Callable[[TextConfig, Fields], dict[str, Any]]


def sizes(text: Fields, ffn: str) -> dict[str, Any]:
    """Reads the fields of a TextConfig that all architectures share. `ffn`: the name of the feed-forward width. Raises
    CheckpointError."""
    if text.get("hidden_act", "silu") not in ("silu", "swish"):
        raise text.error("hidden_act", "'silu', which this architecture computes")
    heads = text.integer("num_attention_heads", 1, MAX_HEADS)
    hidden = text.integer("hidden_size", 1, MAX_WIDTH)
    head_dim = text.integer("head_dim", 2, MAX_WIDTH, hidden // heads)
    kv_heads = text.integer("num_key_value_heads", 1, MAX_HEADS, heads)
    if heads % kv_heads:
        raise text.error("num_key_value_heads", f"a divisor of the {heads} attention heads")
    if head_dim % 2:
        raise CheckpointError(
            f"'{text.file}' gives heads of {head_dim} values ('{text.path}': 'hidden_size' {hidden}, "
            f"'num_attention_heads' {heads}); expected an even number, since the rotary embedding turns pairs."
        )
    rope = Rope.read(text, head_dim)
    return {
        "vocab_size": text.integer("vocab_size", 1, MAX_VOCABULARY),
        "hidden_size": hidden,
        "intermediate_size": text.integer(ffn, 1, MAX_WIDTH),
        "num_hidden_layers": n_text_layers(text),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": text.integer("max_position_embeddings", 1, MAX_POSITIONS, 2048),
        "rms_norm_eps": text.number("rms_norm_eps", 0, 1, 1e-6),
        "rope_theta": rope.theta,
        "rope_linear_factor": rope.linear_factor,
        "rope_factors": rope.factors,
    }


def n_text_layers(text: Fields) -> int:
    return text.integer("num_hidden_layers", 1, MAX_LAYERS)


def common_metadata(config: TextConfig) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        keys.VOCAB_SIZE: config.vocab_size,
        keys.BLOCK_COUNT: config.num_hidden_layers,
        keys.CONTEXT_LENGTH: config.max_position_embeddings,
        keys.EMBEDDING_LENGTH: config.hidden_size,
        keys.FEED_FORWARD_LENGTH: config.intermediate_size,
        keys.HEAD_COUNT: config.num_attention_heads,
        keys.HEAD_COUNT_KV: config.num_key_value_heads,
        keys.LAYER_NORM_RMS_EPS: config.rms_norm_eps,
        keys.ROPE_FREQ_BASE: config.rope_theta,
        keys.ROPE_DIMENSION_COUNT: config.head_dim,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        metadata |= {keys.KEY_LENGTH: config.head_dim, keys.VALUE_LENGTH: config.head_dim}
    if config.rope_linear_factor is not None:
        metadata |= {keys.ROPE_SCALING_TYPE: "linear", keys.ROPE_SCALING_FACTOR: config.rope_linear_factor}
    return metadata
