"""How a prompt shows its images and videos to the model: what is cut into tiles, what becomes one tile.

That may depend on the other images of the prompt, so an image is known to caches by its view, not by its pixels
alone. Which rules a model has, its configuration says; a new one is another form here, with its tiles and layout in
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
    """The frames of a video, in order: as many as the model is to see."""

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
        """Identifies its frames, all pixels of them."""
        return View(self.frames, "video").digest


@dataclass(frozen=True)
class View:
    """One image, or the frames of one video, in the form in which a prompt shows it.

    'tiles': an overview and a grid; 'square': one tile, padded to a square; 'video': one tile a frame, its tokens
    reduced.
    """

    images: tuple[Image, ...]
    form: Form = "tiles"

    @functools.cached_property
    def digest(self) -> bytes:
        """Identifies what the decoder gets for it, given the model: pixels and form. That of the image where the form
        is the usual one."""
        if self.form == "tiles":
            return self.images[0].digest
        digest = hashlib.sha256(self.form.encode())
        for image in self.images:
            digest.update(image.digest)
        return digest.digest()

    def layout(self, config: VisionConfig) -> AnyLayout:
        """Its tiles and tokens; needs no pixels."""
        if isinstance(config.tiling, CanvasConfig) and config.frame is None:
            return canvas_layout(self.images[0].size, config.tiling)
        return self.tiles(config)

    def parts(self, config: VisionConfig) -> tuple[str | int, ...]:
        """What stands in the prompt for it, in order: a number of image tokens, or the text of a token between them."""
        where = self.layout(config)
        return where.parts if isinstance(where, FramedLayout) else (where.n_tokens,)

    def tiles(self, config: VisionConfig) -> TilesLayout:
        """The layout of a model whose tower sees each tile alone."""
        if self.form == "video":
            return video_layout(len(self.images), config)
        if self.form == "square":
            return square_layout(config)
        return _tiles_alone(self.images[0].size, config)


def count_tokens(size: tuple[int, int], config: VisionConfig) -> int:
    """Positions in the prompt of an image of `size` (width, height) that is alone in it; for a decoder whose input they
    are."""
    return _tiles_alone(size, config).n_tokens


def _tiles_alone(size: tuple[int, int], config: VisionConfig) -> TilesLayout:
    if config.frame is not None:
        return framed_layout(size, config)
    return layout(size, config.tiling, config.tokens_side, newline=config.newline)


def views_of(items: Sequence[Image | Video], config: VisionConfig) -> list[View]:
    """The view of each image and video of one prompt, in reading order; videos only for a model that takes them."""
    several = sum(isinstance(item, Image) for item in items) > 1
    is_square = several and not isinstance(config.tiling, CanvasConfig) and config.tiling.square_if_several
    form: Form = "square" if is_square else "tiles"
    return [View(item.frames, "video") if isinstance(item, Video) else View((item,), form) for item in items]
