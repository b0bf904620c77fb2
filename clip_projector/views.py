"""Decides how each image and video of a prompt is shown to the model: cut into tiles, or as one tile.

This may depend on the other images of the prompt, so caches identify an image by its view, not only by its pixels. The
model's configuration decides which rules apply. A new rule is another form here, with its tiles and layout in
`tiles_anyres` and `grid_anyres`. Imports no NumPy.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from granite4v.clip_projector.grid_anyres import Layout, VideoLayout, layout, square_layout, video_layout
from granite4v.clip_projector.grid_canvas import CanvasLayout, FramedLayout, canvas_layout, framed_layout
from granite4v.clip_projector.images import Image
from granite4v.errors import ArgumentError
from granite4v.families.base import CanvasConfig, VisionConfig

Form = Literal["tiles", "square", "video"]
TilesLayout = Layout | VideoLayout | FramedLayout
AnyLayout = TilesLayout | CanvasLayout


@dataclass(frozen=True)
class Video:
    """The frames of a video that the model sees, in order."""

    frames: tuple[Image, ...]

    def __post_init__(self) -> None:
        if not self.frames:
            raise ArgumentError("a video has no frames; give at least one image.")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the first frame in pixels"""
        return self.frames[0].size

    @functools.cached_property
    def digest(self) -> bytes:
        """Identifies all pixels of all frames."""
        return View(self.frames, "video").digest


@dataclass(frozen=True)
class View:
    """One image, or the frames of one video, in the form that the model sees.

    'tiles': cut into tiles; 'square': one tile, padded to a square; 'video': one tile per frame, with fewer tokens.
    """

    images: tuple[Image, ...]
    form: Form = "tiles"

    @functools.cached_property
    def digest(self) -> bytes:
        """Identifies the decoder's input for this view, for a given model, by pixels and form. For the form 'tiles' it
        is the digest of the image."""
        if self.form == "tiles":
            return self.images[0].digest
        digest = hashlib.sha256(self.form.encode())
        for image in self.images:
            digest.update(image.digest)
        return digest.digest()

    def layout(self, config: VisionConfig) -> AnyLayout:
        """The tiles and tokens of this view; needs no pixels."""
        if isinstance(config.tiling, CanvasConfig) and config.frame is None:
            return canvas_layout(self.images[0].size, config.tiling)
        return self.tiles(config)

    def parts(self, config: VisionConfig) -> tuple[str | int, ...]:
        """This view's part of the prompt, in order: each item is a number of image tokens or the text of a token."""
        where = self.layout(config)
        return where.parts if isinstance(where, FramedLayout) else (where.n_tokens,)

    def tiles(self, config: VisionConfig) -> TilesLayout:
        """The layout for a model whose tower encodes each tile separately."""
        if self.form == "video":
            return video_layout(len(self.images), config)
        if self.form == "square":
            return square_layout(config)
        return _tiles_alone(self.images[0].size, config)


def count_tokens(size: tuple[int, int], config: VisionConfig) -> int:
    """The number of prompt positions of an image of `size` (width, height) that is the only one in its prompt. Not for
    decoders with cross-attention."""
    return _tiles_alone(size, config).n_tokens


def _tiles_alone(size: tuple[int, int], config: VisionConfig) -> TilesLayout:
    if config.frame is not None:
        return framed_layout(size, config)
    return layout(size, config.tiling, config.tokens_side, newline=config.newline)


def views_of(items: Sequence[Image | Video], config: VisionConfig) -> list[View]:
    """Returns the view of each image and video of one prompt, in reading order. Pass videos only for a model that takes
    them."""
    several = sum(isinstance(item, Image) for item in items) > 1
    is_square = several and not isinstance(config.tiling, CanvasConfig) and config.tiling.square_if_several
    form: Form = "square" if is_square else "tiles"
    return [View(item.frames, "video") if isinstance(item, Video) else View((item,), form) for item in items]
