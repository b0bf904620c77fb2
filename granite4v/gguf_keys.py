"""All GGUF metadata keys and tensor names, for the writer and the readers; no other module spells one out.

Names are llama.cpp's (tools/mtmd/clip-impl.h, src/llama-arch.cpp and src/llama-vocab.cpp as of llama-cpp-python
0.3.36, ggml 0.25.3). Keys that start with `granite4v.` are ours; llama.cpp ignores them. Tensor names omit `.weight`
and `.bias` where a tensor has both.
"""

import re

GENERAL_ARCHITECTURE = "general.architecture"
GENERAL_TYPE = "general.type"
GENERAL_NAME = "general.name"
GENERAL_FILE_TYPE = "general.file_type"
GENERAL_QUANTIZATION_VERSION = "general.quantization_version"

ARCH_CLIP = "clip"
TYPE_MMPROJ = "mmproj"
TYPE_ADAPTER = "adapter"

GENERAL_ALIGNMENT = "general.alignment"
SPLIT_COUNT = "split.count"

# --- text file; {arch} is general.architecture, see `text_key` ---
VOCAB_SIZE = "{arch}.vocab_size"
BLOCK_COUNT = "{arch}.block_count"
CONTEXT_LENGTH = "{arch}.context_length"
EMBEDDING_LENGTH = "{arch}.embedding_length"
FEED_FORWARD_LENGTH = "{arch}.feed_forward_length"
EXPERT_FEED_FORWARD_LENGTH = "{arch}.expert_feed_forward_length"
EXPERT_COUNT = "{arch}.expert_count"
EXPERT_USED_COUNT = "{arch}.expert_used_count"
INTERLEAVE_MOE_LAYER_STEP = "{arch}.interleave_moe_layer_step"
HEAD_COUNT = "{arch}.attention.head_count"
HEAD_COUNT_KV = "{arch}.attention.head_count_kv"
KEY_LENGTH = "{arch}.attention.key_length"
VALUE_LENGTH = "{arch}.attention.value_length"
ATTENTION_SCALE = "{arch}.attention.scale"
LAYER_NORM_RMS_EPS = "{arch}.attention.layer_norm_rms_epsilon"
ROPE_FREQ_BASE = "{arch}.rope.freq_base"
ROPE_DIMENSION_COUNT = "{arch}.rope.dimension_count"
ROPE_SCALING_TYPE = "{arch}.rope.scaling.type"
ROPE_SCALING_FACTOR = "{arch}.rope.scaling.factor"
ROPE_SCALING_FINETUNED = "{arch}.rope.scaling.finetuned"
EMBEDDING_SCALE = "{arch}.embedding_scale"
RESIDUAL_SCALE = "{arch}.residual_scale"
LOGIT_SCALE = "{arch}.logit_scale"
DEEPSTACK_MAPPING = "{arch}.deepstack_mapping"

TOKENIZER_MODEL = "tokenizer.ggml.model"
TOKENIZER_PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPES = "tokenizer.ggml.token_type"
TOKEN_SCORES = "tokenizer.ggml.scores"
TOKEN_MERGES = "tokenizer.ggml.merges"
BOS_TOKEN_ID = "tokenizer.ggml.bos_token_id"
EOS_TOKEN_ID = "tokenizer.ggml.eos_token_id"
EOT_TOKEN_ID = "tokenizer.ggml.eot_token_id"  # end of turn
EOM_TOKEN_ID = "tokenizer.ggml.eom_token_id"  # end of message
UNKNOWN_TOKEN_ID = "tokenizer.ggml.unknown_token_id"
SEPARATOR_TOKEN_ID = "tokenizer.ggml.seperator_token_id"  # llama.cpp's spelling
PADDING_TOKEN_ID = "tokenizer.ggml.padding_token_id"
MASK_TOKEN_ID = "tokenizer.ggml.mask_token_id"
ADD_BOS_TOKEN = "tokenizer.ggml.add_bos_token"
ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
TOKENIZER_HF_JSON = "tokenizer.huggingface.json"
CHAT_TEMPLATE = "tokenizer.chat_template"

# --- text tensors; {i} is the decoder layer ---
TOKEN_EMBD = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"
ROPE_FREQS = "rope_freqs.weight"
TEXT_BLOCK = "blk.{i}.{part}"
ROUTER = "ffn_gate_inp.weight"  # this and the next two: parts of a block with experts; {part}: gate, up or down
EXPERTS = "ffn_{part}_exps.weight"
SHARED_EXPERT = "ffn_{part}_shexp.weight"
LORA_A, LORA_B = "{name}.lora_a", "{name}.lora_b"  # {name}: the tensor they are added to

# --- LoRA adapter file ---
ADAPTER_TYPE = "adapter.type"
ADAPTER_LORA_ALPHA = "adapter.lora.alpha"

# --- mmproj file ---
PROJECTOR_TYPE = "clip.projector_type"
HAS_VISION_ENCODER = "clip.has_vision_encoder"
HAS_LLAVA_PROJECTOR = "clip.has_llava_projector"
USE_GELU = "clip.use_gelu"
IMAGE_SIZE = "clip.vision.image_size"
PREPROC_IMAGE_SIZE = "clip.vision.preproc_image_size"
PATCH_SIZE = "clip.vision.patch_size"
VISION_EMBEDDING_LENGTH = "clip.vision.embedding_length"
VISION_FEED_FORWARD_LENGTH = "clip.vision.feed_forward_length"
VISION_BLOCK_COUNT = "clip.vision.block_count"
VISION_PROJECTION_DIM = "clip.vision.projection_dim"
VISION_HEAD_COUNT = "clip.vision.attention.head_count"
VISION_LAYER_NORM_EPS = "clip.vision.attention.layer_norm_epsilon"
FEATURE_LAYER = "clip.vision.feature_layer"
IMAGE_MEAN = "clip.vision.image_mean"
IMAGE_STD = "clip.vision.image_std"
IMAGE_CROP_RESOLUTION = "clip.vision.image_crop_resolution"
MM_PATCH_MERGE_TYPE = "clip.vision.mm_patch_merge_type"
IMAGE_GRID_PINPOINTS = "clip.vision.image_grid_pinpoints"
PROJECTOR_QUERY_SIDE = "clip.vision.projector.query_side"
PROJECTOR_WINDOW_SIDE = "clip.vision.projector.window_side"
PROJECTOR_SCALE_FACTOR = "clip.vision.projector.scale_factor"  # of pixel shuffle: the side of a block of patches
PROJECTOR_SPATIAL_OFFSETS = "clip.vision.projector.spatial_offsets"

# --- ours, mmproj file: what no llama.cpp key covers ---
TEXT_LAYERS = "granite4v.vision.text_layers"
HAS_NEWLINE = "granite4v.vision.has_newline"  # false if no learned newline embedding ends the rows of a grid
HIDDEN_ACT = "granite4v.vision.hidden_act"
MAX_TILES_OF_TOKENS = "granite4v.vision.max_tiles_of_tokens"
SQUARE_IF_SEVERAL = "granite4v.vision.square_if_several"
VIDEO_POOLING = "granite4v.vision.video_pooling"
RESAMPLE = "granite4v.vision.resample"
RESCALE_FACTOR = "granite4v.vision.rescale_factor"
PROJECTOR_HEAD_COUNT = "granite4v.vision.projector.head_count"
PROJECTOR_LAYER_NORM_EPS = "granite4v.vision.projector.layer_norm_epsilon"
PROJECTOR_HIDDEN_ACT = "granite4v.vision.projector.hidden_act"

# --- ours, mmproj file of a model that scales images into canvases of tiles ---
MAX_TILES = "granite4v.vision.max_tiles"
VISION_ROPE_FREQ_BASE = "granite4v.vision.rope_freq_base"
PROJECTOR_WIDTH = "granite4v.vision.projector.width"  # hidden width between the projector's layers

# --- ours, mmproj file of a model whose decoder attends to images ---
GLOBAL_BLOCK_COUNT = "granite4v.vision.global_block_count"
ASPECT_RATIOS = "granite4v.vision.aspect_ratios"  # flat (height, width) pairs in tiles; a pair's id is its index + 1
INTERMEDIATE_STATES = "granite4v.vision.intermediate_states"  # hidden states, 0 = input of the first local layer
CROSS_LAYERS = "granite4v.cross_attention.layers"  # indices among all decoder layers
CROSS_FEED_FORWARD_LENGTH = "granite4v.cross_attention.feed_forward_length"
CROSS_HEAD_COUNT = "granite4v.cross_attention.head_count"
CROSS_HEAD_COUNT_KV = "granite4v.cross_attention.head_count_kv"
CROSS_KEY_LENGTH = "granite4v.cross_attention.key_length"
CROSS_RMS_EPS = "granite4v.cross_attention.layer_norm_rms_epsilon"
CROSS_RULE = "granite4v.cross_attention.rule"  # 'original': rows before the first image get no cross-attention

# --- ours, every file: provenance ---
PROVENANCE_VERSION = "granite4v.version"
PROVENANCE_SOURCE = "granite4v.source"
PROVENANCE_REVISION = "granite4v.revision"
PROVENANCE_POLICY = "granite4v.quantization_policy"
PROVENANCE_ADAPTER = "granite4v.adapter"  # 'merged', 'separate', 'ignored' or 'none'
PROVENANCE_ADAPTER_SOURCE = "granite4v.adapter_source"
# in a vision file made by requantizing another: the source's file name, and the type of most of the source's weights
REQUANTIZED_FROM = "granite4v.requantized_from"
REQUANTIZED_FROM_TYPE = "granite4v.requantized_from_type"
IMAGE_TOKEN_ID = "granite4v.image_token_id"
VIDEO_TOKEN_ID = "granite4v.video_token_id"
PAIR_ID = "granite4v.pair_id"  # identical in the text, mmproj and adapter files of one conversion

# --- mmproj tensors; {i} is the encoder layer, {p} the projector ---
PATCH_EMBD_WEIGHT = "v.patch_embd.weight"
PATCH_EMBD_BIAS = "v.patch_embd.bias"
POSITION_EMBD = "v.position_embd.weight"
CLASS_EMBD = "v.class_embd"
PRE_LN = "v.pre_ln"
POST_LN = "v.post_ln"
IMAGE_NEWLINE = "v.image_newline"
IMAGE_NEWLINE_OLDER = "model.image_newline"  # in files of llama.cpp's legacy converter
BLOCK = "v.blk.{i}.{part}"
GLOBAL_BLOCK = "v.global_blk.{i}.{part}"  # after the other blocks, in towers that attend over all tiles
GATES = ("attn_gate", "ffn_gate_scale")  # parts of a global block; stored before tanh
PRE_TILE_EMBD = "v.pre_tile_embd"  # (ids, tiles * width); ids are those of the aspect ratios
POST_TILE_EMBD = "v.post_tile_embd"
TILE_POSITION_EMBD = "v.tile_position_embd"  # (ids, tiles * positions * width)
TILE_GATE = "{name}.gate"  # {name}: one of the three above; stored before tanh
IMAGE_TOKEN_EMBD = "v.image_token_embd"  # (1, width), for an image token beyond the text file's vocabulary
CROSS_PREFIX = "xattn."
CROSS_BLOCK = "xattn.blk.{i}.{part}"  # {i}: the index among all decoder layers; parts of a text block, plus GATES
PROJ_IMG_POS = "v.proj_blk.{p}.img_pos"
PROJ_QUERY = "v.proj_blk.{p}.query"
PROJ = "v.proj_blk.{p}.{part}"
MLP = "mm.{layer}"
MLP_FIRST, MLP_SECOND, MLP_THIRD = 0, 2, 4  # 1 and 3 are the activations between the layers


def pattern_of(name: str, **fields: str) -> re.Pattern[str]:
    """Compiles a regular expression that matches tensor names of this form; `fields` gives the expression for each
    placeholder, which becomes a group."""
    parts = re.split(r"\{(\w+)\}", name)  # text at even indices, placeholders at odd ones
    return re.compile("".join(f"({fields[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def text_key(key: str, architecture: str) -> str:
    """Fills in the `general.architecture` of a text file: BLOCK_COUNT gives 'granite.block_count' for 'granite'."""
    return key.replace("{arch}", architecture)
