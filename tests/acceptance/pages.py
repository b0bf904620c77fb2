"""Pages for the checks: synthetic documents that nano was not trained on, and folders of them in various file types."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from scripts.nano.documents import HELD_OUT_SEEDS, Document, draw_document


@dataclass(frozen=True)
class Batch:
    """A folder of documents, and the expected results: (source, page) in order, with page None for a broken
    document."""

    folder: Path
    pages: tuple[tuple[str, int | None], ...]


def draw_page(number: int, seed: int, kind: str | None = None) -> Document:
    """Draws a synthetic document that nano was not trained on."""
    return draw_document(HELD_OUT_SEEDS + 100_000_000 + seed * 100_000 + number, kind, 0.3)


def on_letter(picture: Image.Image, width_px: int) -> Image.Image:
    """Returns a white page in the proportions of US letter, with the image scaled to fit."""
    size = (width_px, width_px * 22 // 17)
    page = Image.new("RGB", size, "white")
    page.paste(ImageOps.contain(picture, size))
    return page


def make_batch(folder: Path, n_pages: int, seed: int = 0, *, width_px: int = 0, faults: bool = False) -> Batch:
    """Writes `n_pages` pages as PDFs of up to 20 pages, TIFFs of two, PNGs and JPEGs; on letter pages if a width is
    given.

    With `faults` the last page has the same pixels as an earlier one, and there is an additional, broken document.
    """
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    n_drawn, copies = 0, int(faults and n_pages > 1)
    pages: list[tuple[Path, int]] = []
    while n_drawn < n_pages - copies:
        suffix = ("png", "pdf", "pdf", "tiff", "jpg")[len(pages) % 5]
        wanted = {"pdf": rng.randint(1, 20 if n_pages > 100 else 9), "tiff": 2}.get(suffix, 1)
        n = min(n_pages - copies - n_drawn, wanted)
        path = folder / f"{len(pages) + 1:03}.{suffix}"
        pictures = [draw_page(n_drawn + i, seed).picture for i in range(n)]
        _save([on_letter(picture, width_px) if width_px else picture for picture in pictures], path)
        pages.append((path, n))
        n_drawn += n
    if copies:
        pages.append((folder / f"{len(pages) + 1:03}.bmp", 1))
        _save_again(pages[0][0], pages[-1][0])
    found: list[tuple[str, int | None]] = [(str(path), i + 1) for path, n in pages for i in range(n)]
    if faults:
        broken = folder / f"{len(pages) + 1:03}.pdf"
        broken.write_bytes(b"%PDF-1.7 and nothing more")
        found.append((str(broken), None))
    return Batch(folder, tuple(found))


def _save(pictures: list[Image.Image], path: Path) -> None:
    first, *others = pictures
    options: dict[str, Any] = {"save_all": True, "append_images": others} if path.suffix in (".pdf", ".tiff") else {}
    if path.suffix == ".pdf":
        options["resolution"] = 200
    first.save(path, **options)


def _save_again(source: Path, path: Path) -> None:
    with Image.open(source) as image:
        image.convert("RGB").save(path)
