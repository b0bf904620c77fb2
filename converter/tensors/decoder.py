"""The tensors of a llama-style decoder. Every supported text architecture is one.

Names: transformers 5.23 `models/llama`, `granite`, `granitemoehybrid`, `mistral` and `qwen2`, and llama.cpp's
`src/llama-arch.cpp`. `experts.py` has the feed-forward networks of layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from granite4v import gguf_keys as keys
from granite4v.converter.tensors.experts import dense, routed
from granite4v.converter.tensors.rules import DropRule, TensorGroup, TensorRule, at_layer, each_layer
from granite4v.families.text_config import TextConfig

# Every prefix of the decoder's tensors found in checkpoints, the current one first. Adapters that were trained on only
# the text model and text-only checkpoints have the last one.
PREFIXES = ("model.language_model.", "language_model.model.", "model.language_model.model.", "model.")
HEAD_PREFIXES = ("", "language_model.", "model.language_model.", "model.")
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
INV_FREQ_REASON = "rotary frequencies, computed from the configuration"


def decoder_tensors(config: TextConfig, tied: bool) -> tuple[TensorGroup, ...]:
    """All tensors of the text file. `tied`: the output head is the token embedding."""
    hidden = config.hidden_size
    return (
        TensorGroup(
            prefixes=PREFIXES,
            rules=(
                _embedding(config),
                *_layers(config),
                TensorRule("norm.weight", keys.OUTPUT_NORM, (hidden,)),
                *_rope_factors(config),
            ),
            drops=_saved_frequencies(config.layers or range(config.num_hidden_layers)),
        ),
        TensorGroup(
            prefixes=HEAD_PREFIXES,
            rules=() if tied else (TensorRule(HEAD, keys.OUTPUT, (config.vocab_size, hidden)),),
            drops=(DropRule(HEAD, "equal to the token embedding, to which it is tied"),) if tied else (),
        ),
    )


def _embedding(config: TextConfig) -> TensorRule:
    n_vocab, more = config.vocab_size, config.embedding_rows
    shape = (n_vocab + more, config.hidden_size)
    return TensorRule(EMBEDDING, keys.TOKEN_EMBD, shape, rows=(0, n_vocab) if more else None)


def _layers(config: TextConfig) -> tuple[TensorRule, ...]:
    n_layers, experts = config.num_hidden_layers, config.experts
    attention = _attention(config)
    if experts is None:
        return each_layer(n_layers, *attention, *_feed_forward(config), held=config.layers or ())
    hidden, ffn = config.hidden_size, config.intermediate_size
    networks = [routed(experts, hidden) if experts.at(i) else dense(hidden, ffn) for i in range(n_layers)]
    return tuple(rule for i, network in enumerate(networks) for rule in at_layer(i, *attention, *network))


def _attention(config: TextConfig) -> list[TensorRule]:
    """The attention and both norms of one layer, with `{i}` for its number.

    transformers always rotates row i of a head together with row i + n/2. If llama.cpp's rotary embedding of the
    architecture rotates adjacent rows instead, the rows of query and key are reordered, so that the same pairs are
    rotated. The dot products of queries and keys do not depend on the order of a head's rows.
    """
    hidden, dim = config.hidden_size, config.head_dim
    n_q, n_kv = config.num_attention_heads, config.num_key_value_heads
    q, kv = n_q * dim, n_kv * dim
    q_pairs, k_pairs = (n_q, n_kv) if config.rope_pairs else (0, 0)
    at, block = "layers.{i}.self_attn.", _block
    rules = [
        TensorRule("layers.{i}.input_layernorm.weight", block("attn_norm.weight"), (hidden,)),
        TensorRule(f"{at}q_proj.weight", block("attn_q.weight"), (q, hidden), rope_heads=q_pairs),
        TensorRule(f"{at}k_proj.weight", block("attn_k.weight"), (kv, hidden), rope_heads=k_pairs),
        TensorRule(f"{at}v_proj.weight", block("attn_v.weight"), (kv, hidden)),
        TensorRule(f"{at}o_proj.weight", block("attn_output.weight"), (hidden, q)),
        TensorRule("layers.{i}.post_attention_layernorm.weight", block("ffn_norm.weight"), (hidden,)),
    ]
    if config.attention_bias:
        rules += [
            TensorRule(f"{at}q_proj.bias", block("attn_q.bias"), (q,), rope_heads=q_pairs),
            TensorRule(f"{at}k_proj.bias", block("attn_k.bias"), (kv,), rope_heads=k_pairs),
            TensorRule(f"{at}v_proj.bias", block("attn_v.bias"), (kv,)),
        ]
    if config.output_bias:
        rules.append(TensorRule(f"{at}o_proj.bias", block("attn_output.bias"), (hidden,)))
    return rules


def _feed_forward(config: TextConfig) -> list[TensorRule]:
    """Gate, up and down of one layer. In some checkpoints, gate and up are one fused matrix, gate first."""
    hidden, ffn, block = config.hidden_size, config.intermediate_size, _block
    if config.fused_mlp:
        both = "layers.{i}.shared_mlp.input_linear.weight"
        rules = [
            TensorRule(both, block("ffn_gate.weight"), (2 * ffn, hidden), rows=(0, ffn)),
            TensorRule(both, block("ffn_up.weight"), (2 * ffn, hidden), rows=(ffn, 2 * ffn)),
            TensorRule("layers.{i}.shared_mlp.output_linear.weight", block("ffn_down.weight"), (hidden, ffn)),
        ]
    else:
        rules = [
            TensorRule("layers.{i}.mlp.gate_proj.weight", block("ffn_gate.weight"), (ffn, hidden)),
            TensorRule("layers.{i}.mlp.up_proj.weight", block("ffn_up.weight"), (ffn, hidden)),
            TensorRule("layers.{i}.mlp.down_proj.weight", block("ffn_down.weight"), (hidden, ffn)),
        ]
    if config.mlp_bias:
        rules += [
            TensorRule("layers.{i}.mlp.gate_proj.bias", block("ffn_gate.bias"), (ffn,)),
            TensorRule("layers.{i}.mlp.up_proj.bias", block("ffn_up.bias"), (ffn,)),
            TensorRule("layers.{i}.mlp.down_proj.bias", block("ffn_down.bias"), (hidden,)),
        ]
    return rules


def _block(part: str) -> str:
    return keys.TEXT_BLOCK.replace("{part}", part)


def _rope_factors(config: TextConfig) -> tuple[TensorRule, ...]:
    if config.rope_factors is None:
        return ()
    shape = (len(config.rope_factors),)
    return (TensorRule("factors of the rotary frequencies", keys.ROPE_FREQS, shape, values=config.rope_factors),)


def _saved_frequencies(held: Sequence[int]) -> tuple[DropRule, ...]:
    """Rotary frequencies that older versions of transformers saved."""
    layers = (DropRule(f"layers.{i}.self_attn.rotary_emb.inv_freq", INV_FREQ_REASON) for i in held)
    return (DropRule("rotary_emb.inv_freq", INV_FREQ_REASON), *layers)
