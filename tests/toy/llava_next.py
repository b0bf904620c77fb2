"""Random LLaVA-NeXT checkpoints, including Granite Vision 3.x: configuration files and tensors.

`checkpoint.py` draws and writes them. Field names are Hugging Face's; templates and vocabularies are ours and behave
like those of published models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

if TYPE_CHECKING:
    from tests.toy.language import ToyTokenizer
    from tests.toy.spec import CheckpointSpec

Json = dict[str, Any]

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

# Roles on lines of their own; no default system message.
granite4vTEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ '<|system|>\\n' + message.content[0].text + '\\n' }}
{%- elif message.role == 'user' -%}{{ '<|user|>\\n' }}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<image>\\n' }}{%- elif part.type == 'text' -%}{{ part.text + '\\n' }}{%- endif -%}
{%- endfor -%}
{%- else -%}{{ '<|assistant|>\\n' + message.content[0].text + eos_token + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""

# Instructions in brackets; all images of a message come before its texts.
BRACKETS_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}
{%- elif message['role'] == 'user' -%}{{ '[INST] ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] + ' ' }}{%- endfor -%}
{{ '[/INST]' }}
{%- else -%}{% generation %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
"""

# The names of both sides, with the system message unmarked before them.
NAMES_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'][0]['text'] + ' ' }}
{%- else -%}{{ message['role'].upper() + ': ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] + ' ' }}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
TEMPLATES = {
    "granite": granite4vTEMPLATE,
    "mistral": BRACKETS_TEMPLATE,
    "llama": NAMES_TEMPLATE,
    "qwen2": NAMES_TEMPLATE,
}


def select_strategy(spec: CheckpointSpec) -> str:
    return "default" if spec.tower == "clip" else "full"


def llava_next_config(spec: CheckpointSpec, tokenizer: ToyTokenizer, text_config: Json) -> Json:
    """Returns config.json. Older spellings leave out fields for which transformers has a default."""
    layer = list(spec.feature_layers) if len(spec.feature_layers) > 1 else spec.feature_layers[0]
    vision: Json = {
        "model_type": f"{spec.tower}_vision_model",
        "hidden_size": spec.vision_hidden,
        "intermediate_size": spec.vision_ffn,
        "num_hidden_layers": spec.vision_layers,
        "num_attention_heads": spec.vision_heads,
        "image_size": spec.tile_px,
        "patch_size": spec.patch_px,
    }
    if spec.tower == "siglip":
        vision["vision_use_head"] = spec.vision_head
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "dtype" if spec.naming == "v5" else "torch_dtype": spec.dtype,
        "image_token_index": tokenizer.image_id,
        "image_grid_pinpoints": spec.grid_pinpoints,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": select_strategy(spec),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": spec.projector_bias,
        "tie_word_embeddings": spec.tied,
        "text_config": text_config,
        "vision_config": vision,
    }


def llava_next_preprocessor(spec: CheckpointSpec) -> Json:
    """Returns preprocessor_config.json: for CLIP with the shortest edge as size and a crop, otherwise with height and
    width."""
    side = {"height": spec.tile_px, "width": spec.tile_px}
    clip = spec.tower == "clip"
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "size": {"shortest_edge": spec.tile_px} if clip else side,
        "crop_size": side,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": CLIP_MEAN if clip else [0.5, 0.5, 0.5],
        "image_std": CLIP_STD if clip else [0.5, 0.5, 0.5],
        "image_grid_pinpoints": spec.grid_pinpoints,
    }


def llava_next_processor(spec: CheckpointSpec) -> Json:
    """Returns processor_config.json; the old spelling has no patch fields."""
    content: Json = {"processor_class": "LlavaNextProcessor", "image_token": "<image>"}
    if spec.naming != "old":
        content |= {
            "patch_size": spec.patch_px,
            "vision_feature_select_strategy": select_strategy(spec),
            "num_additional_image_tokens": 1 if spec.tower == "clip" else 0,
        }
    return content


def added_token(i: int, text: str, special: bool = True) -> Json:
    """Returns an entry of tokenizer.json's `added_tokens`, which matches its exact text."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **flags, "special": special}


def sentencepiece_tokenizer(texts: Sequence[str], n_bpe: int, special: Sequence[str]) -> Json:
    """Makes a tokenizer.json as converted from SentencePiece: spaces as '▁', unknown characters as bytes, bos first.

    Ids: unknown, bos, eos, 256 bytes, pieces up to `n_bpe`, then `special`.
    """
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=n_bpe, show_progress=False, special_tokens=first)
    ascii_texts = ["".join(letter for letter in text if letter.isascii()) for text in texts]
    tokenizer.train_from_iterator(ascii_texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    content: Json = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    while len(vocab) < n_bpe:
        vocab[f"▁unused{len(vocab)}"] = len(vocab)
    names = {0: "<unk>", 1: "<s>", 2: "</s>"} | {n_bpe + i: text for i, text in enumerate(special)}
    content["added_tokens"] = [added_token(i, text) for i, text in names.items()]
    return content
