"""Opens the images, PDF pages and videos of requests.

Files are decoded in child processes, so that a damaged one cannot crash the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from granite4v.clip_projector import Image, Video
from granite4v.clip_projector.files import is_pdf
from granite4v.clip_projector.images import BOMB_ADVICE
from granite4v.clip_projector.video import VideoLimits, read_video
from granite4v.errors import DocumentError, ImageError, PasswordError
from granite4v.families.base import Tiling
from granite4v.runtime.documents.limits import LIMITS
from granite4v.runtime.documents.reader import RawPage, Reader, RemoteDocument
from granite4v.runtime.server.content import Attachment, VideoChoice
from granite4v.runtime.server.errors import ApiError, invalid
from granite4v.runtime.server.options import Limits

N_READERS = 2  # child processes; each is started when it is first needed


class _Gone(Exception):
    """The request was cancelled; nobody is waiting for the document."""


class _Desk:
    """A reader process, and the cancellation event of the request that it works for."""

    def __init__(self) -> None:
        self.gone = threading.Event()
        self.reader = Reader(LIMITS, self._waiting)

    def _waiting(self, source: str, number: int | None, seconds: float) -> None:
        if self.gone.is_set():
            raise _Gone


class MediaOpener:
    """Opens the attachments of requests, for at most `N_READERS` requests at a time."""

    def __init__(self, limits: Limits, tiling: Tiling | None) -> None:
        """`tiling`: the model's; it determines the size at which PDF pages are rendered."""
        self._limits, self._tiling = limits, tiling
        self._pool = ThreadPoolExecutor(N_READERS, thread_name_prefix="granite4v-media")
        self._desks: queue.SimpleQueue[_Desk] = queue.SimpleQueue()
        for _ in range(N_READERS):
            self._desks.put(_Desk())

    async def open(self, attachments: Sequence[Attachment]) -> Sequence[Sequence[Image | Video]]:
        """Opens each attachment: an image or a video, or the pages of a document. Raises ApiError, DeviceError.

        When this is cancelled, the reader process at work is ended within half a second.
        """
        gone = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._open_all, attachments, gone)
        finally:
            gone.set()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        while True:
            with contextlib.suppress(queue.Empty):
                self._desks.get_nowait().reader.close()
                continue
            return

    def _open_all(self, attachments: Sequence[Attachment], gone: threading.Event) -> list[list[Image | Video]]:
        desk = self._desks.get()
        desk.gone = gone
        try:
            budget = _Budget(self._limits)
            return [self._opened(desk, one, budget) for one in attachments if not gone.is_set()]
        except ApiError:
            raise
        except BaseException:
            desk.reader.close()  # the process may be in the middle of a reply; the next request starts a new one
            raise
        finally:
            self._desks.put(desk)

    def _opened(self, desk: _Desk, attachment: Attachment, budget: _Budget) -> list[Image | Video]:
        try:
            if attachment.path is not None:
                _check_regular(attachment.path, attachment)
            if attachment.video is not None:
                return [self._video(desk, attachment, attachment.video, budget)]
            return list(self._open(desk.reader, attachment, budget))
        except PasswordError:
            what = (
                "is encrypted" if attachment.password is None else "is encrypted, and its 'password' does not open it"
            )
            advice = "send its password as 'password', beside 'file_data'"
            param = attachment.param.replace("file_data", "password")
            raise invalid(f"{attachment.name} {what}; {advice}.", param, "invalid_password") from None
        except (DocumentError, ImageError) as error:
            code = "invalid_image" if isinstance(error, ImageError) else "invalid_document"
            code = code if attachment.video is None else "invalid_video"
            message = str(error).replace(BOMB_ADVICE, ".")
            raise invalid(message, attachment.param, code) from None

    def _video(self, desk: _Desk, attachment: Attachment, choice: VideoChoice, budget: _Budget) -> Video:
        n_wanted = len(choice.given) or choice.frames or 1
        if n_wanted > budget.n_frames:
            raise budget.too_many_frames(attachment)
        if choice.given:
            images = [next(self._open(desk.reader, frame, budget, is_frame=True)) for frame in choice.given]
            return Video(tuple(images))
        most = self._limits.n_frames
        bounds = VideoLimits(most, max(0, budget.n_pixels), LIMITS.memory_bytes, self._limits.video_s)
        source = attachment.path if attachment.content is None else attachment.content
        assert source is not None
        video, _ = read_video(
            source,
            frames=choice.frames,
            fps=choice.fps,
            name=attachment.name,
            limits=bounds,
            stop=desk.gone.is_set,
        )
        budget.take_video(video, attachment)
        return video

    def _open(
        self, reader: Reader, attachment: Attachment, budget: _Budget, *, is_frame: bool = False
    ) -> Iterator[Image]:
        document = RemoteDocument(
            reader,
            attachment.name,
            attachment.name,
            path=None if attachment.path is None else str(attachment.path),
            content=attachment.content,
            state=None,
            password=attachment.password,
        )
        if not attachment.is_document:
            if is_pdf(attachment.content or b""):
                raise invalid(
                    f"{attachment.name} is a PDF, not an image; send it as a part of the type 'file'.",
                    attachment.param,
                    "invalid_image",
                )
            yield budget.take(document.load(), attachment, is_frame=is_frame)
            return
        document.begin_open()
        document.finish_open()
        if document.damage is not None:
            raise DocumentError(document.damage)
        for number in self._chosen(document.n_pages, attachment, budget):
            document.begin_render(number, None, self._tiling)
            yield budget.take(document.finish_render(), attachment, is_frame=False)

    def _chosen(self, n_pages: int, attachment: Attachment, budget: _Budget) -> list[int]:
        """The numbers of the pages to render. Raises ApiError for too many pages, or one that does not exist."""
        ranges = [(1, n_pages)] if attachment.pages is None else list(attachment.pages.of(n_pages))
        missing = next((first for first, _ in ranges if first > n_pages), None)
        if missing is not None:
            raise invalid(
                f"{attachment.name} has {n_pages:,} pages, so there is no page {missing:,}.",
                attachment.param,
                "invalid_pages",
            )
        numbers = [number for first, last in ranges for number in range(first, (last or n_pages) + 1)]
        most = min(self._limits.n_pages, budget.n_images)
        if len(numbers) > most:
            raise invalid(
                f"{attachment.name} gives {len(numbers):,} pages, but the server takes {most:,} here; choose some with "
                "'pages', such as '1-3'.",
                attachment.param,
                "too_many_pages",
            )
        return numbers


def _check_regular(path: Path, attachment: Attachment) -> None:
    """Raises ApiError for a pipe, a socket or a device, which could block for ever. What cannot be examined is left to
    those who open it."""
    with contextlib.suppress(OSError, ValueError):
        if not stat.S_ISREG(path.stat().st_mode):
            code = "invalid_image" if attachment.video is None else "invalid_video"
            raise invalid(f"{attachment.name} is not a regular file; name one that is.", attachment.param, code)


class _Budget:
    """How many images, video frames and pixels a request may still use."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.n_images, self.n_frames, self.n_pixels = limits.n_images, limits.n_frames, limits.n_pixels

    def take_video(self, video: Video, attachment: Attachment) -> None:
        """Deducts a video. Raises ApiError if it has more frames than are left."""
        self.n_frames -= len(video.frames)
        if self.n_frames < 0:
            raise self.too_many_frames(attachment)
        self.n_pixels -= sum(frame.size[0] * frame.size[1] for frame in video.frames)

    def too_many_frames(self, attachment: Attachment) -> ApiError:
        return invalid(
            f"the videos of the request have more than {self._limits.n_frames} frames, the server's limit; take fewer "
            "with 'frames' or 'fps'.",
            attachment.param,
            "too_many_frames",
        )

    def take(self, page: RawPage, attachment: Attachment, *, is_frame: bool) -> Image:
        width, height = page.size
        self.n_frames -= is_frame
        self.n_images -= not is_frame
        self.n_pixels -= width * height
        if self.n_images < 0:
            raise invalid(
                f"the request has more than {self._limits.n_images} images and pages, the server's limit; send fewer.",
                attachment.param,
                "too_many_images",
            )
        if self.n_pixels < 0:
            raise invalid(
                f"the images have more than {self._limits.n_pixels:,} pixels together, the server's limit; scale them "
                "down, or send fewer.",
                attachment.param,
                "too_many_pixels",
            )
        return Image.from_pixels(page.size, page.pixels)
