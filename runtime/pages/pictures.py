"""Picture files as documents: one page, or as many as a TIFF has."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from granite4v.clip_projector.images import load_image
from granite4v.errors import DocumentError, ImageError, ImageWarning
from granite4v.runtime.pages.book import Drawn, whole_pixels, within
from granite4v.runtime.pages.limits import Limits
from granite4v.runtime.pages.whole import check_png, check_tiff, looks_filled

if TYPE_CHECKING:
    from PIL.Image import Image

    from granite4v.families.base import TilingConfig
    from granite4v.runtime.pages.selection import Crop

_SUBFILE_TYPE = 254  # TIFF tag: bit 0 marks a smaller copy of another page, bit 2 a mask
_NOT_A_PAGE = 0b101


class PictureBook:
    """A file with one picture; of one with several frames (GIF, WebP) the first. Nothing is read before `draw`."""

    def __init__(self, content: Path | bytes, name: str, limits: Limits) -> None:
        """Raises DocumentError for a file that is too large to be read whole."""
        n_bytes = len(content) if isinstance(content, bytes) else content.stat().st_size
        if n_bytes > limits.file_bytes:
            raise DocumentError(
                f"{name} has {n_bytes:,} bytes; expected an image of at most {limits.file_bytes:,}. Save it anew, as "
                "PNG or JPEG."
            )
        self._content, self._name = content, name
        self.n_pages = 1
        self.damage: str | None = None
        self.index: list[int] | None = None

    def draw(self, number: int, crop: Crop | None, tiling: TilingConfig | None) -> Drawn:
        """The picture at its own size. Raises ImageError; DocumentError for a crop that reaches beyond it."""
        del number, tiling
        drawn = _drawn(self._content, self._name, crop)
        check_png(self._content, self._name)
        return drawn

    def close(self) -> None:
        """Nothing is held."""


class TiffBook:
    """A TIFF file, page by page. Smaller copies of a page and masks are not counted."""

    def __init__(self, content: Path | bytes, name: str, limits: Limits, index: list[int] | None) -> None:
        """`index`: the frames that are pages, where that is known. Raises ImageError when there is none."""
        from PIL import Image

        self._name, self._limits = name, limits
        self.damage: str | None = None
        try:
            with _quietly():
                self._image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        except _errors() as error:
            load_image(content, name)  # knows better what is wrong
            raise ImageError(f"{name} is damaged: {error}.") from None
        self._frames = self._find_pages() if index is None else index
        self.index: list[int] | None = self._frames
        self.n_pages = len(self._frames)

    def _find_pages(self) -> list[int]:
        """The indices of the frames that are pages. One that is damaged counts: it will fail when it is drawn."""
        pages: list[int] = []
        others: list[int] = []
        while True:
            index = len(pages) + len(others)
            if index == self._limits.n_pages:
                _, self.damage = within(index + 1, self._limits, self._name)
                return pages or others
            try:
                with _quietly():
                    self._image.seek(index)
                kind = self._image.tag_v2.get(_SUBFILE_TYPE, 0)  # type: ignore[attr-defined]  # of TIFF alone
                (others if isinstance(kind, int) and kind & _NOT_A_PAGE else pages).append(index)
            except EOFError:
                return pages or others
            except _errors() as error:
                if self._image.tell() < index:  # the chain of pages ends in nothing
                    self.damage = f"{self._name} is damaged behind page {len(pages)}: {error}; what follows is lost."
                    return pages or others
                pages.append(index)

    def draw(self, number: int, crop: Crop | None, tiling: TilingConfig | None) -> Drawn:
        """The page at its own size. Raises ImageError; DocumentError for a crop that reaches beyond it."""
        del tiling
        name = f"page {number} of {self._name}" if self.n_pages > 1 else self._name
        try:
            with _quietly():
                self._image.seek(self._frames[number - 1])
        except _errors() as error:
            raise ImageError(f"{name} is damaged: {error}.") from None
        check_tiff(self._image, name)
        return _drawn(self._image, name, crop)

    def close(self) -> None:
        self._image.close()


def _drawn(source: Path | bytes | Image, name: str, crop: Crop | None) -> Drawn:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = load_image(source, name)
    said = tuple(str(item.message) for item in caught if issubclass(item.category, ImageWarning))
    if looks_filled(image):
        said += (f"{name} has an edge of one even grey, as where a JPEG's data ends too soon; part of it may be lost.",)
    if crop is not None:
        box = crop.box(image.size, name, "pixels")
        image = image.crop(whole_pixels(box, image.size))
    return Drawn(image, warnings=said)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's warnings: what matters of them comes again when a page is drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _errors() -> tuple[type[Exception], ...]:
    """What Pillow raises on a TIFF whose directories are damaged."""
    from PIL.Image import DecompressionBombError

    shape = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error)
    return (DecompressionBombError, EOFError, *shape)
