"""docling's pages with tables on them, as its layout stage hands them on; nothing of it needs a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from docling.backend.noop_backend import NoOpBackend
from docling.datamodel.base_models import Cluster, InputFormat, LayoutPrediction, Page
from docling.datamodel.document import ConversionResult, InputDocument
from docling_core.types.doc import BoundingBox, DocItemLabel, Size
from docling_core.types.doc.page import BoundingRectangle, TextCell
from PIL import Image

GAP = 20


class ImageBackend:
    """A page that is one image, of a point each pixel."""

    def __init__(self, image: Image.Image | None) -> None:
        self._image = image

    def is_valid(self) -> bool:
        return self._image is not None

    def get_page_image(self, scale: float = 1, cropbox: BoundingBox | None = None) -> Image.Image:
        assert self._image is not None
        box = (0, 0, *self._image.size) if cropbox is None else cropbox.as_tuple()
        part = self._image.crop(tuple(map(round, box)))
        return part.resize((round(part.width * scale), round(part.height * scale)))


class BrokenBackend(ImageBackend):
    """A page that cannot be drawn."""

    def get_page_image(self, scale: float = 1, cropbox: BoundingBox | None = None) -> Image.Image:
        raise RuntimeError("Failed to load page.")


def page_of(number: int, tables: Sequence[Image.Image], texts: Iterable[str] = (), backend: Any = ImageBackend) -> Page:
    """A page with pictures of tables below each other, found by the layout stage; `texts` stand in the first."""
    size = (max(one.width for one in tables) + 2 * GAP, sum(one.height + GAP for one in tables) + GAP)
    sheet, top, clusters = Image.new("RGB", size, "white"), GAP, []
    for i, one in enumerate(tables):
        sheet.paste(one, (GAP, top))
        box = BoundingBox(l=GAP, t=top, r=GAP + one.width, b=top + one.height)
        clusters.append(Cluster(id=i, label=DocItemLabel.TABLE, bbox=box))
        top += one.height + GAP
    where = BoundingRectangle.from_bounding_box(clusters[0].bbox)
    clusters[0].cells = [TextCell(rect=where, text=text, orig=text, from_ocr=False) for text in texts]
    clusters.append(Cluster(id=len(tables), label=DocItemLabel.TEXT, bbox=clusters[0].bbox))
    page = Page(page_no=number, size=Size(width=size[0], height=size[1]))
    page.predictions.layout = LayoutPrediction(clusters=clusters)
    page._backend = backend(sheet)
    return page


def result_for(path: Path) -> ConversionResult:
    """A conversion that has not begun."""
    path.write_bytes(b"%PDF-1.7")
    document = InputDocument(path_or_stream=path, format=InputFormat.PDF, backend=NoOpBackend)
    return ConversionResult(input=document)
