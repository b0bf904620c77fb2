"""Random Mllama (Llama 3.2 Vision) checkpoints: configuration files, tensors, and the tokenizer's image token.

`checkpoint.py` draws and writes them. Field names are Hugging Face's; the template is ours and with images behaves like
the published one. Every gate is open.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.toy.llama3 import SCALED, Drawn, Json, feed_forward, layer_norm, linear, matrix, template

if TYPE_CHECKING:
    from tests.toy.language import ToyTokenizer
    from tests.toy.spec import CheckpointSpec

IMAGE = "<|image|>"
MORE_ROWS = 8  # of the embedding, beyond the vocabulary
MAX_TILES = 4
RATIOS = [[h, w] for h in range(1, 5) for w in range(1, 5) if h * w <= MAX_TILES]
TEMPLATE = template("")
SIZES: Json = {
    "text_type": "mllama_text_model",
    "text_ffn": 96,
    "tied": False,
    "rope_theta": 5e5,
    "rope_scaling": SCALED,
    "context": 4096,
    "vision_hidden": 32,
    "vision_ffn": 48,
    "vision_layers": 4,
    "vision_heads": 4,
    "vision_eps": 1e-5,
    "global_layers": 2,
    "intermediate_layers": (0, 1, 3),
    "tile_px": 56,
    "patch_px": 14,
}
# Sizes by preset.
MLLAMA: dict[str, Json] = {
    # cross-attention layers: isolated, in a row, and last
    "tiny-mllama": {**SIZES, "text_layers": 9, "cross_layers": (1, 3, 4, 8)},
    # cross-attention first, too, and the spelling of published checkpoints
    "tiny-mllama-first": {**SIZES, "text_layers": 6, "cross_layers": (0, 1, 4), "naming": "old"},
    # widths that are multiples of 256, so that K-quants apply
    "tiny-mllama-wide": {
        **SIZES,
        "text_layers": 5,
        "cross_layers": (1, 3),
        "text_hidden": 256,
        "text_ffn": 512,
        "vision_hidden": 64,
        "vision_ffn": 136,
    },
    # the sizes of the smaller published model, at 560 px
    "full-mllama-11b": {
        **SIZES,
        "text_layers": 40,
        "cross_layers": (3, 8, 13, 18, 23, 28, 33, 38),
        "text_hidden": 4096,
        "text_heads": 32,
        "text_kv_heads": 8,
        "text_ffn": 14336,
        "n_bpe": 128235,
        "rope_scaling": (*SCALED[:-1], ("original_max_position_embeddings", 8192)),
        "context": 131072,
        "vision_hidden": 1280,
        "vision_ffn": 5120,
        "vision_layers": 32,
        "vision_heads": 16,
        "global_layers": 8,
        "intermediate_layers": (3, 7, 15, 23, 30),
        "tile_px": 560,
        "naming": "old",
        "dtype": "bfloat16",
        "max_shard_bytes": 5_000_000_000,
    },
}


def mllama_tokenizer(tokenizer: ToyTokenizer) -> ToyTokenizer:
    """Returns the tokenizer with the image token outside the vocabulary, right after its end."""
    content = copy.deepcopy(tokenizer.tokenizer_json)
    for entry in content["added_tokens"]:
        if entry["id"] == tokenizer.image_id:
            entry["content"] = IMAGE
    return dataclasses.replace(tokenizer, tokenizer_json=content, n_vocab=tokenizer.image_id)


def mllama_config(spec: CheckpointSpec, tokenizer: ToyTokenizer, text_config: Json) -> Json:
    """Returns config.json."""
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "dtype" if spec.naming == "v5" else "torch_dtype": spec.dtype,
        "image_token_index": tokenizer.image_id,
        "tie_word_embeddings": spec.tied,
        "text_config": {
            **text_config,
            "model_type": "mllama_text_model",
            "cross_attention_layers": list(spec.cross_layers),
            "vocab_size": tokenizer.image_id,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": spec.vision_hidden,
            "intermediate_size": spec.vision_ffn,
            "num_hidden_layers": spec.vision_layers,
            "num_global_layers": spec.global_layers,
            "attention_heads": spec.vision_heads,
            "image_size": spec.tile_px,
            "patch_size": spec.patch_px,
            "hidden_act": "gelu",
            "norm_eps": spec.vision_eps,
            "max_num_tiles": MAX_TILES,
            "supported_aspect_ratios": RATIOS,
            "intermediate_layers_indices": list(spec.intermediate_layers),
            "vision_output_dim": spec.vision_hidden * (1 + len(spec.intermediate_layers)),
        },
    }


def mllama_preprocessor(spec: CheckpointSpec) -> Json:
    """Returns preprocessor_config.json."""
    return {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "size": {"height": spec.tile_px, "width": spec.tile_px},
        "max_image_tiles": MAX_TILES,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def mllama_tensors(spec: CheckpointSpec, n_vocab: int) -> Iterator[Drawn]:
    """Yields every tensor under its transformers 5 name."""
    yield from _text(spec, n_vocab)
    yield from _tower(spec)
    n_in = spec.vision_hidden * (1 + len(spec.intermediate_layers))
    yield matrix("model.multi_modal_projector.weight", spec.text_hidden, n_in)
    yield "model.multi_modal_projector.bias", (spec.text_hidden,), 0.3, "normal"


def _text(spec: CheckpointSpec, n_vocab: int) -> Iterator[Drawn]:
    width, kv, ffn = spec.text_hidden, spec.text_kv_heads * spec.head_dim, spec.text_ffn
    text = "model.language_model."
    yield f"{text}embed_tokens.weight", (n_vocab + MORE_ROWS, width), spec.embedding_std, "normal"
    for i in range(spec.text_layers):
        layer = f"{text}layers.{i}."
        cross = i in spec.cross_layers
        kind = "cross_attn" if cross else "self_attn"
        yield f"{layer}input_layernorm.weight", (width,), 0.0, "norm"
        for part, n_out in (("q", width), ("k", kv), ("v", kv), ("o", width)):
            yield matrix(f"{layer}{kind}.{part}_proj.weight", n_out, width)
        if cross:
            for part in ("q", "k"):
                yield f"{layer}cross_attn.{part}_norm.weight", (spec.head_dim,), 0.0, "norm"
            for part in ("attn", "mlp"):
                yield f"{layer}cross_attn_{part}_gate", (1,), 0.0, "gate"
        yield f"{layer}post_attention_layernorm.weight", (width,), 0.0, "norm"
        yield from feed_forward(f"{layer}mlp.", ffn, width)
    yield f"{text}norm.weight", (width,), 0.0, "norm"
    yield "lm_head.weight", (n_vocab, width), spec.embedding_std, "normal"


def _tower(spec: CheckpointSpec) -> Iterator[Drawn]:
    width, ffn, px, tower = spec.vision_hidden, spec.vision_ffn, spec.patch_px, "model.vision_model."
    n, n_ids = (spec.tile_px // px) ** 2 + 1, len(RATIOS) + 1
    yield f"{tower}patch_embedding.weight", (width, 3, px, px), 1.2 / math.sqrt(3 * px * px), "normal"
    yield f"{tower}class_embedding", (width,), 1.0, "normal"
    positions = f"{tower}gated_positional_embedding."
    yield f"{positions}gate", (1,), 0.0, "gate"
    yield f"{positions}embedding", (n, width), 0.7, "normal"
    yield f"{positions}tile_embedding.weight", (n_ids, MAX_TILES * n * width), 0.7, "normal"
    for which in ("pre", "post"):
        yield f"{tower}{which}_tile_positional_embedding.gate", (1,), 0.0, "gate"
        shape = (n_ids, MAX_TILES * width)
        yield f"{tower}{which}_tile_positional_embedding.embedding.weight", shape, 0.7, "normal"
        yield from layer_norm(f"{tower}layernorm_{which}", width)
    for room, n_layers in (("transformer", spec.vision_layers), ("global_transformer", spec.global_layers)):
        for i in range(n_layers):
            layer = f"{tower}{room}.layers.{i}."
            for part in ("input_layernorm", "post_attention_layernorm"):
                yield from layer_norm(f"{layer}{part}", width)
            for part in ("q", "k", "v", "o"):
                yield matrix(f"{layer}self_attn.{part}_proj.weight", width, width)
            yield from linear(f"{layer}mlp.fc1", ffn, width)
            yield from linear(f"{layer}mlp.fc2", width, ffn)
            if room == "global_transformer":
                yield f"{layer}gate_attn", (1,), 0.0, "gate"
                yield f"{layer}gate_ffn", (1,), 0.0, "gate"
