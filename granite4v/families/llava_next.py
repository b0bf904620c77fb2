"""LLaVA-NeXT, including Granite Vision 3.x: SigLIP or CLIP tower, two-layer projector, one stream.

Formats: transformers 5.23 `models/llava_next`, and llama.cpp's `tools/mtmd/legacy-models` and `tools/mtmd/clip.cpp`
as shipped with llama-cpp-python 0.3.36. The one stream is the decoder's input embedding, so a text model that scales
its input embeddings scales it too: transformers and llama.cpp (for a text file without `deepstack_mapping`) agree.

Conventions are resolved here: hidden state 0 is the input of the first encoder layer; several hidden states are joined
in ascending order, the only order that libmtmd supports, and the projector's columns are reordered to match; encoder
layers after the last hidden state in use, and the norm after the last layer, are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import ModelFileError
from granite4v.families.anyres import tiling_from_gguf, tiling_from_hf, tiling_metadata
from granite4v.families.base import ACTIVATIONS, MlpConfig, Shapes, Stream, VisionConfig
from granite4v.families.fields import hidden_state_index
from granite4v.families.hf_fields import MAX_WIDTH, Fields, Json, is_integer
from granite4v.families.text import logits_scaling, text_section
from granite4v.families.towers import (
    CLIP,
    SIGLIP,
    check_strategy,
    tower_from_gguf,
    tower_from_hf,
    tower_kind,
    tower_metadata,
)
from granite4v.ggml.metadata import AGAIN, GgufMetadata

# Defaults of fields that config.json and preprocessor_config.json may leave out (transformers').
FEATURE_LAYER = -2
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MAX_STATES = 64
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class LlavaNext:
    name = "llava_next"
    hf_model_types: tuple[str, ...] = ("llava_next",)
    projector_type = "mlp"

    def config_from_hf(self, config: Json, preprocessor: Fields) -> VisionConfig:
        """The configuration from config.json and the image processor's settings; raises CheckpointError."""
        fields, text = Fields(config), text_section(config)
        vision = fields.section("vision_config")
        tower = tower_from_hf(vision, tower_kind(vision))
        check_strategy(fields, tower)
        states = sorted(taken_states(fields, tower.num_hidden_layers))
        return VisionConfig(
            family=self.name,
            tower=dataclasses.replace(tower, num_hidden_layers=max(states[-1], 1)),
            tiling=tiling_from_hf(fields, preprocessor, tower, IMAGE_MEAN, IMAGE_STD, PINPOINTS),
            projector=MlpConfig(fields.text("projector_hidden_act", "gelu", ACTIVATIONS)),
            streams=(Stream(tuple(states), 0),),
            text_hidden_size=text.integer("hidden_size", 1, MAX_WIDTH),
        )

    def config_from_gguf(self, metadata: GgufMetadata, shapes: Shapes) -> VisionConfig:
        """The configuration from an mmproj file's metadata and tensor shapes; raises ModelFileError.

        Files of llama.cpp's legacy converter list grids as (height, width), as Hugging Face does, lack the width of the
        text model, and have a single flag for the tower's activation: whether config.json calls it 'gelu'. For a SigLIP
        tower, whose config.json names the tanh form, the flag is false; libmtmd then computes quick gelu, we compute
        the tanh form.
        """
        ours = keys.HIDDEN_ACT in metadata
        kind = CLIP if keys.CLASS_EMBD in shapes else SIGLIP
        act = str(dict(kind.defaults)["hidden_act"])
        if kind is CLIP and metadata.flag(keys.USE_GELU, False):
            act = "gelu"
        tower = tower_from_gguf(metadata, kind, act)
        tower = dataclasses.replace(
            tower,
            pre_norm=f"{keys.PRE_LN}.weight" in shapes,
            patch_bias=keys.PATCH_EMBD_BIAS in shapes,
        )
        # a file that names no state comes from a checkpoint with -2 and lacks the last layer, so its last state is the
        # right one; libmtmd takes the state before it
        most = tower.num_hidden_layers
        states = metadata.integers(keys.FEATURE_LAYER, 0, most, [most], max_length=most + 1)
        return VisionConfig(
            family=self.name,
            tower=tower,
            tiling=tiling_from_gguf(metadata, tower, height_first=not ours),
            projector=MlpConfig(metadata.text(keys.PROJECTOR_HIDDEN_ACT, "gelu", ACTIVATIONS)),
            streams=(Stream(tuple(states), 0),),
            text_hidden_size=_projected_width(metadata, shapes),
        )

    def gguf_names(self, config: VisionConfig, shapes: Shapes) -> Mapping[str, str]:
        """The names in files of llama.cpp's legacy converter, which swaps the two layers of a feed-forward network."""
        names = {}
        if keys.IMAGE_NEWLINE not in shapes and keys.IMAGE_NEWLINE_OLDER in shapes:
            names[keys.IMAGE_NEWLINE] = keys.IMAGE_NEWLINE_OLDER
        width, ffn = config.tower.hidden_size, config.tower.intermediate_size
        up = keys.BLOCK.format(i=0, part="ffn_up") + ".weight"
        if shapes.get(up) == (width, ffn) and (width != ffn or names):
            for i in range(config.tower.num_hidden_layers):
                for part, other in (("ffn_up", "ffn_down"), ("ffn_down", "ffn_up")):
                    for suffix in ("weight", "bias"):
                        name = keys.BLOCK.format(i=i, part=f"{part}.{suffix}")
                        names[name] = keys.BLOCK.format(i=i, part=f"{other}.{suffix}")
        return names

    def vision_metadata(self, config: VisionConfig) -> dict[str, Any]:
        """The mmproj metadata that `config_from_gguf` reads back, plus keys that only libmtmd reads."""
        (stream,) = config.streams
        return {
            keys.PROJECTOR_TYPE: self.projector_type,
            **tower_metadata(config.tower),
            **tiling_metadata(config.tiling),
            keys.HAS_LLAVA_PROJECTOR: True,
            keys.MM_PATCH_MERGE_TYPE: "spatial_unpad",
            keys.IMAGE_CROP_RESOLUTION: config.tiling.tile_px,
            keys.VISION_PROJECTION_DIM: config.text_hidden_size,
            keys.PROJECTOR_HIDDEN_ACT: config.projector.hidden_act,
            keys.FEATURE_LAYER: list(stream.hidden_states),
            keys.TEXT_LAYERS: [stream.text_layer],
        }

    def text_metadata(self, config: VisionConfig, n_text_layers: int) -> dict[str, Any]:
        """Empty: the one stream is the decoder's input."""
        return {}

    def reference_streams(self, output: Any) -> dict[int, Any]:
        """The stream that transformers' `get_image_features` returned for one image."""
        return {0: output.pooler_output[0]}

    def reference_logits_divisor(self, config: Json) -> float:
        """`logits_scaling` of a Granite decoder, else 1: in transformers 5 this family has its own head, which leaves
        the division out.

        The models were trained, published and quantized with the division, and llama.cpp divides, so we do, too. The
        most likely token is the same either way; sampling at a temperature is not.
        """
        text = text_section(config)
        return logits_scaling(text) if text.get("model_type") == "granite" else 1.0


def taken_states(config: Fields, n_layers: int) -> list[int]:
    """Reads `vision_feature_layer` as hidden states, in the order in which the checkpoint joins them."""
    given = config.get("vision_feature_layer", FEATURE_LAYER)
    indices = [given] if is_integer(given) else given
    if not isinstance(indices, list) or not 0 < len(indices) <= MAX_STATES or not all(map(is_integer, indices)):
        raise config.error("vision_feature_layer", f"a number, or a list of at most {MAX_STATES}")
    return [hidden_state_index(index, n_layers) for index in indices]


def _projected_width(metadata: GgufMetadata, shapes: Shapes) -> int:
    """The width of the text model: the output width of the projector's last layer."""
    name = keys.MLP.format(layer=keys.MLP_SECOND) + ".weight"
    shape = shapes.get(name, ())
    if len(shape) != 2:
        raise ModelFileError(
            f"'{metadata.path}' has '{name}' with shape {shape or 'none'}, expected the second of two linear layers; "
            f"{AGAIN}."
        )
    return shape[0]
