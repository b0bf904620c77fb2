"""Image files as documents: one page, or all pages of a TIFF."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import PIL.Image

from granite4v.clip_projector.files import read_whole
from granite4v.clip_projector.images import NOT_A_PAGE, open_rgb
from granite4v.errors import DocumentError, ImageError, ImageWarning
from granite4v.families.base import Tiling
from granite4v.runtime.documents.limits import Limits
from granite4v.runtime.documents.page_source import RenderedPage, limited_pages, whole_pixels
from granite4v.runtime.documents.selection import Crop
from granite4v.runtime.documents.truncation import check_png, check_tiff, looks_filled

_JPEG = b"\xff\xd8\xff"
_SUBFILE_TYPE, _COMPRESSION = 254, 259  # TIFF tags
_JPEG_IN_TIFF = (6, 7)


class ImageFile:
    """A file with one image; only the first frame of a GIF or WebP is used. Nothing is read before `render`."""

    def __init__(self, content: Path | bytes, name: str, limits: Limits) -> None:
        """Raises DocumentError for a file that is too large to read into memory."""
        n_bytes = len(content) if isinstance(content, bytes) else content.stat().st_size
        if n_bytes > limits.file_bytes:
            raise DocumentError(
                f"{name} has {n_bytes:,} bytes; expected an image of at most {limits.file_bytes:,}. Save it again as "
                "PNG or JPEG."
            )
        self._content, self._name, self._limits = content, name, limits
        self.n_pages = 1
        self.damage: str | None = None
        self.index: list[int] | None = None

    def render(self, number: int, crop: Crop | None, tiling: Tiling | None) -> RenderedPage:
        """Returns the image at its own size. Raises ImageError; DocumentError for a crop that extends beyond it."""
        del number, tiling
        data = self._content if isinstance(self._content, bytes) else read_whole(self._content, self._limits.file_bytes)
        page = _page_of(data, self._name, crop, is_jpeg=data.startswith(_JPEG))
        check_png(data, self._name)
        return page

    def close(self) -> None:
        """Does nothing: no file is kept open."""


class TiffFile:
    """A TIFF file, page by page. Smaller copies of a page and masks do not count as pages."""

    def __init__(self, content: Path | bytes, name: str, limits: Limits, index: list[int] | None) -> None:
        """`index`: the frames that are pages, if known. Raises ImageError for a file that cannot be opened."""
        self._name, self._limits = name, limits
        self.damage: str | None = None
        try:
            with _quietly():
                self._image = PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        except Exception as error:
            open_rgb(content, name)  # fails with a more precise message
            raise ImageError(f"{name} is damaged: {str(error) or type(error).__name__}.") from None
        self._frames = self._find_pages() if index is None else index
        self.index: list[int] | None = self._frames
        self.n_pages = len(self._frames)

    def _find_pages(self) -> list[int]:
        """Returns the indices of the frames that are pages; of all frames if none is. A damaged frame counts as a page:
        rendering it will fail."""
        pages: list[int] = []
        others: list[int] = []
        while True:
            index = len(pages) + len(others)
            if index == self._limits.n_pages:
                _, self.damage = limited_pages(index + 1, self._limits, self._name)
                return pages or others
            try:
                with _quietly():
                    self._image.seek(index)
                kind = self._image.tag_v2.get(_SUBFILE_TYPE, 0)  # type: ignore[attr-defined]  # of TIFF alone
                (others if isinstance(kind, int) and kind & NOT_A_PAGE else pages).append(index)
            except EOFError:
                return pages or others
            except Exception as error:
                if self._image.tell() < index:  # the link to the next frame is broken
                    what = str(error) or type(error).__name__
                    self.damage = (
                        f"{self._name} is damaged after page {len(pages)}: {what}; the pages after it are lost."
                    )
                    return pages or others
                pages.append(index)

    def render(self, number: int, crop: Crop | None, tiling: Tiling | None) -> RenderedPage:
        """Returns the page at its own size. Raises ImageError; DocumentError for a crop that extends beyond it."""
        del tiling
        name = f"page {number} of {self._name}" if self.n_pages > 1 else self._name
        try:
            with _quietly():
                self._image.seek(self._frames[number - 1])
        except Exception as error:
            raise ImageError(f"{name} is damaged: {str(error) or type(error).__name__}.") from None
        check_tiff(self._image, name)
        is_jpeg = self._image.tag_v2.get(_COMPRESSION) in _JPEG_IN_TIFF  # type: ignore[attr-defined]
        return _page_of(self._image, name, crop, is_jpeg=is_jpeg)

    def close(self) -> None:
        self._image.close()


def _page_of(source: bytes | PIL.Image.Image, name: str, crop: Crop | None, *, is_jpeg: bool) -> RenderedPage:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = open_rgb(source, name)
    said = tuple(str(item.message) for item in caught if issubclass(item.category, ImageWarning))
    if is_jpeg and looks_filled(image):
        said += (
            f"{name} has a uniform grey area at its edge, as in a truncated JPEG; part of the image may be missing.",
        )
    if crop is not None:
        box = crop.box(image.size, name, "pixels")
        image = image.crop(whole_pixels(box, image.size))
    return RenderedPage(image, warnings=said)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppresses Pillow's warnings: those that matter are raised again when a page is rendered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
