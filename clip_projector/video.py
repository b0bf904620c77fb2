"""Loads videos from files, directories of frames and lists of images.

Files are decoded in a child process (`video_decoding`), since a damaged file may crash the decoder.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from granite4v.child import run_main
from granite4v.clip_projector import video_decoding
from granite4v.clip_projector.files import shown
from granite4v.clip_projector.images import Image, ImageSource, load_image
from granite4v.clip_projector.views import Video
from granite4v.errors import ArgumentError, DeviceError, ImageError, ImageWarning

VideoSource: TypeAlias = "Video | str | Path | bytes | Sequence[ImageSource]"

DEFAULT_FRAMES = 32  # of a file or a directory, if neither frames nor fps is given
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of frames in a directory


@dataclass(frozen=True)
class VideoLimits:
    """Limits for one video. `n_frames`: frames taken from it; `n_pixels`: pixels of all these frames together. Each
    frame is an image in memory and hundreds of tokens. `memory_bytes`, `time_s`: of the child process that decodes
    it."""

    n_frames: int = 1024
    n_pixels: int = 1 << 30
    memory_bytes: int = 3 << 30
    time_s: float = 3600.0


LIMITS = VideoLimits()


def load_video(source: VideoSource, *, frames: int | None = None, fps: float | None = None) -> Video:
    """Loads the frames of a video.

    From a file (its path or bytes): `frames` frames, or `fps` per second, evenly spread; 32 by default. From a
    directory: `frames` of its images, evenly spread in name order; 32 by default. From a list of images: all. Returns a
    Video unchanged.

    Warns (ImageWarning) about a file with fewer frames than it declares. Raises ImageError for a source that cannot be
    read as a video, DeviceError if PyAV or space for temporary files is missing, ArgumentError for a number of frames
    that is out of range.
    """
    video, said = read_video(source, frames=frames, fps=fps)
    for message in said:
        warnings.warn(message, ImageWarning, stacklevel=2)
    return video


def read_video(
    source: VideoSource,
    *,
    frames: int | None = None,
    fps: float | None = None,
    name: str | None = None,
    limits: VideoLimits = LIMITS,
    stop: Callable[[], bool] | None = None,
) -> tuple[Video, tuple[str, ...]]:
    """Like `load_video`, but returns the warnings together with the video.

    `name`: what messages call the video. `stop` is polled while a file is decoded; when it returns true, decoding ends.
    Raises what `load_video` raises.
    """
    if isinstance(source, Video):
        return source, ()
    check_sampling(frames, fps, limits)
    if isinstance(source, bytes):
        with _scratch_file(source) as file:
            name = name or f"the video ({len(source):,} bytes)"
            return _of_file(Path(file.name), name, _choice(frames, fps, limits), limits, stop)
    if not isinstance(source, str | Path):
        return _of_images(source, name or "the video", limits), ()
    path = Path(source)
    name = name or f"'{shown(str(path))}'"
    if path.is_dir():
        return _of_directory(path, name, frames, fps, limits), ()
    return _of_file(path, name, _choice(frames, fps, limits), limits, stop)


def _scratch_file(content: bytes = b"") -> IO[bytes]:
    """Creates a named temporary file, removed when it is closed. Raises DeviceError if it cannot be written."""
    try:
        file = tempfile.NamedTemporaryFile()  # noqa: SIM115  # the caller closes it
        file.write(content)
        file.flush()
    except OSError as error:
        raise DeviceError(
            f"a video needs temporary files, and none can be written: {error.strerror or error}; make room, or name "
            "another directory in TMPDIR."
        ) from None
    return file


def check_sampling(frames: int | None, fps: float | None, limits: VideoLimits = LIMITS) -> None:
    """Raises ArgumentError for invalid `frames` or `fps`, or if both are given."""
    if frames is not None and fps is not None:
        raise ArgumentError("give the number of frames or frames a second, not both.")
    if frames is not None and not 1 <= frames <= limits.n_frames:
        raise ArgumentError(f"frames is {frames:,}; expected 1 to {limits.n_frames:,}.")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ArgumentError(f"fps is {fps:g}; expected a number above 0.")


def _choice(frames: int | None, fps: float | None, limits: VideoLimits) -> dict[str, Any]:
    return {"frames": None if fps else frames or min(DEFAULT_FRAMES, limits.n_frames), "fps": fps}


def _of_images(images: Sequence[ImageSource], name: str, limits: VideoLimits) -> Video:
    if not 0 < len(images) <= limits.n_frames:
        raise ImageError(f"{name} has {len(images):,} frames; expected 1 to {limits.n_frames:,}.")
    return Video(tuple(load_image(image) for image in images))


def _of_directory(path: Path, name: str, frames: int | None, fps: float | None, limits: VideoLimits) -> Video:
    if fps is not None:
        raise ImageError(f"{name} is a directory of images, which have no times; give a number of frames instead.")
    try:
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    except OSError as error:
        raise ImageError(f"{name} cannot be read as a video: {error.strerror or error}.") from None
    if not found:
        raise ImageError(f"{name} is a directory without images; give a video file, or a directory of frames.")
    wanted = video_decoding.spread(len(found), frames or DEFAULT_FRAMES)
    return _of_images([found[i] for i in wanted], name, limits)


def _of_file(
    path: Path, name: str, choice: dict[str, Any], limits: VideoLimits, stop: Callable[[], bool] | None
) -> tuple[Video, tuple[str, ...]]:
    if importlib.util.find_spec("av") is None:
        raise DeviceError(
            "videos are read through PyAV, which is not installed: pip install 'granite4v[video]'; or give the frames "
            "as images, in a directory."
        )
    if not path.is_file():
        raise ImageError(f"{name} cannot be read as a video: there is no such file.")
    with _scratch_file() as pixels:
        bounds = {
            "max_frames": limits.n_frames,
            "max_pixels": limits.n_pixels,
            "memory_bytes": limits.memory_bytes,
        }
        request = json.dumps({"path": str(path.absolute()), "pixels": pixels.name, **bounds, **choice})
        ended = run_main(video_decoding.__name__, [request], limits.time_s, stop=stop)
        if ended.status != 0:
            reason = f"{ended.how}: {ended.reason}".rstrip(": ")
            raise ImageError(f"{name} cannot be read as a video: its decoder ended {reason:.200}.")
        reply = json.loads(ended.stdout)
        if "error" in reply:
            raise ImageError(f"{name} {reply['error']}.")
        found = [Image.from_pixels((w, h), pixels.read(3 * w * h)) for w, h in reply["sizes"]]
    if len(found) < reply["n_wanted"]:
        return Video(tuple(found)), (
            f"{name} is cut short or damaged: {len(found)} of {reply['n_wanted']} frames could be decoded, and these "
            "are used.",
        )
    return Video(tuple(found)), ()
