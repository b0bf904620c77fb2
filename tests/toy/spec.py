"""Specifications of random checkpoints: sizes, injection map, and configuration files.

`checkpoint.py` writes them. Field values are ours; field names are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.toy.llama4 import LLAMA4, llama4_config, llama4_preprocessor
from tests.toy.llava_next import llava_next_config, llava_next_preprocessor, llava_next_processor
from tests.toy.llava_onevision import (
    ONEVISION,
    llava_onevision_config,
    llava_onevision_preprocessor,
    llava_onevision_processor,
)
from tests.toy.mllama import MLLAMA, mllama_config, mllama_preprocessor

if TYPE_CHECKING:
    from tests.toy.language import ToyTokenizer

Json = dict[str, Any]
N_PINPOINT_TILES = 10  # every grid of up to ten tiles


@dataclass(frozen=True)
class CheckpointSpec:
    """One checkpoint: sizes, injection map, and how its files are spelled. The default is the tiny one."""

    family: str = "granite4_vision"  # or 'llava_next', 'llava_onevision', 'mllama', 'llama4'
    # text model
    text_type: str = "granite"  # 'granitemoehybrid': fused shared_mlp.input_linear; 'llama', 'mistral', 'qwen2'
    text_hidden: int = 64
    text_layers: int = 8
    text_heads: int = 4
    text_kv_heads: int = 2
    text_ffn: int = 176
    n_bpe: int = 384
    image_id: int | None = None
    tied: bool = True
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e7
    rope_scaling: tuple[tuple[str, str | float], ...] = ()  # for 'llama': the fields of config.json's object
    context: int = 131072
    vocabulary: str = "bytes"  # or 'sentencepiece'
    embedding_multiplier: float = 1.5
    attention_multiplier: float = 0.3
    residual_multiplier: float = 0.6
    logits_scaling: float = 2.0
    embedding_std: float = 0.5
    # vision tower; a head width of 48 and an FFN of 200 are no multiples of 32, like 72 and 4304
    vision_hidden: int = 192
    vision_layers: int = 4
    vision_heads: int = 4
    vision_ffn: int = 200
    vision_eps: float = 1e-6
    tile_px: int = 64
    patch_px: int = 8
    vision_head: bool = True  # a pooling head that nothing uses
    tower: str = "siglip"  # or 'clip': class token, norm before the layers, quick gelu
    # projectors and injection
    qformer_ffn: int = 128
    downsample_rate: str = "2/4"
    deepstack_layer_map: tuple[tuple[int, int], ...] = ((-3, 2), (-1, 0))
    spatial_vision_layer: int = -1
    spatial_target_layers: tuple[int, ...] = (3, 4, 5, 7)
    # llava_next and llava_onevision: one stream
    feature_layers: tuple[int, ...] = (-1,)
    projector_bias: bool = True
    max_tiles: int = N_PINPOINT_TILES
    # llava_onevision only
    max_tiles_of_tokens: int = 9
    unused_rows: int = 0  # rows of the vocabulary beyond the tokenizer's
    # mllama only
    cross_layers: tuple[int, ...] = ()
    global_layers: int = 0
    intermediate_layers: tuple[int, ...] = ()
    # llama4 only
    experts: int = 0
    experts_used: int = 1
    moe_step: int = 1  # every `moe_step`-th layer has experts
    dense_ffn: int = 0  # width of the layers without experts; `text_ffn` is that of one expert
    qk_norm: bool = True
    projector_width: int = 0
    # files
    naming: str = "v5"  # 'v5' as transformers 5 writes, 'v4' with vision_model, 'old' with language_model.model
    dtype: str = "float32"  # or 'bfloat16', 'float16'
    max_shard_bytes: int | None = None
    holes: bool = False  # weights are zeros in sparse files, which take no disk space
    template_in_config: bool = False
    template_file: str = "chat_template.jinja"  # or 'chat_template.json'
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.text_hidden // self.text_heads

    @property
    def grid_pinpoints(self) -> list[list[int]]:
        """(height, width) pairs in pixels: every grid of at most `max_tiles` tiles; for llava_onevision, 1x1 to 6x6."""
        if self.family == "llava_onevision":
            return [[h * self.tile_px, w * self.tile_px] for h in range(1, 7) for w in range(1, 7)]
        sides = range(1, self.max_tiles + 1)
        return [[h * self.tile_px, w * self.tile_px] for h in sides for w in sides if h * w <= self.max_tiles]


# Common to several presets: tiny ones with a CLIP tower and SentencePiece, and those of the published sizes.
CLIP = CheckpointSpec(
    family="llava_next",
    vocabulary="sentencepiece",
    tower="clip",
    vision_hidden=64,
    vision_ffn=136,
    tile_px=56,
    patch_px=14,
    max_tiles=4,
    feature_layers=(-2,),
    text_layers=4,
    tied=False,
)
FULL = CheckpointSpec(
    text_layers=40,
    text_kv_heads=8,
    text_ffn=8192,
    embedding_multiplier=12.0,
    attention_multiplier=0.015625,
    residual_multiplier=0.22,
    embedding_std=0.1,
    vision_hidden=1152,
    vision_layers=27,
    vision_heads=16,
    vision_ffn=4304,
    tile_px=384,
    naming="v4",
    dtype="bfloat16",
    max_shard_bytes=4_000_000_000,
)

PRESETS: dict[str, CheckpointSpec] = {
    "tiny": CheckpointSpec(),
    # the published tile geometry and token counts, small widths
    "tiny-real-tiles": CheckpointSpec(
        tile_px=384, patch_px=16, downsample_rate="4/8", deepstack_layer_map=((-4, 6), (-3, 2), (-2, 1), (-1, 0))
    ),
    # text widths that are multiples of 256, so that K-quants apply
    "tiny-wide": CheckpointSpec(
        text_hidden=256,
        text_ffn=512,
        text_heads=4,
        text_kv_heads=2,
        attention_multiplier=0.15,
        embedding_std=0.25,
    ),
    # eight streams in the published order; as many tower layers as streams, which llama.cpp's converter needs
    "tiny-published": CheckpointSpec(
        vision_layers=8,
        text_layers=12,
        deepstack_layer_map=((-7, 5), (-5, 3), (-3, 1), (-1, 0)),
        spatial_target_layers=(6, 7, 8, 10),
        naming="v4",
    ),
    # Granite text, concatenated hidden states, a tile of 3.5 patches, heads of 24
    "tiny-granite-3.3": CheckpointSpec(
        family="llava_next",
        vision_hidden=96,
        vision_ffn=136,
        vision_layers=5,
        tile_px=56,
        patch_px=16,
        feature_layers=(-5, -4, -2, -1),
        text_layers=4,
        naming="v4",
    ),
    # the published tile geometry and token counts, small widths
    "tiny-granite-3.3-real-tiles": CheckpointSpec(
        family="llava_next",
        vision_hidden=48,
        vision_heads=2,
        vision_ffn=72,
        vision_layers=5,
        tile_px=384,
        patch_px=14,
        feature_layers=(-5, -4, -2, -1),
        text_layers=2,
        naming="v4",
    ),
    "tiny-clip-llama": replace(
        CLIP,
        text_type="llama",
        rope_theta=1e4,
        context=4096,
        naming="old",
        template_file="chat_template.json",
    ),
    "tiny-clip-mistral": replace(
        CLIP,
        text_type="mistral",
        rope_theta=1e6,
        context=32768,
        naming="v4",
        template_in_config=True,
    ),
    "tiny-siglip-qwen2": CheckpointSpec(
        family="llava_next",
        text_type="qwen2",
        vision_hidden=96,
        vision_ffn=136,
        tile_px=56,
        patch_px=14,
        max_tiles=4,
        feature_layers=(-1, 1),
        projector_bias=False,
        text_layers=4,
        rope_theta=1e6,
        context=32768,
    ),
    "full-granite-3.3": replace(
        FULL,
        family="llava_next",
        text_hidden=2048,
        text_heads=32,
        n_bpe=49134,  # 49156 with the special ones, <image> last
        logits_scaling=8.0,
        patch_px=14,
        feature_layers=(-24, -20, -12, -1),
    ),
    "full-4.1": replace(
        FULL,
        text_hidden=2560,
        text_heads=40,
        n_bpe=100256,
        image_id=100352,
        logits_scaling=10.0,
        patch_px=16,
        qformer_ffn=3072,
        downsample_rate="4/8",
        deepstack_layer_map=((-19, 9), (-13, 6), (-7, 3), (-1, 0)),
        spatial_target_layers=(12, 15, 18, 21),
    ),
    **{name: CheckpointSpec(family="llava_onevision", **fields) for name, fields in ONEVISION.items()},
    **{name: CheckpointSpec(family="mllama", **fields) for name, fields in MLLAMA.items()},
    **{name: CheckpointSpec(family="llama4", **fields) for name, fields in LLAMA4.items()},
}

CONFIGS = {  # config.json and preprocessor_config.json of families that have their own
    "llava_next": (llava_next_config, llava_next_preprocessor),
    "llava_onevision": (llava_onevision_config, llava_onevision_preprocessor),
    "mllama": (mllama_config, mllama_preprocessor),
    "llama4": (llama4_config, llama4_preprocessor),
}

# Values of `deepstack_layer_map` and related fields that llama.cpp's converter pairs wrongly or refuses.
MAPPING_CASES: dict[str, CheckpointSpec] = {
    "unsorted": replace(PRESETS["tiny"], deepstack_layer_map=((-2, 2), (-4, 0), (-3, 1))),
    "nothing-at-layer-0": replace(PRESETS["tiny"], deepstack_layer_map=((-3, 2), (-1, 1))),
    "non-negative": replace(PRESETS["tiny"], deepstack_layer_map=((0, 2), (3, 0)), spatial_vision_layer=2),
    "layer-named-twice": replace(PRESETS["tiny"], deepstack_layer_map=((-3, 2), (-1, 0), (-2, 2), (-4, 5))),
}


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter for the language model, in PEFT's files."""

    rank: int = 4
    alpha: float = 6.0
    use_rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    base_model_name_or_path: str = ""
    share_gate_up: bool = False  # one A for gate and up, so that a dense model with this adapter equals the fused one
    dtype: str = "float32"
    seed: int = 1


def model_config(spec: CheckpointSpec, tokenizer: ToyTokenizer) -> Json:
    """Returns config.json with the fields of the transformers version that `spec.naming` selects."""
    if spec.family in CONFIGS:
        return CONFIGS[spec.family][0](spec, tokenizer, _text_config(spec, tokenizer))
    return {
        "architectures": ["Granite4VisionForConditionalGeneration"],
        "model_type": "granite4_vision",
        "dtype" if spec.naming == "v5" else "torch_dtype": spec.dtype,
        "image_token_index": tokenizer.image_id,
        "image_grid_pinpoints": spec.grid_pinpoints,
        "downsample_rate": spec.downsample_rate,
        "deepstack_layer_map": [list(pair) for pair in spec.deepstack_layer_map],
        "spatial_vision_layer": spec.spatial_vision_layer,
        "spatial_target_layers": list(spec.spatial_target_layers),
        "vision_feature_select_strategy": "full",
        "projector_dropout": 0.1,
        "tie_word_embeddings": spec.tied,
        "text_config": _text_config(spec, tokenizer),
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": spec.vision_hidden,
            "intermediate_size": spec.vision_ffn,
            "num_hidden_layers": spec.vision_layers,
            "num_attention_heads": spec.vision_heads,
            "num_channels": 3,
            "image_size": spec.tile_px,
            "patch_size": spec.patch_px,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": spec.vision_eps,
            "attention_dropout": 0.0,
            "vision_use_head": spec.vision_head,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": spec.vision_hidden,
            "encoder_hidden_size": spec.vision_hidden,
            "num_attention_heads": spec.vision_hidden // 64,
            "num_hidden_layers": 1,
            "intermediate_size": spec.qformer_ffn,
            "cross_attention_frequency": 1,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 2048,
            "use_qformer_text_input": False,
        },
    }


def _text_config(spec: CheckpointSpec, tokenizer: ToyTokenizer) -> Json:
    config: Json = {
        "hidden_size": spec.text_hidden,
        "intermediate_size": spec.text_ffn,
        "num_hidden_layers": spec.text_layers,
        "num_attention_heads": spec.text_heads,
        "num_key_value_heads": spec.text_kv_heads,
        "vocab_size": tokenizer.n_vocab + spec.unused_rows,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "max_position_embeddings": spec.context,
        "embedding_multiplier": spec.embedding_multiplier,
        "attention_multiplier": spec.attention_multiplier,
        "residual_multiplier": spec.residual_multiplier,
        "logits_scaling": spec.logits_scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.end_of_text_id,
        "pad_token_id": tokenizer.pad_id,
    }
    if spec.text_type == "granitemoehybrid":
        return config | {
            "model_type": "granitemoehybrid",
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "layer_types": ["attention"] * spec.text_layers,
            "position_embedding_type": "rope",
            "shared_intermediate_size": spec.text_ffn,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "rope_theta": spec.rope_theta,
        }
    if spec.text_type != "granite":
        for key in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"):
            del config[key]
        if spec.text_type == "mistral":
            config["sliding_window"] = None
        config["model_type"] = spec.text_type
    else:
        own = spec.family == "granite4_vision" and spec.naming == "v5"
        config["model_type"] = "granite4_vision_text" if own else "granite"
    scaling = dict(spec.rope_scaling) or None
    if spec.naming == "v5":
        return config | {"rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": spec.rope_theta}}
    architecture = {
        "granite": "Granite",
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "llama4_text": "Llama4",
    }.get(spec.text_type, "Mllama")
    return config | {
        "architectures": [f"{architecture}ForCausalLM"],
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling,
    }


def adapter_config(adapter: AdapterSpec, modules: Sequence[str]) -> Json:
    """Returns the adapter_config.json of an adapter on these modules of the language model."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "use_dora": False,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
        "target_modules": rf".*language_model.*\.({'|'.join(modules)})",
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def preprocessor_config(spec: CheckpointSpec) -> Json:
    if spec.family in CONFIGS:
        return CONFIGS[spec.family][1](spec)
    side = {"height": spec.tile_px, "width": spec.tile_px}
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "Granite4VisionProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "size": side,
        "crop_size": side,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_grid_pinpoints": spec.grid_pinpoints,
    }


def processor_config(spec: CheckpointSpec) -> Json:
    if spec.family == "llava_next":
        return llava_next_processor(spec)
    if spec.family == "llava_onevision":
        return llava_onevision_processor(spec)
    if spec.family == "mllama":
        return {"processor_class": "MllamaProcessor"}
    if spec.family == "llama4":
        return {"processor_class": "Llama4Processor", "patch_size": spec.patch_px, "pixel_shuffle_ratio": 0.5}
    return {
        "processor_class": "Granite4VisionProcessor",
        "patch_size": spec.patch_px,
        "downsample_rate": spec.downsample_rate,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
        "image_token": "<image>",
    }
