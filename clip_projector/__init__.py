"""Images to embeddings: tiles, a ViT tower and its projectors as ggml graphs, packing.

Nothing is imported until a name is used: opening images needs no graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite4v.clip_projector.encoder import ImageFeatures, VisionEncoder
    from granite4v.clip_projector.grid_anyres import Layout, count_tokens
    from granite4v.clip_projector.images import Image, ImageSource, load_image

__all__ = ["Image", "ImageFeatures", "ImageSource", "Layout", "VisionEncoder", "count_tokens", "load_image"]

_HOMES = {
    "ImageFeatures": "encoder",
    "VisionEncoder": "encoder",
    "Image": "images",
    "ImageSource": "images",
    "load_image": "images",
    "Layout": "grid_anyres",
    "count_tokens": "grid_anyres",
}


def __getattr__(name: str) -> Any:
    """Finds a public name in the module it lives in, on first use (PEP 562)."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'granite4v.clip_projector' has no attribute {name!r}")
    return getattr(importlib.import_module(f"granite4v.clip_projector.{_HOMES[name]}"), name)
