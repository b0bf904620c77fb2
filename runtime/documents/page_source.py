"""The interface of every kind of document: its number of pages, and a rendered page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image

from granite4v.families.base import Tiling
from granite4v.runtime.documents.limits import Limits
from granite4v.runtime.documents.selection import Crop


@dataclass(frozen=True, eq=False)
class RenderedPage:
    """A page as an upright RGB image. `dpi`: pixels per inch of paper, if the document has a paper size."""

    image: Image
    dpi: float | None = None
    warnings: tuple[str, ...] = ()


class PageSource(Protocol):
    """An open document, which renders its pages one at a time.

    `damage`: a message about pages that are left out of `n_pages`, for instance because they cannot even be counted;
    None if there are none. `index`: where the pages were found, which saves the search when the document is opened
    again.
    """

    n_pages: int
    damage: str | None
    index: list[int] | None

    def render(self, number: int, crop: Crop | None, tiling: Tiling | None) -> RenderedPage:
        """Renders page `number`, from 1, or the part of it inside `crop`. Raises ImageError, DocumentError."""
        ...

    def close(self) -> None:
        """Frees what it holds; a second call does nothing."""
        ...


def whole_pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) at the pixels nearest to `box`, at least one wide and high, inside `size`."""
    left, top = min(round(box[0]), size[0] - 1), min(round(box[1]), size[1] - 1)
    return left, top, max(round(box[2]), left + 1), max(round(box[3]), top + 1)


def limited_pages(n_pages: int, limits: Limits, name: str) -> tuple[int, str | None]:
    """Returns how many pages are read, and a message about the others; None if there are no others."""
    if n_pages <= limits.n_pages:
        return n_pages, None
    return limits.n_pages, f"{name} has more than {limits.n_pages:,} pages; the rest are not read. Split the document."
