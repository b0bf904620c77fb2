"""Turns images into embeddings: cuts tiles, runs a ViT tower and its projectors as ggml graphs, packs the tokens.

Each public name is imported on first use: opening images needs no graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from granite4v.lazy import exports

if TYPE_CHECKING:
    from granite4v.clip_projector.encoder import ImageFeatures, VisionEncoder
    from granite4v.clip_projector.grid_anyres import Layout
    from granite4v.clip_projector.images import Image, ImageSource, load_image
    from granite4v.clip_projector.video import VideoSource, load_video
    from granite4v.clip_projector.views import Video, View, count_tokens, views_of

__all__ = [
    "Image",
    "ImageFeatures",
    "ImageSource",
    "Layout",
    "Video",
    "VideoSource",
    "View",
    "VisionEncoder",
    "count_tokens",
    "load_image",
    "load_video",
    "views_of",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "encoder": ("ImageFeatures", "VisionEncoder"),
        "grid_anyres": ("Layout",),
        "images": ("Image", "ImageSource", "load_image"),
        "video": ("VideoSource", "load_video"),
        "views": ("Video", "View", "count_tokens", "views_of"),
    },
)
