"""What every kind of document gives: its number of pages, and one of them drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

    from granite4v.families.base import TilingConfig
    from granite4v.runtime.documents.limits import Limits
    from granite4v.runtime.documents.selection import Crop


@dataclass(frozen=True, eq=False)
class Drawn:
    """A page as an upright RGB picture. `dpi`: pixels an inch of paper, where the document knows its paper."""

    image: Image
    dpi: float | None = None
    warnings: tuple[str, ...] = ()


class Book(Protocol):
    """An open document. `damage` says what became of pages that cannot even be counted.

    `index`: what it took to find the pages, which saves that work when the document is opened again.
    """

    n_pages: int
    damage: str | None
    index: list[int] | None

    def draw(self, number: int, crop: Crop | None, tiling: TilingConfig | None) -> Drawn:
        """Page `number`, from 1, or the part of it that `crop` says. Raises ImageError, DocumentError."""
        ...

    def close(self) -> None:
        """Frees what it holds; a second call does nothing."""
        ...


def whole_pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) at the pixels nearest to `box`, at least one each way, inside `size`."""
    left, top = min(round(box[0]), size[0] - 1), min(round(box[1]), size[1] - 1)
    return left, top, max(round(box[2]), left + 1), max(round(box[3]), top + 1)


def within(n_pages: int, limits: Limits, name: str) -> tuple[int, str | None]:
    """How many pages are read, and what became of the others."""
    if n_pages <= limits.n_pages:
        return n_pages, None
    return limits.n_pages, f"{name} has more than {limits.n_pages:,} pages; those behind are not read. Split it."
