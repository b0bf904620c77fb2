"""Small pictures of the pages that were read, kept beside the results for the report."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from granite4v.errors import OutputError
from granite4v.runtime.extraction.durable import OWN, output_error

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = f"{OWN}-pages"
SIDE_PX = 1000  # print of ordinary size on a letter page can just be read
QUALITY = 50


def keep_picture(folder: Path, digest: str, image: Image) -> None:
    """Writes the page as a small WebP, unless a page with the same pixels is there. Raises OutputError."""
    path = _path(folder, digest)
    if path.exists():
        return
    small = image.copy()
    small.thumbnail((SIDE_PX, SIDE_PX))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=2)
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_bytes(buffer.getvalue())  # not made to last: a picture that is lost is left out
        partial.replace(path)
    except OSError as error:
        raise output_error(error, path) from None


def data_url(folder: Path, digest: str | None) -> str | None:
    """The picture as a data URL; None when there is none."""
    if digest is None:
        return None
    try:
        content = _path(folder, digest).read_bytes()
    except OSError:  # an earlier run without a report did not keep it
        return None
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}" if content else None


def _path(folder: Path, digest: str) -> Path:
    if not digest.isalnum():
        raise OutputError(f"'{digest:.80}' is no digest of a page; start again with another --out.")
    return folder / FOLDER / f"{digest[:32]}.webp"
