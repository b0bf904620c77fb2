"""PDFs built object by object, so that a test knows where everything is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pikepdf
from pikepdf import Array, Dictionary, Name, Stream
from PIL import Image

LETTER = (612, 792)


def pdf_bytes(pdf: pikepdf.Pdf, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pdf.save(buffer, **options)
    return buffer.getvalue()


def add_page(pdf: pikepdf.Pdf, content: str = "", size: tuple[float, float] = LETTER, **entries: Any) -> pikepdf.Page:
    """Adds a page with a content stream, in which `/F` is Helvetica. `entries` go into the page's dictionary."""
    page = pdf.add_blank_page(page_size=size)
    font = Dictionary(Type=Name.Font, Subtype=Name.Type1, BaseFont=Name.Helvetica)
    page.Resources = Dictionary(Font=Dictionary(F=font))
    page.Contents = Stream(pdf, content.encode())
    for key, value in entries.items():
        page[f"/{key}"] = value
    return page


def text_pdf(*lines: str, size: tuple[float, float] = LETTER) -> pikepdf.Pdf:
    """Returns a PDF with one page per line; the line is near the top left."""
    pdf = pikepdf.new()
    for line in lines:
        add_page(pdf, f"BT /F 24 Tf 40 {size[1] - 60} Td ({line}) Tj ET", size)
    return pdf


def add_image(pdf: pikepdf.Pdf, page: pikepdf.Page, image: Image.Image, name: str = "I") -> None:
    """Stores `image` (RGB) losslessly as the resource `/name` of a page."""
    stream = Stream(pdf, image.convert("RGB").tobytes())
    stream.Type, stream.Subtype, stream.ColorSpace = Name.XObject, Name.Image, Name.DeviceRGB
    stream.Width, stream.Height, stream.BitsPerComponent = *image.size, 8
    if "/XObject" not in page.Resources:
        page.Resources.XObject = Dictionary()
    page.Resources.XObject[f"/{name}"] = stream


def scan_pdf(*images: Image.Image, dpi: float = 150) -> pikepdf.Pdf:
    """Returns a PDF with one page per image, which covers the page."""
    pdf = pikepdf.new()
    for image in images:
        width, height = (side * 72 / dpi for side in image.size)
        page = add_page(pdf, f"q {width} 0 0 {height} 0 0 cm /I Do Q", (width, height))
        add_image(pdf, page, image)
    return pdf


def square(x: float, y: float, colour: str, side: float = 72) -> str:
    """Draws a filled square with its lower left corner at (x, y) in points; `colour` is for example '1 0 0'."""
    return f"{colour} rg {x} {y} {side} {side} re f\n"


def add_text_field(pdf: pikepdf.Pdf, page: pikepdf.Page, rect: list[float], value: str) -> None:
    """Adds a form field that holds `value` without an appearance stream: whoever draws the form has to lay out the
    text."""
    field = pdf.make_indirect(
        Dictionary(
            Type=Name.Annot,
            Subtype=Name.Widget,
            FT=Name.Tx,
            T="field",
            V=value,
            Rect=Array(rect),
            DA="/F 20 Tf 0 g",
            F=4,
            P=page.obj,
        )
    )
    page.Annots = Array([field])
    font = Dictionary(Type=Name.Font, Subtype=Name.Type1, BaseFont=Name.Helvetica)
    pdf.Root.AcroForm = Dictionary(
        Fields=Array([field]), DA="/F 20 Tf 0 g", NeedAppearances=True, DR=Dictionary(Font=Dictionary(F=font))
    )


def write(path: Path, pdf: pikepdf.Pdf, **options: Any) -> Path:
    path.write_bytes(pdf_bytes(pdf, **options))
    return path
