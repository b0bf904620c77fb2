"""Pages and videos attached to a conversation: read in child processes, identified by their pixels and files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from granite4v.clip_projector.files import is_video, shown
from granite4v.clip_projector.images import Image
from granite4v.clip_projector.video import read_video
from granite4v.clip_projector.views import Video
from granite4v.errors import DocumentError
from granite4v.families.base import VisionConfig
from granite4v.runtime.documents import Page, PageFailure, PageRanges, SelectionError, open_pages, parse_pages
from granite4v.runtime.documents.sources import SUFFIXES

_READ_BYTES = 1 << 20
_HEAD_BYTES = 1024
# suffixes of files that are attached when dropped into a line, and that are offered as completions
ATTACHED = (*SUFFIXES, ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")


@dataclass(frozen=True)
class FileSpec:
    """What `FILE` or `FILE#PAGES` names. `pages`: None for as many as fit."""

    path: Path
    pages: PageRanges | None


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are taken, as in `load_video`."""

    frames: int | None = None
    fps: float | None = None


@dataclass(frozen=True, eq=False)
class ChatPage:
    """One attached page, or a video. `path` is absolute; `number` counts from 1, of `n_pages`.

    `file_sha256`: of the file when it was read, in hexadecimal digits. `dpi`: at which a PDF page was rendered.
    """

    path: Path
    number: int
    n_pages: int
    image: Image | Video = field(repr=False)
    file_sha256: str
    dpi: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The digest of the pixels, in hexadecimal digits."""
        return self.image.digest.hex()

    @property
    def name(self) -> str:
        """'scan.pdf#2', or 'page.png' for a file with one page."""
        return f"{shown(self.path.name)}#{self.number}" if self.n_pages > 1 else shown(self.path.name)

    @property
    def n_frames(self) -> int | None:
        """The number of frames of a video; None for a page."""
        return len(self.image.frames) if isinstance(self.image, Video) else None


def file_spec(text: str) -> FileSpec:
    """The file and the pages of 'FILE' or 'FILE#PAGES', such as 'scan.pdf#1-3,7'. A file's name may contain a '#'.

    Raises DocumentError for a path that is not a file, and for an invalid page selection.
    """
    path = os.path.expanduser(text)
    named, mark, pages = path.rpartition("#")
    if not mark or os.path.lexists(path):
        return FileSpec(regular_file(path), None)
    try:
        return FileSpec(regular_file(named), parse_pages(pages))
    except SelectionError as error:
        raise DocumentError(f"'{shown(text)}': {error}") from None


def regular_file(path: str) -> Path:
    """The absolute path of a regular file. Raises DocumentError if it is missing or something else."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else None
        missing = isinstance(error, FileNotFoundError)
        raise DocumentError(
            f"there is no file '{shown(path)}'." if missing else f"'{shown(path)}' cannot be read: {why or error}."
        ) from None
    if stat.S_ISDIR(mode):
        raise DocumentError(f"'{shown(path)}' is a directory; attach the files in it one by one.")
    if not stat.S_ISREG(mode):
        raise DocumentError(f"'{shown(path)}' is a device or a pipe; attach a file.")
    return Path(path).absolute()


def read_pages(
    spec: FileSpec, view: VisionConfig | None, password: str | None = None, sampling: FrameSampling | None = None
) -> Iterator[ChatPage | DocumentError]:
    """Yields the pages of a file, each rendered on demand; in place of a page that cannot be read, yields its error. A
    video is one page, with the frames that `sampling` selects.

    Raises what `open_pages` and `read_video` raise, and DocumentError when the file cannot be read at all.
    """
    sha256, head = _sha256(spec.path)
    if is_video(head):
        yield _video(spec, view, sampling or FrameSampling(), sha256)
        return
    with contextlib.closing(open_pages([spec.path], pages=spec.pages, password=password, view=view)) as pages:
        for page in pages:
            if isinstance(page, Page):
                yield ChatPage(spec.path, page.number, page.n_pages, page.image, sha256, page.dpi, page.warnings)
            elif isinstance(page, PageFailure):
                if page.number is None:
                    raise page.error
                yield DocumentError(str(page.error))


def _video(spec: FileSpec, view: VisionConfig | None, sampling: FrameSampling, sha256: str) -> ChatPage:
    name = f"'{shown(str(spec.path))}'"
    if view is None or not view.takes_video:
        raise DocumentError(f"{name} is a video, and this model takes none, only images and pages.")
    if spec.pages is not None and list(spec.pages.of(1)) != [(1, 1)]:
        raise DocumentError(f"{name} is a video, which has no pages; attach it without '#', all of it.")
    video, said = read_video(spec.path, frames=sampling.frames, fps=sampling.fps)
    return ChatPage(spec.path, 1, 1, video, sha256, warnings=said)


def _sha256(path: Path) -> tuple[str, bytes]:
    """The SHA-256 of a file in hexadecimal digits, and the beginning of the file."""
    digest, head = hashlib.sha256(), b""
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                head = head or piece[:_HEAD_BYTES]
    except OSError as error:
        raise DocumentError(f"'{shown(str(path))}' cannot be read: {error.strerror or error}.") from None
    return digest.hexdigest(), head
