"""LLaVA-OneVision: LLaVA-NeXT's image side plus a token limit, several images per prompt, and video.

Format: transformers 5.24 `models/llava_onevision`. llama.cpp does not support this model: libmtmd would treat the image
side as LLaVA-NeXT's and produce other tokens. So the file names a projector type that libmtmd does not know, and
libmtmd refuses the file.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from granite4v.families.base import VisionConfig
from granite4v.families.hf_fields import Fields, Json
from granite4v.families.llava_next import LlavaNext

# Defaults of fields that config.json may leave out (transformers').
DEFAULTS: dict[str, Any] = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)],
}
VIDEO_POOLING = 2  # hard-coded in transformers' `apply_pooling`
_ASPECT_RATIO = re.compile(r"anyres_max_(\d{1,3})")


class LlavaOnevision(LlavaNext):
    name = "llava_onevision"
    hf_model_types: tuple[str, ...] = ("llava_onevision",)
    projector_type = "llava_onevision"

    def config_from_hf(self, config: Json, preprocessor: Fields) -> VisionConfig:
        """The configuration from config.json and the image processor's settings; raises CheckpointError."""
        config = with_defaults(config)
        base = super().config_from_hf(config, preprocessor)
        tiling = dataclasses.replace(
            base.tiling,
            max_tiles_of_tokens=_max_tiles(Fields(config)),
            square_if_several=True,
            video_pooling=VIDEO_POOLING,
        )
        return dataclasses.replace(base, tiling=tiling)


def with_defaults(config: Json) -> dict[str, Any]:
    """Fills in the defaults of fields that a config.json leaves out or has as null."""
    return {**DEFAULTS, **{key: value for key, value in config.items() if value is not None}}


def _max_tiles(config: Fields) -> int:
    value = config.get("vision_aspect_ratio")
    found = _ASPECT_RATIO.fullmatch(value) if isinstance(value, str) else None
    if found is None or int(found[1]) == 0:
        raise config.error("vision_aspect_ratio", "'anyres_max_N', such as 'anyres_max_9'")
    return int(found[1])
