"""Random Llama 4 checkpoints: configuration files, tensors, and the tokens around an image's tiles.

`checkpoint.py` draws and writes them. Field names and tensor names are Hugging Face's; the tensor names are the same in
every version. The template is ours; with images it behaves like the published one.
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

# Names in a published vocabulary for tokens of the toy vocabulary.
RENAMED = {
    "<image>": "<|patch|>",
    "<|fill_0|>": "<|image_start|>",
    "<|fill_1|>": "<|image_end|>",
    "<|fill_2|>": "<|tile_x_separator|>",
    "<|fill_3|>": "<|tile_y_separator|>",
    "<|fill_4|>": "<|image|>",
}
# The pattern of o200k tokenizers.
LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
SPLIT_PATTERN = (
    LETTERS + r"*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    "" + LETTERS + r"+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = template(r"\n\n")
STEP = tuple((key, 1.0 if "freq" in key else value) for key, value in SCALED)  # as in the published checkpoint
SIZES: Json = {
    "text_type": "llama4_text",
    "text_ffn": 48,
    "dense_ffn": 80,
    "experts": 4,
    "moe_step": 2,
    "tied": False,
    "rope_theta": 5e5,
    "rope_scaling": SCALED,
    "context": 32768,
    "vision_hidden": 64,
    "vision_ffn": 256,
    "vision_layers": 3,
    "vision_heads": 4,
    "vision_eps": 1e-5,
    "tile_px": 56,
    "patch_px": 14,
    "projector_width": 96,
}
# Sizes by preset.
LLAMA4: dict[str, Json] = {
    "tiny-llama4": SIZES,
    # experts in every layer, two of them active, and the spelling of published checkpoints
    "tiny-llama4-scout": {**SIZES, "moe_step": 1, "experts_used": 2, "rope_scaling": STEP, "naming": "old"},
    # with this number of experts llama.cpp leaves out the norm of queries and keys
    "tiny-llama4-maverick": {**SIZES, "experts": 128, "qk_norm": False, "rope_scaling": ()},
    # widths that are multiples of 256, so that K-quants apply
    "tiny-llama4-wide": {**SIZES, "text_hidden": 256, "text_ffn": 512, "dense_ffn": 768},
    # four of Scout's 48 layers at its widths: 22 GB
    "full-llama4-4-layers": {
        **SIZES,
        "text_layers": 4,
        "moe_step": 1,
        "text_hidden": 5120,
        "text_heads": 40,
        "text_kv_heads": 8,
        "text_ffn": 8192,
        "dense_ffn": 16384,
        "experts": 16,
        "n_bpe": 202026,
        "rope_scaling": (*STEP[:-1], ("original_max_position_embeddings", 8192)),
        "context": 131072,
        "naming": "old",
        "dtype": "bfloat16",
    },
}


def llama4_tokenizer(tokenizer: ToyTokenizer) -> ToyTokenizer:
    """Returns the tokenizer with the tokens around an image's tiles, and with Llama 4's split pattern."""
    content = copy.deepcopy(tokenizer.tokenizer_json)
    for entry in content["added_tokens"]:
        entry["content"] = RENAMED.get(entry["content"], entry["content"])
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": SPLIT_PATTERN}
    return dataclasses.replace(tokenizer, tokenizer_json=content)


def llama4_config(spec: CheckpointSpec, tokenizer: ToyTokenizer, text_config: Json) -> Json:
    """Returns config.json."""
    ids = {entry["content"]: entry["id"] for entry in tokenizer.tokenizer_json["added_tokens"]}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "dtype" if spec.naming == "v5" else "torch_dtype": spec.dtype,
        "boi_token_index": ids["<|image_start|>"],
        "eoi_token_index": ids["<|image_end|>"],
        "image_token_index": tokenizer.image_id,
        "tie_word_embeddings": spec.tied,
        "text_config": {
            **{key: value for key, value in text_config.items() if key != "mlp_bias"},
            "model_type": "llama4_text",
            "head_dim": spec.head_dim,
            "intermediate_size_mlp": spec.dense_ffn,
            "num_local_experts": spec.experts,
            "num_experts_per_tok": spec.experts_used,
            "interleave_moe_layer_step": spec.moe_step,
            "use_qk_norm": spec.qk_norm,
            "attention_chunk_size": 8192,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "attn_temperature_tuning": True,
        },
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": spec.vision_hidden,
            "intermediate_size": spec.vision_ffn,
            "num_hidden_layers": spec.vision_layers,
            "num_attention_heads": spec.vision_heads,
            "num_channels": 3,
            "image_size": spec.tile_px,
            "patch_size": spec.patch_px,
            "hidden_act": "gelu",
            "norm_eps": spec.vision_eps,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": spec.projector_width,
            "projector_output_dim": spec.projector_width,
            "vision_output_dim": spec.projector_width,
            "multi_modal_projector_bias": False,
            "vision_feature_select_strategy": "default",
            **({"rope_theta": 10000} if spec.naming == "old" else {"rope_parameters": _rope()}),
        },
    }


def _rope() -> Json:
    return {"rope_type": "default", "rope_theta": 10000.0}


def llama4_preprocessor(spec: CheckpointSpec) -> Json:
    """Returns preprocessor_config.json."""
    return {
        "image_processor_type": "Llama4ImageProcessorFast",
        "processor_class": "Llama4Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": spec.tile_px, "width": spec.tile_px},
        "max_patches": 16,
        "resize_to_max_canvas": False,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def llama4_tensors(spec: CheckpointSpec, n_vocab: int) -> Iterator[Drawn]:
    """Yields every tensor under its name in files."""
    yield from _text(spec, n_vocab)
    yield from _tower(spec)
    yield matrix("multi_modal_projector.linear_1.weight", spec.text_hidden, spec.projector_width)


def _text(spec: CheckpointSpec, n_vocab: int) -> Iterator[Drawn]:
    width, kv, ffn, n = spec.text_hidden, spec.text_kv_heads * spec.head_dim, spec.text_ffn, spec.experts
    text = "language_model.model."
    yield f"{text}embed_tokens.weight", (n_vocab, width), spec.embedding_std, "normal"
    for i in range(spec.text_layers):
        layer = f"{text}layers.{i}."
        yield f"{layer}input_layernorm.weight", (width,), 0.0, "norm"
        for part, n_out in (("q", width), ("k", kv), ("v", kv), ("o", width)):
            yield matrix(f"{layer}self_attn.{part}_proj.weight", n_out, width)
        yield f"{layer}post_attention_layernorm.weight", (width,), 0.0, "norm"
        if (i + 1) % spec.moe_step:
            yield from feed_forward(f"{layer}feed_forward.", spec.dense_ffn, width)
            continue
        yield matrix(f"{layer}feed_forward.router.weight", n, width)
        for part, n_in, n_out in (("gate_up_proj", width, 2 * ffn), ("down_proj", ffn, width)):
            yield f"{layer}feed_forward.experts.{part}", (n, n_in, n_out), 1.2 / math.sqrt(n_in), "normal"
        yield from feed_forward(f"{layer}feed_forward.shared_expert.", ffn, width)
    yield f"{text}norm.weight", (width,), 0.0, "norm"
    yield "language_model.lm_head.weight", (n_vocab, width), spec.embedding_std, "normal"


def _tower(spec: CheckpointSpec) -> Iterator[Drawn]:
    width, ffn, px, tower = spec.vision_hidden, spec.vision_ffn, spec.patch_px, "vision_model."
    yield matrix(f"{tower}patch_embedding.linear.weight", width, 3 * px * px)
    yield f"{tower}class_embedding", (width,), 1.0, "normal"
    yield f"{tower}positional_embedding_vlm", ((spec.tile_px // px) ** 2 + 1, width), 0.7, "normal"
    for which in ("pre", "post"):
        yield from layer_norm(f"{tower}layernorm_{which}", width)
    for i in range(spec.vision_layers):
        layer = f"{tower}model.layers.{i}."
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield from layer_norm(f"{layer}{part}", width)
        for part in ("q", "k", "v", "o"):
            yield from linear(f"{layer}self_attn.{part}_proj", width, width)
        yield from linear(f"{layer}mlp.fc1", ffn, width)
        yield from linear(f"{layer}mlp.fc2", width, ffn)
    yield matrix(f"{tower}vision_adapter.mlp.fc1.weight", spec.projector_width, 4 * width)
    yield matrix(f"{tower}vision_adapter.mlp.fc2.weight", spec.projector_width, spec.projector_width)
