"""Decodes the frames of a video file with PyAV (the extra 'video'), in a child process with limits.

Frames are converted to RGB by FFmpeg's rules for the file's own colour space; this module does not decide sizes or
tiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from granite4v.memory import limit_address_space

MAX_FRAMES_IN_FILE = 1_000_000  # most frames that are decoded, also to count those of a file without a frame count
DEFAULT_FPS = 25.0  # for a file without a frame rate
# FFmpeg's containers that hold a video themselves: no playlists, scripts or devices, which would name other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,apng,mxf,nut,ivf,dv,"
    "h264,hevc,av1,obu,m4v,mjpeg,h263,h261,vvc,rm,swf,yuv4mpegpipe"
)
OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}


def spread(n_total: int, n: int) -> list[int]:
    """Chooses `n` of `n_total` frames, evenly spread from the first on; all if there are fewer. For 10 frames and 4:
    [0, 2, 5, 7].

    Same as transformers 5.24 (`video_utils.default_sample_indices_fn`).
    """
    n = min(n, n_total)
    return [i * n_total // n for i in range(n)]


def main(request: str) -> None:
    """Decodes a video in the child process and prints JSON: the sizes of the frames, or what is wrong with the file.

    `request`: JSON with the `path` of the video, the file that gets the `pixels`, `frames` or `fps`, and the limits
    `max_frames`, `max_pixels` (of all frames) and `memory_bytes`.
    """
    import av

    av.logging.set_level(av.logging.PANIC)  # errors of a file are raised anyway
    asked = json.loads(request)
    limit_address_space(asked["memory_bytes"])
    try:
        reply = _read(av, asked)
    except MemoryError:  # also from FFmpeg
        reply = {"error": f"needs more than {asked['memory_bytes'] / (1 << 30):g} GiB of memory to decode"}
    except av.error.ArgumentError:  # not one of CONTAINERS
        reply = {"error": "cannot be read as a video: it is of another kind"}
    except av.error.FFmpegError as error:
        reply = {"error": f"cannot be read as a video: {error.strerror or error}"}
    print(json.dumps(reply))


def _read(av: Any, asked: dict[str, Any]) -> dict[str, Any]:
    with av.open(asked["path"], options=OPTIONS) as container:
        if not container.streams.video:
            return {"error": "has no video in it; give a file with a video stream"}
        stream = container.streams.video[0]
        n_total, fps = stream.frames, float(stream.average_rate or stream.base_rate or DEFAULT_FPS)
    if n_total <= 0:  # not all containers have a frame count
        n_total = sum(1 for _ in _decoded(av, asked["path"]))
    n = min(n_total, asked["frames"] or max(1, int(n_total / fps * asked["fps"])))
    if n > asked["max_frames"]:
        return {"error": f"has {n:,} frames at that rate; expected at most {asked['max_frames']:,}"}
    wanted = spread(n_total, n) if n_total else []
    sizes, is_too_large = _write(av, asked, set(wanted))
    if is_too_large:
        size = "x".join(map(str, sizes[0]))
        return {
            "error": f"has frames of {size} pixels, of which {len(wanted)} have more than {asked['max_pixels']:,} "
            "pixels together; take fewer frames, or scale the video down"
        }
    if not sizes:
        return {"error": "has no frame that can be decoded; it may be damaged"}
    return {"sizes": sizes, "n_wanted": len(wanted)}


def _write(av: Any, asked: dict[str, Any], wanted: set[int]) -> tuple[list[tuple[int, int]], bool]:
    """Writes the pixels of the wanted frames, as far as the file can be decoded. Returns the sizes of the frames, and
    whether they have too many pixels."""
    sizes: list[tuple[int, int]] = []
    last, n_left = max(wanted, default=-1), asked["max_pixels"]
    with open(asked["pixels"], "wb") as out:
        try:
            for i, frame in enumerate(_decoded(av, asked["path"])):
                if i in wanted:
                    sizes.append((frame.width, frame.height))
                    n_left -= frame.width * frame.height
                    if n_left < 0:
                        return sizes, True
                    out.write(frame.to_image().tobytes())
                if i >= last:
                    break
        except MemoryError:
            raise
        except av.error.FFmpegError:
            if not sizes:
                raise
    return sizes, False


def _decoded(av: Any, path: str) -> Iterator[Any]:
    with av.open(path, options=OPTIONS) as container:
        for i, frame in enumerate(container.decode(container.streams.video[0])):
            if i >= MAX_FRAMES_IN_FILE:
                return
            yield frame
