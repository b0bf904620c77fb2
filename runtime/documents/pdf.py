"""PDF files as documents, rendered by PDFium through pypdfium2.

PDFium is not thread-safe: pages are rendered from one thread at a time. Importing this module loads PDFium.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pypdfium2
import pypdfium2.raw as pdfium
from PIL import Jpeg2KImagePlugin
from PIL.Image import Image

from granite4v.clip_projector.files import shown
from granite4v.errors import DocumentError, PasswordError
from granite4v.families.base import Tiling
from granite4v.runtime.documents.limits import Limits
from granite4v.runtime.documents.page_source import RenderedPage, limited_pages, whole_pixels
from granite4v.runtime.documents.resolution import render_size, shrunk
from granite4v.runtime.documents.selection import Crop
from granite4v.runtime.documents.sources import state_of

REOPEN_AFTER = 8  # pages: PDFium keeps what it has read of every page of an open document, 1 MB or more per scan
_HEAD_BYTES = 1024  # where a file says that it is linearized
_TAIL_BYTES = 32768  # where a complete file has its end mark
_END_MARK = b"%%EOF"
_WHITE = 0xFFFFFFFF
_DOCUMENTS = (".pdf", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx")
_MOST_NAMES, _MOST_ATTACHED = 3, 1000
_MOST_NAME = 80  # characters of a name
_INSET = 1e-5  # fraction of a scan's size, see `_inset`
_SAME_RESOLUTION = 1.01  # ratio of the two axes that counts as equal: page sizes are rounded to whole points
_INVISIBLE = 3  # render mode of the text that OCR lays over a scan
_UPRIGHT = 1e-4  # how much an image may be skewed and still count as parallel to the page
_PROBE_PX = 64  # the side at which an image is rendered to see whether it has a mask
_MAX_DEPTH = 8  # of forms in forms
MAX_IMAGE_PIXELS = 4_000_000_000  # of one image on a page: about ten seconds


class PdfFile:
    """A PDF file. `password` matters only for an encrypted one."""

    def __init__(
        self, content: Path | bytes, name: str, password: str | None, state: str | None, limits: Limits
    ) -> None:
        """`state`: of its file. Raises DocumentError for a file that is damaged or has no pages, and for an encrypted
        one that `password` does not open."""
        self._content, self._name, self._password, self._state = content, name, password, state
        self._limits = limits
        self._n_rendered = 0
        self._notes: tuple[str, ...] = ()
        self._pdf = self._open()
        self.n_pages, self.damage = limited_pages(len(self._pdf), limits, name)
        self.index: list[int] | None = None
        self._notes = self._find_notes()

    def _open(self) -> Any:
        handle = self._handle(None if self._password is None else self._password.encode())
        if not handle and self._password and pdfium.FPDF_GetLastError() == pdfium.FPDF_ERR_PASSWORD:
            handle = self._handle(None)  # a password meant for other files of a folder must not lock this one out
        if not handle:
            raise self._why_closed(pdfium.FPDF_GetLastError())
        pdf = pypdfium2.PdfDocument(handle)
        with _no_log(), contextlib.suppress(pypdfium2.PdfiumError):  # better without form fields than not at all
            pdf.init_forms()
        if len(pdf) < 1:
            pdf.close()
            raise DocumentError(f"{self._name} has no pages.")
        return pdf

    def _handle(self, password: bytes | None) -> Any:
        if isinstance(self._content, bytes):
            return pdfium.FPDF_LoadMemDocument64(self._content, len(self._content), password)
        return pdfium.FPDF_LoadDocument(os.fsencode(self._content), password)

    def _why_closed(self, code: int) -> DocumentError:
        name = self._name
        if code == pdfium.FPDF_ERR_PASSWORD:
            if self._password:
                return PasswordError(
                    f"{name} is encrypted, and the given password does not open it; check '--password'."
                )
            return PasswordError(f"{name} is encrypted; give its password with '--password'.")
        if code == pdfium.FPDF_ERR_FILE:
            return DocumentError(f"{name} cannot be read; is it still there?")
        if code == pdfium.FPDF_ERR_SECURITY:
            return DocumentError(
                f"{name} uses an encryption method that PDFium does not support; save it without encryption."
            )
        what = "is cut short" if self._is_cut() else "is damaged"
        return DocumentError(f"{name} {what}: PDFium finds no document in it; get a complete copy.")

    def _is_cut(self) -> bool:
        """Whether the end mark is missing near the end; zero bytes and some junk may follow it."""
        with io.BytesIO(self._content) if isinstance(self._content, bytes) else self._content.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            end = file.seek(0, 2)
            tail = b""
            while end > 0 and not tail.strip(b"\0"):
                start = max(0, end - _TAIL_BYTES)
                file.seek(start)
                tail, end = file.read(end - start), start
        # a linearized file has another end mark after its first page, which `tail` includes if it is the entire file
        n_expected = 2 if end == 0 and b"/Linearized" in head else 1
        return tail.count(_END_MARK) < n_expected

    def _find_notes(self) -> tuple[str, ...]:
        notes = []
        if self._is_cut():
            notes.append(
                f"{self._name} has no end-of-file marker: it may be truncated, and content may be missing from its "
                "pages."
            )
        if self._pdf.get_formtype() == pdfium.FORMTYPE_XFA_FULL:
            notes.append(
                f"{self._name} is an XFA form, of which only a placeholder page can be rendered; print it to PDF."
            )
        attached = [name for name in self._attached() if name.lower().endswith(_DOCUMENTS)]
        if attached:
            names = ", ".join(f"'{shown(name):.{_MOST_NAME}}'" for name in attached[:_MOST_NAMES])
            more = f" and {len(attached) - _MOST_NAMES} more" if len(attached) > _MOST_NAMES else ""
            notes.append(
                f"{self._name} has attached files, which are not read: {names}{more}; save them and process them "
                "separately."
            )
        return tuple(notes)

    def _attached(self) -> list[str]:
        n_files = min(self._pdf.count_attachments(), _MOST_ATTACHED)
        return [self._pdf.get_attachment(i).get_name() for i in range(n_files)]

    def render(self, number: int, crop: Crop | None, tiling: Tiling | None) -> RenderedPage:
        """Renders the page as large as needed, rotated and cropped as the file says, with annotations and form fields,
        on white.

        Raises DocumentError for a page that cannot be loaded and for a crop that extends beyond it.
        """
        if self._n_rendered == REOPEN_AFTER:
            self._pdf.close()
            self._check_unchanged()
            self._pdf, self._n_rendered = self._open(), 0
        self._n_rendered += 1
        name = f"page {number} of {self._name}"
        try:
            page = self._pdf[number - 1]
        except (pypdfium2.PdfiumError, IndexError):
            raise DocumentError(f"{name} cannot be loaded: the file is damaged or cut short.") from None
        notes = self._notes
        with contextlib.closing(page):
            if _restore_crop_box(page):
                notes += (f"the crop box of {name} lies outside the page, so the full page is used instead.",)
            image, dpi = _render_page(page, name, crop, tiling, self._limits)
            if _is_blank(image) and crop is None and _has_text(page):
                notes += (
                    f"{name} contains text, but none is visible when rendered: its fonts may be neither embedded "
                    "nor installed, its "
                    "layers may be hidden, or the text may lie outside the page. Print it to a new PDF "
                    "from a program that displays it.",
                )
        return RenderedPage(image, dpi, notes)

    def _check_unchanged(self) -> None:
        if isinstance(self._content, Path) and self._state is not None and state_of(self._content) != self._state:
            if not self._content.exists():
                raise DocumentError(f"{self._name} cannot be read; is it still there?")
            raise DocumentError(f"{self._name} was changed while it was being read; read it again.")

    def close(self) -> None:
        self._pdf.close()


def _render_page(page: Any, name: str, crop: Crop | None, tiling: Tiling | None, limits: Limits) -> tuple[Image, float]:
    """Returns the page, or the part of it inside `crop`, and its pixels per inch."""
    width, height = page.get_size()
    if not (width > 0 and height > 0 and math.isfinite(width * height)):
        raise DocumentError(f"{name} has no size ({width:g} x {height:g} points).")
    box = (0.0, 0.0, width, height) if crop is None else crop.box((width, height), name, "points")
    shape = (box[2] - box[0], box[3] - box[1])
    images, fine = _images(page, name, limits), render_size(shape, None, tiling)[0] / shape[0]
    scan = None if tiling is None else _scan_resolution(page, images, fine)
    if scan is not None and crop is not None:  # move the edges of the crop to pixel boundaries of the scan
        pixels = (round(width * scan[0]), round(height * scan[1]))
        scaled = whole_pixels((box[0] * scan[0], box[1] * scan[1], box[2] * scan[0], box[3] * scan[1]), pixels)
        box = (scaled[0] / scan[0], scaled[1] / scan[1], scaled[2] / scan[0], scaled[3] / scan[1])
    shape = (box[2] - box[0], box[3] - box[1])
    size = render_size(shape, scan, tiling)
    scale = (size[0] / shape[0], size[1] / shape[1])
    whole = (round(width * scale[0]), round(height * scale[1]))
    corner = (round(box[0] * scale[0]), round(box[1] * scale[1]))
    image = shrunk(_render_part(page, size, corner, whole), tiling)
    return image, round(image.width / shape[0] * 72, 1)


def _restore_crop_box(page: Any) -> bool:
    """Replaces a crop box that lies outside the page by the media box, as other viewers do. Returns whether it did."""
    if min(page.get_size()) > 0:
        return False
    try:
        left, bottom, right, top = page.get_mediabox()
    except pypdfium2.PdfiumError:
        return False
    page.set_cropbox(left, bottom, right, top)
    return min(page.get_size()) > 0


def _is_blank(image: Image) -> bool:
    return len(set(image.convert("L").getextrema())) == 1


def _has_text(page: Any) -> bool:
    """Whether the page has text that is not invisible."""
    return any(
        pdfium.FPDFPageObj_GetType(handle) == pdfium.FPDF_PAGEOBJ_TEXT
        and pdfium.FPDFTextObj_GetTextRenderMode(handle) != _INVISIBLE
        for handle, _ in _objects(page)
    )


def _render_part(page: Any, size: tuple[int, int], corner: tuple[int, int], whole: tuple[int, int]) -> Image:
    """Renders a part of the page: `size` pixels from `corner` (left, top) on, where the page has `whole` pixels."""
    bitmap = pypdfium2.PdfBitmap.new_native(*size, pdfium.FPDFBitmap_BGR, rev_byteorder=True)
    with contextlib.closing(bitmap):
        pdfium.FPDFBitmap_FillRect(bitmap, 0, 0, *size, _WHITE)
        flags = pdfium.FPDF_ANNOT | pdfium.FPDF_REVERSE_BYTE_ORDER
        where = (-corner[0], -corner[1], *whole, 0)
        pdfium.FPDF_RenderPageBitmap(bitmap, page, *where, flags)
        if page.formenv:
            pdfium.FPDF_FFLDraw(page.formenv, bitmap, page, *where, flags)
        return bitmap.to_pil()  # a copy, since Pillow cannot share pixels of three bytes


def _images(page: Any, name: str, limits: Limits) -> list[tuple[Any, tuple[int, int]]]:
    """Returns (handle, size in pixels) of the images on a page that holds nothing else; empty for other pages.

    Invisible text does not count; an image inside a form is something else. Raises DocumentError for a page with too
    many objects, and for any image on it that would take far too much memory or time.
    """
    images = []
    nothing_else = pdfium.FPDFPage_GetAnnotCount(page) == 0
    for n_objects, (handle, depth) in enumerate(_objects(page), 1):
        if n_objects > limits.n_objects:
            raise DocumentError(
                f"{name} holds more than {limits.n_objects:,} objects; print it to a new PDF or save it as an image."
            )
        kind = pdfium.FPDFPageObj_GetType(handle)
        if kind == pdfium.FPDF_PAGEOBJ_IMAGE:
            images.append((handle, _image_size(handle, name)))
            nothing_else &= depth == 0
        elif kind == pdfium.FPDF_PAGEOBJ_TEXT:
            nothing_else = nothing_else and pdfium.FPDFTextObj_GetTextRenderMode(handle) == _INVISIBLE
        elif kind != pdfium.FPDF_PAGEOBJ_FORM:
            nothing_else = False
    return images if nothing_else else []


def _scan_resolution(
    page: Any, images: Sequence[tuple[Any, tuple[int, int]]], fine: float
) -> tuple[float, float] | None:
    """Returns the pixels per point, horizontally and vertically, at which to render a page of nothing but `images`: the
    resolution of the finest one.

    None for a page that is not a scan. `fine`: the resolution of a page that is not a scan. Images coarser than that
    may have finer masks, which compressed scans use for text; if so, they are not rendered at their own resolution.
    Prepares the images for rendering (see `_inset`).
    """
    if not images:
        return None
    across, down = (max(found) for found in zip(*(_resolution(*image) for image in images), strict=True))
    if page.get_rotation() in (90, 270):
        across, down = down, across
    if not max(across, down) <= min(across, down) * _SAME_RESOLUTION:  # as in a fax: keep the shape of the page
        across = down = max(across, down)
    if not 0 < across < math.inf or (across < fine and any(_has_mask(page, handle) for handle, _ in images)):
        return None
    for handle, _ in images:
        _inset(handle)
    return across, down


def _objects(page: Any) -> Iterator[tuple[Any, int]]:
    """Yields (handle, depth) of everything on the page, including forms and their content."""
    waiting = [(page, 0)]
    while waiting:
        parent, depth = waiting.pop()
        count, get = (
            (pdfium.FPDFFormObj_CountObjects, pdfium.FPDFFormObj_GetObject)
            if depth
            else (pdfium.FPDFPage_CountObjects, pdfium.FPDFPage_GetObject)
        )
        for i in range(count(parent)):
            handle = get(parent, i)
            yield handle, depth
            if pdfium.FPDFPageObj_GetType(handle) == pdfium.FPDF_PAGEOBJ_FORM and depth < _MAX_DEPTH:
                waiting.append((handle, depth + 1))


def _resolution(handle: Any, size: tuple[int, int]) -> tuple[float, float]:
    """Returns the pixels per point of an image of `size` (width, height) pixels, horizontally and vertically on the
    unrotated page."""
    matrix = _matrix(handle)
    a, b, c, d = matrix.a, matrix.b, matrix.c, matrix.d
    if not (a or b) or not (c or d):  # an image without extent
        return math.inf, math.inf
    along, upward = size[0] / math.hypot(a, b), size[1] / math.hypot(c, d)
    if abs(b) + abs(c) < _UPRIGHT * (abs(a) + abs(d)):
        return along, upward
    if abs(a) + abs(d) < _UPRIGHT * (abs(b) + abs(c)):
        return upward, along
    return max(along, upward), max(along, upward)


def _inset(handle: Any) -> None:
    """Shrinks an image by a hundred-thousandth.

    PDFium rounds edges outward: if floating-point error puts an edge just beyond a pixel boundary, it would stretch the
    image by one pixel.
    """
    matrix = _matrix(handle)
    a, b, c, d = matrix.a, matrix.b, matrix.c, matrix.d
    left, bottom = matrix.e + (a + c) * _INSET / 2, matrix.f + (b + d) * _INSET / 2
    pdfium.FPDFPageObj_SetMatrix(handle, pdfium.FS_MATRIX(*(x * (1 - _INSET) for x in (a, b, c, d)), left, bottom))


def _has_mask(page: Any, handle: Any) -> bool:
    """Whether an image is partly transparent. PDFium shows that only by rendering the image, here at a small size."""
    matrix = _matrix(handle)
    pdfium.FPDFPageObj_SetMatrix(handle, pdfium.FS_MATRIX(_PROBE_PX, 0, 0, _PROBE_PX, 0, 0))
    bitmap = pdfium.FPDFImageObj_GetRenderedBitmap(page.pdf, page, handle)
    pdfium.FPDFPageObj_SetMatrix(handle, matrix)
    if not bitmap:
        return True
    try:
        n_bytes = pdfium.FPDFBitmap_GetStride(bitmap) * pdfium.FPDFBitmap_GetHeight(bitmap)
        alpha = ctypes.string_at(pdfium.FPDFBitmap_GetBuffer(bitmap), n_bytes)[3::4]
        return pdfium.FPDFBitmap_GetFormat(bitmap) == pdfium.FPDFBitmap_BGRA and alpha.count(255) < len(alpha)
    finally:
        pdfium.FPDFBitmap_Destroy(bitmap)


def _matrix(handle: Any) -> Any:
    matrix = pdfium.FS_MATRIX()
    pdfium.FPDFPageObj_GetMatrix(handle, matrix)
    return matrix


def _image_size(handle: Any, name: str) -> tuple[int, int]:
    """Returns (width, height) in pixels. Raises DocumentError for an image that could fill the memory or take hours.

    PDFium decodes images row by row, so their size costs only time. But it decodes JPEG 2000 all at once, at the size
    in the image's own header, whatever the page says.
    """
    width, height = ctypes.c_uint(), ctypes.c_uint()
    pdfium.FPDFImageObj_GetImagePixelSize(handle, width, height)
    size, limit = (width.value, height.value), MAX_IMAGE_PIXELS
    if b"JPXDecode" in _filters(handle):
        n_bytes = pdfium.FPDFImageObj_GetImageDataDecoded(handle, None, 0)  # of JPEG 2000: still compressed
        data = ctypes.create_string_buffer(n_bytes)
        pdfium.FPDFImageObj_GetImageDataDecoded(handle, data, n_bytes)
        size, limit = _jpeg2000_size(data.raw) or size, PIL.Image.MAX_IMAGE_PIXELS or limit
    if size[0] * size[1] > limit:
        raise DocumentError(
            f"{name} holds an image of {size[0]:,} x {size[1]:,} pixels, more than {limit:,} together, which may be a "
            "decompression bomb; scale it down."
        )
    return size


def _filters(handle: Any) -> list[bytes]:
    found = []
    for i in range(pdfium.FPDFImageObj_GetImageFilterCount(handle)):
        text = ctypes.create_string_buffer(32)
        pdfium.FPDFImageObj_GetImageFilter(handle, i, text, len(text))
        found.append(text.value)
    return found


def _jpeg2000_size(data: bytes) -> tuple[int, int] | None:
    """Returns (width, height) from the image's header; None if Pillow cannot read it, since PDFium cannot decode such
    an image either."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Jpeg2KImagePlugin.Jpeg2KImageFile(io.BytesIO(data)).size
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, PIL.Image.DecompressionBombError, struct.error):
        return None


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """Keeps pypdfium2 from writing to stderr if logging is not set up; what it says about forms is in `_notes`."""
    logger, handler = logging.getLogger("pypdfium2"), logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
