"""Stores small images of the pages that were read next to the results, for the report."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from granite4v.clip_projector import Image
from granite4v.errors import OutputError
from granite4v.paths import OWN_PREFIX, output_error, write_bytes
from granite4v.runtime.extract.own_files import make_folders

FOLDER = f"{OWN_PREFIX}-pages"
SIDE_PX = 1000  # ordinary print on a letter page is just readable
QUALITY = 50


def keep_image(folder: Path, digest: str, image: Image) -> None:
    """Writes the page as a small WebP, unless one with the same pixels exists. Raises OutputError."""
    path = image_path(folder, digest)
    if path.exists():
        return
    small = image.pillow.copy()
    small.thumbnail((SIDE_PX, SIDE_PX))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=2)
    make_folders(folder, FOLDER)
    try:
        write_bytes(path, buffer.getvalue())  # not fsynced: the report can do without a lost image
    except OSError as error:
        raise output_error(error, path) from None


def data_url(folder: Path, digest: str | None) -> str | None:
    """Returns the image of a page as a data URL; None if there is none."""
    if digest is None:
        return None
    try:
        content = image_path(folder, digest).read_bytes()
    except OSError:  # an earlier run without a report did not keep it
        return None
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}" if content else None


def image_path(folder: Path, digest: str) -> Path:
    """Returns the path of a page's image. Raises OutputError for a digest that is none."""
    if not digest.isalnum():
        raise OutputError(f"'{digest:.80}' is no digest of a page; start again with another --out.")
    return folder / FOLDER / f"{digest[:32]}.webp"
