"""Maps a checkpoint's `text_config` to the GGUF architecture that llama.cpp computes.

`text_config.py` has the code that all decoders share, `llama4_text.py` the decoder with experts.

There is one `TextArchitecture` per GGUF architecture and way to read its configuration. Names and defaults:
transformers 5.23 `models/granite*`, `llama`, `mistral` and `qwen2`; llama.cpp's `src/models`, `src/llama-arch.cpp` and
the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError
from granite4v.families.hf_fields import MAX_FACTOR, MAX_POSITIONS, MAX_WIDTH, Fields, Json
from granite4v.families.llama4_text import LLAMA4_DEFAULTS, llama4_config, llama4_metadata
from granite4v.families.text_config import TextArchitecture, TextConfig, common_metadata, n_text_layers, sizes

# Defaults of fields that a text_config may leave out, as published checkpoints do, by its model_type.
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
    "granite4_vision_text": _LLAMA_DEFAULTS,
    "granitemoehybrid": {**_LLAMA_DEFAULTS, "shared_intermediate_size": 1024},
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
    "mllama_text_model": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "cross_attention_layers": (3, 8, 13, 18, 23, 28, 33, 38),
    },
    "llama4_text": LLAMA4_DEFAULTS,
}


# model_type of the text model, by the outer `model_type`, for a config.json whose text_config names none.
UNNAMED = {"llava_next": "llama", "mllama": "mllama_text_model", "llava_onevision": "qwen2", "llama4": "llama4_text"}
MLLAMA_EMBEDDING_ROWS = 8  # beyond the vocabulary: transformers 5.24, `MllamaTextModel.embed_tokens`
TIED_BY_EITHER = ("llava_onevision",)
# Fields that granitemoehybrid has and granite lacks.
_HYBRID_FIELDS = ("shared_intermediate_size", "layer_types", "layers_block_type")


def text_section(config: Json) -> Fields:
    """The `text_config` of a config.json with defaults filled in, including `model_type`.

    Raises CheckpointError if there is none.
    """
    given = Fields(config).section("text_config")
    model_type = given.get("model_type")
    if model_type is None:
        model_type = UNNAMED.get(str(config.get("model_type")))
        if model_type is None:
            model_type = "granitemoehybrid" if any(key in given for key in _HYBRID_FIELDS) else "granite"
    elif not isinstance(model_type, str):
        raise given.error("model_type", "the name of a text model")
    values = {**DEFAULTS.get(model_type, {}), **given.values, "model_type": model_type}
    return Fields(values, given.file, given.path)


def text_architecture(text: Fields) -> TextArchitecture:
    """The architecture of a `text_config`; raises CheckpointError if none is known."""
    model_type = text.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.hf_model_types:
            return architecture
    known = ", ".join(repr(name) for architecture in ARCHITECTURES for name in architecture.hf_model_types)
    raise CheckpointError(f"text_config has model_type {model_type!r}; the text models that convert are {known}.")


# --- granite ---


def _granite_config(text: Fields, tensor_names: Iterable[str]) -> TextConfig:
    """Reads the sizes of a `granite`, or of a `granitemoehybrid` whose layers are all dense attention layers.

    Only the checkpoint's tensor names show whether gate and up projections are fused.
    """
    hybrid = text.get("model_type") == "granitemoehybrid"
    names = list(tensor_names)
    if hybrid:
        _check_dense_attention(text, names)
    bias = text.flag("attention_bias", False)
    return TextConfig(
        **sizes(text, "shared_intermediate_size" if hybrid else "intermediate_size"),
        # granitemoehybrid has a rotary embedding only if position_embedding_type is 'rope'; granite always has one
        rotary=not hybrid or text.get("position_embedding_type") == "rope",
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=text.flag("mlp_bias", False),
        fused_mlp=any("shared_mlp.input_linear" in name for name in names),
    )


def _granite_metadata(config: TextConfig, text: Fields) -> dict[str, Any]:
    return {
        **common_metadata(config),
        # as in transformers, llama.cpp divides the logits by logit_scale and multiplies by the other scales
        keys.ATTENTION_SCALE: text.number("attention_multiplier", 0, MAX_FACTOR, 1.0),
        keys.EMBEDDING_SCALE: text.number("embedding_multiplier", 0, MAX_FACTOR, 1.0),
        keys.RESIDUAL_SCALE: text.number("residual_multiplier", 0, MAX_FACTOR, 1.0),
        keys.LOGIT_SCALE: logits_scaling(text),
        # llama.cpp's granite uses this key to turn the rotary embedding on or off
        keys.ROPE_SCALING_FINETUNED: config.rotary,
    }


def logits_scaling(text: Fields) -> float:
    """The divisor of a granite's logits."""
    return text.number("logits_scaling", 0, MAX_FACTOR, 1.0, positive=True)


# --- llama (also mistral) and qwen2 ---


def _llama_config(text: Fields, tensor_names: Iterable[str]) -> TextConfig:
    bias = text.flag("attention_bias", False)
    return _plain_config(text, _window(text), bias=bias, output_bias=bias)


def _mllama_config(text: Fields, tensor_names: Iterable[str]) -> TextConfig:
    """Reads the self-attention layers, which by themselves are a llama. The embedding has extra rows for image tokens,
    the output head has none."""
    cross = cross_attention_layers(text)
    own = tuple(i for i in range(n_text_layers(text)) if i not in cross)
    if not own:
        raise text.error("cross_attention_layers", "at least one decoder layer of self-attention")
    config = _plain_config(text, None, bias=False, output_bias=False)
    return replace(config, num_hidden_layers=len(own), layers=own, embedding_rows=MLLAMA_EMBEDDING_ROWS)


def cross_attention_layers(text: Fields) -> tuple[int, ...]:
    """The decoder layers that attend to images, ascending; raises CheckpointError."""
    layers = text.integers("cross_attention_layers", 0, n_text_layers(text) - 1)
    if not layers or len(set(layers)) != len(layers):
        raise text.error("cross_attention_layers", "a list of different layers, at least one")
    return tuple(sorted(layers))


def _qwen2_config(text: Fields, tensor_names: Iterable[str]) -> TextConfig:
    """Reads the sizes of a qwen2: query, key and value always have a bias, the output never, and the rotary embedding
    rotates the two halves of a head."""
    window = _window(text) if text.flag("use_sliding_window", False) else None
    config = _plain_config(text, window, bias=True, output_bias=False, rope_pairs=False)
    if config.rope_factors is not None:
        raise CheckpointError(
            "text_config has rope type 'llama3' and model_type 'qwen2'; llama.cpp's 'qwen2' has no such frequencies."
        )
    return config


def _window(text: Fields) -> int | None:
    """The number of tokens that each token attends to; None for all."""
    return text.integer("sliding_window", 1, MAX_POSITIONS) if text.get("sliding_window") else None


def _plain_config(
    text: Fields, window: int | None, *, bias: bool, output_bias: bool, rope_pairs: bool = True
) -> TextConfig:
    """Reads the sizes of a plain decoder. `window`: the number of tokens that each token attends to. In llama.cpp's
    architectures a token attends to all, so the context is limited to the window."""
    found = sizes(text, "intermediate_size")
    if window:
        found["max_position_embeddings"] = min(found["max_position_embeddings"], window)
    return TextConfig(
        **found,
        rope_pairs=rope_pairs,
        rotary=True,
        attention_bias=bias,
        output_bias=output_bias,
        mlp_bias=text.flag("mlp_bias", False),
    )


def _plain_metadata(config: TextConfig, text: Fields) -> dict[str, Any]:
    return common_metadata(config)


# --- what config.json says in addition to the sizes ---


def is_tied(config: Json, text: Fields) -> bool:
    """Whether config.json ties the output head to the token embedding.

    As in transformers, the outer configuration takes precedence over text_config; for some types either suffices.
    """
    inner = text.flag("tie_word_embeddings", False)
    outer = Fields(config).flag("tie_word_embeddings", inner)
    return outer or (inner and config.get("model_type") in TIED_BY_EITHER)


def _check_dense_attention(text: Fields, tensor_names: Collection[str]) -> None:
    """Raises CheckpointError for layers that are not attention, and for experts.

    Tensor names replace missing fields: transformers' defaults (eight experts, no attention layers) describe another
    model than a checkpoint that leaves the fields out and has neither Mamba layers nor experts.
    """
    name = "layer_types" if "layer_types" in text else "layers_block_type"
    layers = text.get(name)
    if layers is None:
        mamba = any(".mamba." in tensor for tensor in tensor_names)
        layers = ["mamba" if mamba else "attention"] * n_text_layers(text)
    if not isinstance(layers, list):
        raise text.error(name, f"a list of {n_text_layers(text)} layer types")
    others = sorted({str(kind) for kind in layers if kind not in ("attention", "full_attention")})
    if others:
        raise CheckpointError(
            f"text_config is a granitemoehybrid with layer types {others}; only models whose layers are all "
            "'attention' convert."
        )
    if len(layers) != n_text_layers(text):
        raise text.error(name, f"a list of {n_text_layers(text)} layer types")
    experts = any("block_sparse_moe" in tensor for tensor in tensor_names)
    n_experts = text.integer("num_local_experts", 0, MAX_WIDTH, 8 if experts else 0)
    if n_experts:
        raise CheckpointError(f"text_config is a granitemoehybrid with {n_experts} experts; only dense models convert.")


ARCHITECTURES = (
    TextArchitecture(
        arch="granite",
        hf_model_types=("granite4_vision_text", "granite", "granitemoehybrid"),
        config=_granite_config,
        metadata=_granite_metadata,
    ),
    TextArchitecture(
        arch="llama",
        hf_model_types=("llama", "mistral"),
        config=_llama_config,
        metadata=_plain_metadata,
    ),
    TextArchitecture(
        arch="qwen2",
        hf_model_types=("qwen2",),
        config=_qwen2_config,
        metadata=_plain_metadata,
    ),
    TextArchitecture(
        arch="llama",
        hf_model_types=("mllama_text_model",),
        config=_mllama_config,
        metadata=_plain_metadata,
    ),
    TextArchitecture(
        arch="llama4",
        hf_model_types=("llama4_text",),
        config=llama4_config,
        metadata=llama4_metadata,
    ),
)
