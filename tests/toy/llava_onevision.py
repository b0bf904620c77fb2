"""Random LLaVA-OneVision checkpoints: configuration files.

`checkpoint.py` draws and writes them; the tensors are LLaVA-NeXT's. Field names are Hugging Face's; the template is
ours and behaves like the published one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.toy.language import ToyTokenizer
    from tests.toy.spec import CheckpointSpec

Json = dict[str, Any]

VIDEO = "<video>"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# Each turn is framed; a message has all its images first, then all videos, then the texts.
TEMPLATE = """\
{%- for message in messages -%}
{{ '<|start_of_role|>' + message['role'] + '\\n' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'video') -%}{{ '<video>\\n' }}{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] }}{%- endfor -%}
{{ '<|end_of_role|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant\\n' }}{%- endif -%}
"""
# Sizes by preset.
TEXT: Json = {"text_type": "qwen2", "rope_theta": 1e6, "context": 32768}
ONEVISION: dict[str, Json] = {
    # a 3x3 grid of patches, which cannot be halved evenly; from 16 tiles on there are too many image tokens
    "tiny-onevision": {
        **TEXT,
        "text_layers": 4,
        "unused_rows": 5,
        "vision_hidden": 96,
        "vision_ffn": 136,
        "tile_px": 42,
        "patch_px": 14,
    },
    # the published tile geometry and token counts, small widths
    "tiny-onevision-real-tiles": {
        **TEXT,
        "text_layers": 2,
        "vision_hidden": 48,
        "vision_heads": 2,
        "vision_ffn": 72,
        "vision_layers": 2,
        "tile_px": 384,
        "patch_px": 14,
        "naming": "old",
    },
    # the sizes of the smallest published model
    "full-onevision-0.5b": {
        **TEXT,
        "text_hidden": 896,
        "text_layers": 24,
        "text_heads": 14,
        "text_kv_heads": 2,
        "text_ffn": 4864,
        "rms_norm_eps": 1e-6,
        "n_bpe": 151626,
        "unused_rows": 352,
        "embedding_std": 0.1,
        "vision_hidden": 1152,
        "vision_layers": 26,
        "vision_heads": 16,
        "vision_ffn": 4304,
        "tile_px": 384,
        "patch_px": 14,
        "naming": "old",
        "dtype": "bfloat16",
    },
}
# The larger models: the same tower, other text sizes, and an untied head.
ONEVISION["full-onevision-7b"] = {
    **ONEVISION["full-onevision-0.5b"],
    "text_hidden": 3584,
    "text_layers": 28,
    "text_heads": 28,
    "text_kv_heads": 4,
    "text_ffn": 18944,
    "unused_rows": 480,
    "tied": False,
}
ONEVISION["full-onevision-72b"] = {
    **ONEVISION["full-onevision-7b"],
    "text_hidden": 8192,
    "text_layers": 80,
    "text_heads": 64,
    "text_kv_heads": 8,
    "text_ffn": 29568,
}


def llava_onevision_config(spec: CheckpointSpec, tokenizer: ToyTokenizer, text_config: Json) -> Json:
    """Returns config.json. Older spellings leave out fields for which transformers has a default, and tie the head in
    `text_config`."""
    config: Json = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "dtype" if spec.naming == "v5" else "torch_dtype": spec.dtype,
        "image_token_index": tokenizer.image_id,
        "video_token_index": tokenizer.video_id,
        "image_grid_pinpoints": spec.grid_pinpoints,
        "vision_aspect_ratio": f"anyres_max_{spec.max_tiles_of_tokens}",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": spec.tied and spec.naming == "v5",
        "text_config": text_config,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": spec.vision_hidden,
            "intermediate_size": spec.vision_ffn,
            "num_hidden_layers": spec.vision_layers,
            "num_attention_heads": spec.vision_heads,
            "image_size": spec.tile_px,
            "patch_size": spec.patch_px,
            "vision_use_head": False,
        },
    }
    if spec.feature_layers != (-1,):
        config["vision_feature_layer"] = list(spec.feature_layers)
    if spec.naming == "v5":
        config |= {"vision_feature_select_strategy": "full", "multimodal_projector_bias": True}
    return config


def llava_onevision_preprocessor(spec: CheckpointSpec) -> Json:
    """Returns preprocessor_config.json. The mean differs by channel: squares are padded with a colour, not with
    grey."""
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "size": {"height": spec.tile_px, "width": spec.tile_px},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": MEAN,
        "image_std": STD,
        "image_grid_pinpoints": spec.grid_pinpoints,
    }


def llava_onevision_processor(spec: CheckpointSpec) -> Json:
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (spec.tile_px // spec.patch_px) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": f"anyres_max_{spec.max_tiles_of_tokens}",
        "image_token": "<image>",
        "video_token": VIDEO,
    }
