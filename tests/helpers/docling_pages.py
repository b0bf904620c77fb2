"""docling pages with tables, in the state in which docling's layout stage leaves them; needs no model."""

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
    """The backend of a page that consists of one image, one point per pixel."""

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
    """The backend of a page that cannot be rendered."""

    def get_page_image(self, scale: float = 1, cropbox: BoundingBox | None = None) -> Image.Image:
        raise RuntimeError("Failed to load page.")


def page_of(number: int, tables: Sequence[Image.Image], texts: Iterable[str] = (), backend: Any = ImageBackend) -> Page:
    """Returns a page with table images stacked vertically, as if found by the layout stage; `texts` are in the first
    table."""
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
    """Returns the result object of a conversion that has not started."""
    path.write_bytes(b"%PDF-1.7")
    document = InputDocument(path_or_stream=path, format=InputFormat.PDF, backend=NoOpBackend)
    return ConversionResult(input=document)
