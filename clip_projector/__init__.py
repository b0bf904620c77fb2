"""Pictures to image embeddings: tiles, a ViT tower and its projectors as ggml graphs, packing."""

from granite4v.clip_projector.encoder import ImageFeatures, VisionEncoder
from granite4v.clip_projector.images import ImageSource, load_image
from granite4v.clip_projector.tiles import Layout, count_tokens

__all__ = ["ImageFeatures", "ImageSource", "Layout", "VisionEncoder", "count_tokens", "load_image"]
