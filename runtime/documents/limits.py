"""Resource limits for one file or page. Each has its own error message."""

from __future__ import annotations

from dataclasses import dataclass

from granite4v.clip_projector.files import MAX_FILE_BYTES, PIPE_S


@dataclass(frozen=True)
class Limits:
    """Bounds that ordinary documents stay far below. Bounds on pixels are in Pillow, `pdf` and `resolution`."""

    open_s: float = 60  # to open a document and find its pages
    page_s: float = 60  # to render one page; a letter page takes 0.1 s
    memory_bytes: int = 3 << 30  # of the reader process: the largest image that Pillow opens needs half of it
    file_bytes: int = MAX_FILE_BYTES  # of a single-page image, standard input or a pipe, which are read into memory
    url_bytes: int = 4 << 30  # of a file that is fetched from a URL
    pipe_s: float = PIPE_S  # how long a named pipe may send nothing
    n_pages: int = 20_000  # of a document
    n_objects: int = 1_000_000  # on a page of a PDF
    n_ended: int = 3  # pages in a row that end their reader before the rest of a document is given up
    n_failed: int = 100  # pages in a row that cannot be read before the rest of a document is given up


LIMITS = Limits()
