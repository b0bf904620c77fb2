"""Frames of a video file, through PyAV (the extra 'video'): which of them are taken, and decoding these.

Frames are converted to RGB by FFmpeg's rules for the file's own colour space; sizes and tiles are not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from granite4v.clip_projector.files import shown
from granite4v.clip_projector.images import Image, ImageSource, load_image
from granite4v.clip_projector.views import Video
from granite4v.errors import DeviceError, ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

VideoSource: TypeAlias = "Video | str | Path | Sequence[ImageSource]"

DEFAULT_FRAMES = 32  # of a file, where nothing else is asked for
MAX_FRAMES = 1024  # that one video may have: each is an image in memory, and hundreds of tokens
MAX_FRAMES_IN_FILE = 1_000_000  # that are counted, where a file does not say how many it has


def load_video(source: VideoSource, *, frames: int | None = None, fps: float | None = None) -> Video:
    """The frames of a video: of a file, `frames` of them or `fps` a second, spread evenly, 32 by default; of a list of
    images, all. What is a Video already is returned as it is.

    Raises ImageError for what cannot be read as a video, DeviceError without PyAV, ValueError for a number of frames
    that is out of range.
    """
    if isinstance(source, Video):
        return source
    if not isinstance(source, str | Path):
        if not 0 < len(source) <= MAX_FRAMES:
            raise ImageError(f"the video has {len(source):,} frames; expected 1 to {MAX_FRAMES:,}.")
        return Video(tuple(load_image(frame) for frame in source))
    if frames is not None and fps is not None:
        raise ValueError("give the number of frames or frames a second, not both.")
    if frames is not None and not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"frames is {frames}; expected 1 to {MAX_FRAMES:,}.")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps:g}; expected a number above 0.")
    return _read(Path(source), frames, fps)


def sampled(n_total: int, file_fps: float, frames: int | None, fps: float | None) -> list[int]:
    """Which of `n_total` frames are taken, evenly spread from the first on; never more than there are.

    As transformers 5.24 (`video_utils.default_sample_indices_fn`): n_total / n apart, rounded down. `file_fps`: frames
    a second in the file.
    """
    n = frames or DEFAULT_FRAMES
    if fps is not None:
        n = max(1, int(n_total / file_fps * fps))
    n = min(n, n_total)
    return [i * n_total // n for i in range(n)]


def _read(path: Path, frames: int | None, fps: float | None) -> Video:
    av = _pyav()
    name = f"'{shown(str(path))}'"
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ImageError(f"{name} has no video in it; give a file with a video stream.")
            n_total, file_fps = container.streams.video[0].frames, _fps(container.streams.video[0])
        if not n_total:  # not every kind of file says it
            n_total = sum(1 for _ in _decoded(av, path))
        wanted = sampled(n_total, file_fps, frames, fps)
        if len(wanted) > MAX_FRAMES:
            raise ImageError(
                f"{name} at {fps:g} frames a second has {len(wanted):,} frames; expected at most {MAX_FRAMES:,}."
            )
        found = _frames(av, path, set(wanted))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} cannot be read as a video: No such file or directory.") from None
    except (OSError, ValueError) as error:  # av.error.FFmpegError is both
        raise ImageError(f"{name} cannot be read as a video: {getattr(error, 'strerror', None) or error}.") from None
    if not found:
        raise ImageError(f"{name} has no frame that can be decoded; it may be damaged.")
    return Video(tuple(found))


def _frames(av: Any, path: Path, wanted: set[int]) -> list[Image]:
    last = max(wanted, default=-1)
    found = []
    for i, frame in enumerate(_decoded(av, path)):
        if i in wanted:
            found.append(Image(frame.to_image()))
        if i >= last:
            break
    return found


def _decoded(av: Any, path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for i, frame in enumerate(container.decode(stream)):
            if i >= MAX_FRAMES_IN_FILE:
                return
            yield frame


def _fps(stream: Any) -> float:
    rate = stream.average_rate or stream.base_rate
    return float(rate) if rate else 25.0


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise DeviceError(
            "videos are read through PyAV, which is not installed: pip install 'granite4v[video]'; or give the frames "
            "as images."
        ) from None
    av.logging.set_level(av.logging.PANIC)  # what is wrong with a file is raised, too
    return av
